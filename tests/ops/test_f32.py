"""Products with the accuracy of F32, compared with float64: ranges of values, shapes, sessions and several devices."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import Prec, parallel
from ggml_cffi.core.precision import keeps_f32
from ggml_cffi.ops.matmul import sum_in_f32
from tests.support import skip_if_newer_needed

LIMIT = 1e-5


def error(got, x, w):
    """Return the largest error of an element of ``x @ w.T``, relative to the norms of its two rows."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    bound = np.linalg.norm(x, axis=-1)[..., :, None] * np.linalg.norm(w, axis=-1)[..., None, :]
    return np.max(np.abs(got.astype(np.float64) - x @ np.swapaxes(w, -1, -2)) / bound)


def drawn(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def one_bit(rng, *shape):
    """Return numbers that differ in their last bits only, so that roundings do not average out."""
    return (1 + 2.0**-9 + 2.0**-17 + 2.0**-23 * rng.integers(0, 2, shape)).astype(np.float32)


def spread(rng, *shape):
    """Return rows of very different sizes, and columns too."""
    rows = 10.0 ** rng.uniform(-15, 15, (*shape[:-1], 1))
    return (rng.standard_normal(shape) * rows * 10.0 ** rng.uniform(-4, 4, shape[-1])).astype(np.float32)


VALUES = {
    "ordinary": (drawn, drawn),
    "last bits": (one_bit, one_bit),
    "beyond F16": (lambda rng, *shape: drawn(rng, *shape, scale=1e6), drawn),
    "large": (lambda rng, *shape: drawn(rng, *shape, scale=1e20), lambda rng, *shape: drawn(rng, *shape, scale=1e15)),
    "largest": (
        lambda rng, *shape: np.full(shape, 3.3e38, np.float32),
        lambda rng, *shape: one_bit(rng, *shape) * 1e-3,
    ),
    "tiny": (lambda rng, *shape: drawn(rng, *shape, scale=1e-30), lambda rng, *shape: drawn(rng, *shape, scale=1e20)),
    "of all sizes": (spread, spread),
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", [(9, 33, 65), (17, 9, 256), (130, 10, 72)], ids=str)
def test_a_session_of_f32_is_as_accurate_as_f32(devices, values, shape, rng):
    m, n, k = shape
    make_x, make_w = VALUES[values]
    x, w = make_x(rng, m, k), make_w(rng, n, k)
    with ggml.Session(devices, precision="f32") as session:
        weight = session.weight(w)
        for function in (lambda x: ggml.linear(x, weight), lambda x: x @ weight.T):
            got = session.compile(function)(x)
            assert np.isfinite(got).all()
            assert error(got, x, w) <= LIMIT


def test_products_of_weights_alone_are_as_accurate(devices, rng):
    x, w = drawn(rng, 20, 64, scale=1e6), drawn(rng, 12, 64)
    with ggml.Session(devices, precision="f32") as session:
        a, b = session.weight(w), session.weight(x)
        got = session.compile(lambda zero: ggml.add(ggml.mul_mat(a, b), zero))(np.zeros((20, 12), np.float32))
    assert error(got, x, w) <= LIMIT


def test_long_sums_of_positive_numbers_are_as_accurate(devices, rng):
    x, w = np.abs(drawn(rng, 130, 4100)), np.abs(drawn(rng, 6, 4100))
    with ggml.Session(devices, precision="f32") as session:
        for dtype in ("f32", "bf16"):
            weight = session.weight(w, dtype=dtype)
            decoded = session.compile(lambda x, weight=weight: ggml.add(ggml.cast(weight, ggml.F32), x))(
                np.zeros(w.shape)
            )
            assert error(session.compile(lambda x, weight=weight: ggml.linear(x, weight))(x), x, decoded) <= LIMIT


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_weights_of_half_precision_do_not_round_the_other_operand(devices, dtype, rng):
    with ggml.Session(devices) as session:
        weight = session.weight(drawn(rng, 31, 96), dtype=dtype)
        decoded = session.compile(lambda x: ggml.add(ggml.cast(weight, ggml.F32), x))(np.zeros((31, 96)))
        f = session.compile(lambda x: ggml.linear(x, weight, prec=Prec.F32))
        for rows in (1, 8, 9, 20, 128, 129):
            x = drawn(rng, rows, 96, scale=1e6)
            assert error(f(x), x, decoded) <= LIMIT


def test_stacks_of_matrices_are_as_accurate(devices, rng):
    with ggml.Session(devices, precision="f32") as session:
        f = session.compile(lambda x, y: x @ y)
        for left, right in (
            ((3, 4, 7, 32), (1, 4, 32, 5)),
            ((2, 3, 40), (2, 40, 9)),
            ((5, 1, 12), (5, 12, 3)),
            ((1, 11, 24), (24, 9)),
        ):
            x, y = drawn(rng, *left, scale=1e6), drawn(rng, *right)
            assert error(f(x, y), x, np.swapaxes(y, -1, -2)) <= LIMIT


def test_experts_are_as_accurate(devices, rng):
    a, ids = drawn(rng, 4, 12, 64, scale=1e6), rng.permuted(np.tile(np.arange(4), (11, 1)), axis=1)[:, :2]
    with ggml.Session(devices, precision="f32") as session:
        weight = session.weight(a)
        f = session.compile(lambda b, ids: ggml.mul_mat_id(weight, b, ids))
        for n_tokens in (1, 8, 11):
            b, chosen = drawn(rng, n_tokens, 1, 64, scale=1e3), ids[:n_tokens].astype(np.int32)
            with skip_if_newer_needed():
                got = f(b, chosen)
            assert error(got[:, :, None], np.repeat(b, 2, 1)[:, :, None], a[chosen]) <= LIMIT


def test_the_cpu_needs_one_node(rng):
    with ggml.Session(["CPU"], precision="f32") as session:
        weight = session.weight(drawn(rng, 16, 32))
        f = session.compile(lambda x: ggml.linear(x, weight))
        assert [len(f.trace(drawn(rng, rows, 32)).graph) for rows in (1, 100)] == [1, 1]


def test_few_rows_need_one_node_on_a_gpu(devices, rng):
    with ggml.Session(devices, precision="f32") as session:
        weight = session.weight(drawn(rng, 16, 32))
        f = session.compile(lambda x: ggml.linear(x, weight))
        kept = [all(keeps_f32(ggml.device(name), rows, 1) for name in devices) for rows in (1, 8)]
        assert [len(f.trace(drawn(rng, rows, 32)).graph) == 1 for rows in (1, 8)] == kept


def test_batches_of_rows_may_start_anywhere(devices, rng):
    """Compute with rows that begin inside another tensor, with and without gaps after each row."""
    x, w = drawn(rng, 30, 21, scale=1e6), drawn(rng, 7, 21)
    with ggml.Session(devices, precision="f32") as session:
        weight, narrow = session.weight(w), session.weight(w[:, :13])
        got, part = session.compile(lambda x: (x[3:] @ weight.T, ggml.linear(x[3:, :13], narrow)))(x)
    assert error(got, x[3:], w) <= LIMIT
    assert error(part, x[3:, :13], w[:, :13]) <= LIMIT


def test_a_product_may_be_less_precise_than_its_session(rng):
    with ggml.Session(precision="f32") as session, skip_if_newer_needed():
        weight = session.weight(drawn(rng, 16, 32))
        f = session.compile(lambda x: ggml.mul_mat(weight, x, prec=Prec.F16, b_prec=Prec.F16))
        assert len(f.trace(drawn(rng, 100, 32)).graph) == 1


def test_the_precision_may_be_a_number_of_c(devices, rng):
    x, w = drawn(rng, 20, 64, scale=1e6), drawn(rng, 24, 64)
    with ggml.Session(devices) as session:
        weight = session.weight(w)
        assert error(session.compile(lambda x: ggml.mul_mat(weight, x, prec=int(Prec.F32)))(x), x, w) <= LIMIT


def test_empty_operands_need_no_parts(rng):
    with ggml.Session(precision="f32") as session:
        weight = session.weight(np.zeros((0, 32), np.float32))
        assert session.compile(lambda x: ggml.linear(x, weight))(drawn(rng, 20, 32)).shape == (20, 0)


def test_a_plan_counts_the_parts(rng):
    """Compare with the bytes that the same function takes with the default precision."""
    x = drawn(rng, 200, 256)

    def make(session):
        weight = session.weight(drawn(rng, 128, 256))
        return session.compile(lambda x: ggml.linear(x, weight))

    plain, exact = (ggml.plan(make, x, precision=precision) for precision in ("default", "f32"))
    taken = [sum(device.compute_bytes for device in made.devices) for made in (plain, exact)]
    same = all(d.is_cpu for d in ggml.devices())
    assert taken[0] == taken[1] if same else taken[0] < taken[1]
    with pytest.raises(ValueError, match="precision must be"):
        ggml.plan(make, x, precision="f64")


@pytest.mark.parametrize("rows", [20, 130])
def test_gradients_are_as_accurate(devices, rows, rng):
    x, w, out = drawn(rng, rows, 40, scale=1e6), drawn(rng, 12, 40), drawn(rng, rows, 12)
    for precision, prec in (("f32", Prec.DEFAULT), ("default", Prec.F32)):
        with ggml.Session(devices, precision=precision) as session:

            def step(x, w, out, prec=prec):
                loss = ggml.sum(ggml.mul(ggml.mul_mat(w, x, prec=prec), out))
                return ggml.gradients(loss, [w, x])

            of_w, of_x = session.compile(step)(x, w, out)
            assert error(of_w, out.T, x.T) <= LIMIT
            assert error(of_x, out, w.T) <= LIMIT


def test_ranks_are_as_accurate(devices, rng):
    x, up, down = drawn(rng, 130, 32, scale=1e6), drawn(rng, 48, 32), drawn(rng, 10, 48)
    with parallel.TensorParallel(devices, precision="f32") as group:
        first, second = group.weight(up, parallel.ROWS), group.weight(down, parallel.COLUMNS)
        f = group.compile(lambda rank, x: rank.all_reduce(ggml.linear(ggml.linear(x, first[rank]), second[rank])))
        got = f(x)
    want = x.astype(np.float64) @ up.T.astype(np.float64) @ down.T.astype(np.float64)
    assert np.max(np.abs(got - want)) <= LIMIT * np.max(np.abs(want))


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_sums_in_f32_of_halves_exceed_the_largest_half(devices, rows):
    with ggml.Context() as ctx, ggml.Scheduler(devices) as scheduler:
        k, q = ctx.constant(np.full((2, 48, 64), 60), "f16"), ctx.constant(np.full((2, rows, 64), 60))
        product = sum_in_f32(ggml.mul_mat(k, q))
        assert product.ptr.op_params[0] == Prec.F32
        if ggml.device(devices[0]).is_gpu:
            scheduler.place(product, devices[0])
        with ggml.Graph(product) as graph:
            scheduler.compute(graph)
            assert (product.numpy() == 64 * 60 * 60).all()
