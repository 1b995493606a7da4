"""Contexts of results, checks of row numbers, and chains of operations. ``cases`` has the single calls."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.enums import Op
from tests.support import relative_error


def test_views_are_read_back_without_a_copy(devices, rng):
    x = rng.standard_normal((3, 4)).astype(np.float32)
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (3, 4))
        ctx.alloc(devices[0])
        t.set(x)
        view = ggml.transpose(t)
        with ggml.Scheduler(devices) as s, ggml.Graph(ggml.cont(view)) as g:
            s.alloc(g)
            s.compute()
            np.testing.assert_array_equal(view.numpy(), x.T)
            with pytest.raises(ValueError, match="not contiguous"):
                view.set(x.T)


def test_a_cache_keeps_the_rows_that_are_written_to_it(devices, rng):
    """Write rows into a cache with memory of its own."""
    new = rng.standard_normal((3, 32))
    with ggml.Context() as ctx:
        cache = ctx.new_tensor("f16", (8, 32))
        ctx.alloc(devices[0], [cache])
        b, rows = ctx.new_tensor("f32", (3, 32)), ctx.new_tensor("i64", (3,))
        with ggml.Scheduler(devices) as s, ggml.Graph(ggml.set_rows(cache, b, rows)) as g:
            s.alloc(g)
            b.set(new)
            rows.set([6, 1, 2])
            s.compute()
        want = np.zeros((8, 32))
        want[[6, 1, 2]] = new
        assert relative_error(cache.numpy(), want) < 1e-3


def test_argsort_of_scores_chooses_experts(devices, rng):
    """Compute a mixture of experts, with the results of argsort as numbers of matrices and rows."""
    n_tokens, n_experts, n_used, n = 5, 8, 2, 32
    scores, x = rng.standard_normal((n_tokens, n_experts)), rng.standard_normal((n_tokens, 1, n))
    w, bias = rng.standard_normal((n_experts, n, n)), rng.standard_normal((n_experts, n))
    with ggml.Context() as ctx:
        inputs = {ctx.new_tensor("f32", values.shape): values for values in (scores, x, w, bias)}
        router, t, experts, biases = inputs
        chosen = ggml.argsort_top_k(router, n_used)
        out = ggml.add_id(ggml.mul_mat_id(experts, t, chosen), biases, chosen)
        weights = ggml.get_rows(ggml.reshape(ggml.soft_max(router), (n_tokens, n_experts, 1)), chosen)
        with ggml.Scheduler(devices) as s, ggml.Graph(ggml.mul(out, weights)) as g:
            s.alloc(g)
            for tensor, values in inputs.items():
                tensor.set(values)
            s.compute()
            got = g.outputs[0].numpy()
    ids = np.argsort(-scores, -1)[:, :n_used]
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = (np.einsum("tx,teyx->tey", x[:, 0], w[ids]) + bias[ids]) * np.take_along_axis(p, ids, -1)[..., None]
    assert relative_error(got, want) < 5e-3


def test_views_of_results_of_argsort_can_be_row_numbers():
    with ggml.Context() as ctx:
        table, scores = ctx.new_tensor("f32", (6, 4)), ctx.new_tensor("f32", (3, 6))
        for numbers in (
            ggml.argmax(scores),
            ggml.reshape(ggml.argsort(scores), (18,)),
            ggml.cont(ggml.transpose(ggml.argsort(scores)), (18,)),
        ):
            assert ggml.get_rows(table, numbers).shape == (*numbers.shape, 4)
        with pytest.raises(ValueError, match="exceed the 5 rows"):
            ggml.get_rows(ctx.new_tensor("f32", (5, 4)), ggml.argmax(scores))
        changed = ggml.set(ggml.argsort(scores), ctx.new_tensor("i32", (3, 2)))
        with pytest.raises(ValueError, match="must be an input tensor"):
            ggml.get_rows(table, ggml.reshape(changed, (18,)))


def test_a_tensor_can_stand_for_its_shape():
    with ggml.Context() as ctx:
        a, b = ctx.new_tensor("f32", (2, 6)), ctx.new_tensor("f16", (4, 1, 3))
        assert ggml.reshape(a, b).shape == (4, 1, 3)
        assert ggml.repeat(ctx.new_tensor("f32", (3,)), b).shape == (4, 1, 3)


def test_row_numbers_are_checked_when_they_are_set(devices):
    with ggml.Context() as ctx:
        table, rows = ctx.new_tensor("f32", (10, 4)), ctx.new_tensor("i32", (2,))
        ctx.alloc("CPU", [rows])
        rows.set([0, 10])
        for _ in range(2):
            with pytest.raises(ValueError, match="a tensor with 10 rows, but got values from 0 to 10"):
                ggml.get_rows(table, rows)
        rows.set([0, 9])
        got = ggml.get_rows(table, rows)
        for wrong in ([0, 10], [-1, 0]):
            with pytest.raises(ValueError, match="10 rows"):
                rows.set(wrong)
        with pytest.raises(ValueError, match="10 rows"):
            rows.set_bytes(np.array([0, 2**30], np.int32))
        with pytest.raises(ValueError, match="read-only"):
            rows.numpy(copy=False)[0] = 10
        assert got.shape == (2, 4)


def test_row_numbers_are_read_once_for_each_limit(monkeypatch):
    """A model refers to the same input in each layer, and a read waits for the device."""
    reads, real = [], ggml.Tensor.numpy
    with ggml.Context() as ctx:
        large, small = ctx.new_tensor("f32", (10, 4)), ctx.new_tensor("f32", (5, 4))
        rows = ctx.new_tensor("i32", (2,))
        ctx.alloc("CPU", [rows])
        monkeypatch.setattr(ggml.Tensor, "numpy", lambda self: (reads.append(self), real(self))[1])
        for table in (large, large, small, large, small):
            ggml.get_rows(table, rows)
        assert len(reads) == 2
        with pytest.raises(ValueError, match="a tensor with 5 rows"):
            rows.set([0, 5])


def test_views_of_inputs_can_be_row_numbers(devices, rng):
    """Check the whole input behind a view, not only the part that the view shows."""
    values = rng.standard_normal((6, 4)).astype(np.float32)
    with ggml.Context() as weights, ggml.Context() as ctx, ggml.Scheduler(devices) as s:
        table, rows = ctx.new_tensor("f32", (6, 4)), weights.new_tensor("i32", (2, 3))
        part = ggml.view(rows, (2,), offset=4, ctx=ctx)
        with ggml.Graph(ggml.get_rows(table, part)) as g:
            s.alloc(g)
            table.set(values)
            rows.set([[0, 5, 2], [1, 1, 1]])
            s.compute()
            np.testing.assert_array_equal(g.outputs[0].numpy(), values[[5, 2]])
            with pytest.raises(ValueError, match="6 rows"):
                rows.set([[0, 1, 2], [3, 4, 6]])
            with pytest.raises(ValueError, match="6 rows"):
                part.set([6, 0])
            with pytest.raises(ValueError, match="a tensor with 3 rows"):
                ggml.get_rows(ctx.new_tensor("f32", (3, 4)), part)


def test_results_belong_to_the_youngest_context():
    with ggml.Context() as old, ggml.Context() as young:
        w, x = old.new_tensor("f32", (4, 4)), young.new_tensor("f32", (4, 4))
        assert ggml.add(w, x).context is young
        assert ggml.add(x, w).context is young
        assert ggml.relu(w).context is old
        assert ggml.relu(w, ctx=young).context is young
        assert ggml.relu(w).op is Op.UNARY


def test_operands_must_be_tensors():
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (2,))
        with pytest.raises(TypeError, match="add: a Tensor is needed, not float"):
            ggml.add(t, 1.0)
        with pytest.raises(TypeError, match="a Tensor is needed, not ndarray"):
            ggml.mul_mat(np.zeros((2, 2)), t)


def test_attention_of_few_axes_returns_three_axes():
    # The result always has the axes (tokens, heads, size), also if the operands have fewer.
    with ggml.Context() as ctx:
        q, k, v = ctx.new_tensor("f32", (2, 32)), ctx.new_tensor("f16", (3, 32)), ctx.new_tensor("f16", (3, 64))
        out = ggml.flash_attn_ext(q, k, v, scale=1.0)
        assert out.shape == (2, 1, 64)
        assert out.size == 128


@pytest.mark.parametrize("name", ["conv_2d", "conv_2d_direct"])
def test_convolutions_take_the_image_first_as_torch_does(devices, name, rng):
    """Image and kernel of one shape: a wrong order would go unnoticed."""
    x, kernel = rng.standard_normal((2, 3, 3, 3, 3))[:, :3]
    want = np.einsum("nchw,ochw->no", x, kernel)[..., None, None]
    with ggml.Session(devices) as s:
        got = s.compile(lambda x, kernel: getattr(ggml, name)(x, kernel))(x, kernel)
    assert got.shape == want.shape
    assert relative_error(got, want) < 5e-3
