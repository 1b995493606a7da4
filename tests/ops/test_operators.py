"""Operators of tensors, compared with numpy's."""

import operator

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import relative_error

PAIRS = [
    ((3, 4), (3, 4)),
    ((3, 4), (4,)),
    ((4,), (3, 4)),
    ((3, 1), (1, 4)),
    ((2, 1, 4), (3, 1)),
    ((2, 3, 4), ()),
    ((), (2, 3)),
    ((1,), (1,)),
]


class Bench:
    """A context, its input values, and a scheduler over some devices."""

    def __init__(self, devices):
        self.devices = devices
        self.ctx = ggml.Context()
        self.values = {}

    def tensor(self, values, dtype=ggml.F32):
        t = self.ctx.new_tensor(dtype, values.shape)
        self.values[t] = values
        return t

    def run(self, *outputs):
        with ggml.Scheduler(self.devices) as scheduler, ggml.Graph(*outputs) as graph:
            scheduler.alloc(graph)
            for t, values in self.values.items():
                t.set(values)
            scheduler.compute(graph)
            got = [t.numpy() for t in outputs]
        return got if len(got) > 1 else got[0]


@pytest.fixture
def bench(devices):
    made = Bench(devices)
    yield made
    made.ctx.close()


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shapes", PAIRS, ids=str)
def test_arithmetic_broadcasts_both_ways(bench, op, shapes, rng):
    a, b = rng.uniform(1, 2, shapes[0]), rng.uniform(1, 2, shapes[1])
    want = op(a, b)
    x, y = bench.tensor(a), bench.tensor(b)
    for got in bench.run(op(x, y), op(x, b.astype(np.float32)), op(a.astype(np.float32), y)):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv], ids=lambda f: f.__name__)
@pytest.mark.parametrize("number", [2, -0.5, np.float32(3), np.int64(7)], ids=str)
def test_arithmetic_with_numbers(bench, op, number, rng):
    a = rng.uniform(1, 2, (3, 4))
    x = bench.tensor(a)
    got = bench.run(op(x, number), op(number, x), op(x.T, number))
    for result, want in zip(got, (op(a, number), op(number, a), op(a.T, number)), strict=True):
        assert result.shape == want.shape
        assert relative_error(result, want) < 1e-5


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 8), (8, 5)),
        ((8,), (8, 5)),
        ((3, 8), (8,)),
        ((8,), (8,)),
        ((2, 3, 8), (8, 5)),
        ((3, 8), (2, 8, 5)),
        ((2, 1, 3, 8), (4, 8, 5)),
        ((2, 3, 8), (2, 8, 5)),
    ],
    ids=str,
)
def test_matmul_of_vectors_matrices_and_stacks(bench, shapes, rng):
    a, b = rng.standard_normal(shapes[0]), rng.standard_normal(shapes[1])
    x, y = bench.tensor(a), bench.tensor(b)
    for got in bench.run(x @ y, a.astype(np.float32) @ y, x @ b.astype(np.float32)):
        assert got.shape == (a @ b).shape
        assert relative_error(got, a @ b) < 1e-3


def test_matmul_with_a_transposed_weight_makes_no_copy(bench, rng):
    a, w = rng.standard_normal((3, 8)), rng.standard_normal((5, 8))
    y = bench.tensor(a) @ bench.tensor(w).T
    assert y.ptr.src[0].op == 0  # the weight itself
    assert relative_error(bench.run(y), a @ w.T) < 1e-3


KEYS = [
    np.s_[1],
    np.s_[-1],
    np.s_[:, 1],
    np.s_[1, 2],
    np.s_[..., 3],
    np.s_[1, 2, 3],
    np.s_[1:, :2],
    np.s_[::2],
    np.s_[:, ::3, 1:4],
    np.s_[..., -2:],
    np.s_[1:2, ..., :3],
    np.s_[:],
    np.s_[...],
    np.s_[:, -2],
    (),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_returns_views(bench, key, rng):
    a = rng.standard_normal((3, 4, 5))
    part = bench.tensor(a)[key]
    want = a[key]
    assert part.shape == want.shape
    assert relative_error(bench.run(ggml.cont(part) + 0), want) < 1e-6


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (3, IndexError, "index 3 is out of range for axis 0 with size 3"),
        ((0, 0, -6), IndexError, "index -6 is out of range for axis 2"),
        ((0, 0, 0, 0), IndexError, "too many indices for 3 axes"),
        ((..., ...), IndexError, "too many indices"),
        (np.s_[::-1], IndexError, "step -1 on axis 0"),
        (np.s_[..., ::2], IndexError, "step 2 on axis 2"),
        (None, TypeError, "index tensors by integers, slices"),
        ([0, 1], TypeError, "get_rows"),
        (True, TypeError, "index tensors by integers"),
        ("x", TypeError, "integer"),
        (1.0, TypeError, "integer"),
    ],
)
def test_wrong_indices_are_refused(key, error, message):
    with ggml.Context() as ctx, pytest.raises(error, match=message):
        ctx.new_tensor("f32", (3, 4, 5))[key]


def test_indexing_needs_contiguous_rows_and_whole_blocks():
    with ggml.Context() as ctx:
        with pytest.raises(ValueError, match="rows of a must be contiguous"):
            ctx.new_tensor("f32", (3, 4)).T[1:]
        q = ctx.new_tensor("q8_0", (2, 64))
        assert q[1, 32:].shape == (32,)
        with pytest.raises(IndexError, match="not the start of a block of 32"):
            q[0, 16:48]


@pytest.mark.parametrize("name", ["sum", "mean"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -3])
@pytest.mark.parametrize("keepdims", [False, True])
def test_sums_and_means_along_each_axis(bench, name, axis, keepdims, rng):
    a = rng.standard_normal((3, 4, 5)) + 1
    got = bench.run(getattr(bench.tensor(a), name)(axis, keepdims=keepdims))
    want = getattr(a, name)(axis, keepdims=keepdims)
    assert got.shape == want.shape
    assert relative_error(got, want) < 1e-5


def test_reshape_permute_and_transpose(bench, rng):
    a = rng.standard_normal((2, 3, 4))
    x = bench.tensor(a)
    outputs = [x.T, x.reshape(6, 4), x.reshape((4, -1)), x.permute(1, 0, 2), x[0].T, -x]
    wants = [a.T, a.reshape(6, 4), a.reshape(4, -1), a.transpose(1, 0, 2), a[0].T, -a]
    for got, want in zip(bench.run(*(ggml.cont(t) for t in outputs)), wants, strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-6
    assert len(x) == 2


def test_half_precision_with_numbers(bench, rng):
    a = rng.standard_normal((3, 32)).astype(np.float16)
    x = bench.tensor(a, ggml.F16)
    got = bench.run(x * 2 + 1)
    assert got.dtype == np.float16
    assert relative_error(got, a * 2.0 + 1) < 2e-3


def test_arrays_become_constants(bench):
    with pytest.raises(TypeError, match="numbers are needed"):
        bench.ctx.constant(["x"])
    t = bench.ctx.constant([[1, 2], [3, 4]], "i32")
    assert t.dtype is ggml.I32
    x = bench.tensor(np.zeros((2, 2)))
    assert bench.run(x + np.array([10.0, 20.0])).tolist() == [[10, 20], [10, 20]]


def test_wrong_operands_are_refused():
    with ggml.Context() as ctx:
        a, b = ctx.new_tensor("f32", (2, 3)), ctx.new_tensor("f32", (2,))
        with pytest.raises(ValueError, match="do not broadcast by numpy's rules"):
            a + b
        with pytest.raises(ValueError, match="matmul: inner sizes differ"):
            a @ b
        with pytest.raises(ValueError, match="stacks do not broadcast"):
            ctx.new_tensor("f32", (2, 2, 2)) @ ctx.new_tensor("f32", (3, 2, 2))
        with pytest.raises(ValueError, match="must have axes"):
            a @ 2.0
        for wrong in ("x", None, object()):
            with pytest.raises(TypeError, match="unsupported operand"):
                a + wrong
        with pytest.raises(TypeError, match="no truth value"):
            bool(a)
        with pytest.raises(TypeError, match="not iterable"):
            list(a)
        with pytest.raises(TypeError, match="no length"):
            len(ctx.new_tensor("f32", ()))
        with pytest.raises(IndexError, match="axis 2 is not one of 2"):
            a.sum(2)
        with pytest.raises(ValueError, match="mean: a must be F32"):
            ctx.new_tensor("i32", (2,)).mean()


def test_views_have_regular_strides_for_axes_of_one_element(bench):
    # ggml treats such views as contiguous, although some of its kernels use the strides.
    a = bench.tensor(np.array([[[-1.0, 2.0]]], np.float32))
    turned = a.permute(2, 1, 0)
    view = ggml.view(a, (2, 1, 1), strides=(4, 400, 4))
    for t in (turned, view):
        assert t.shape == (2, 1, 1)
        assert t.is_contiguous
        assert t.nb == (4, 4, 4, 8)
    assert a.reshape((1, 2)).T.nb == (4, 4, 8, 8)
    got = bench.run(ggml.clamp(turned, 0.0, 1.0))
    np.testing.assert_array_equal(got.ravel(), [0, 1])
