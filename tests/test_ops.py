"""Operations against numpy in float64, and the errors that stand where ggml would abort."""

import math

import numpy as np
import pytest
from conftest import relative_error

import ggml_cffi as ggml
from ggml_cffi.enums import Op

#: Relative error allowed by the type of the operands.
TOLERANCE = {ggml.F32: 1e-5, ggml.F16: 2e-3, ggml.BF16: 1e-2, ggml.Q8_0: 1e-2, ggml.Q4_1: 1e-2, ggml.Q4_K: 1e-2}


class Bench:
    """Runs one operation on some devices."""

    def __init__(self, devices):
        self.devices = devices
        self.ctx = ggml.Context()
        self.values = {}

    def tensor(self, values, dtype=ggml.F32):
        t = self.ctx.new_tensor(dtype, values.shape)
        self.values[t] = values
        return t

    def weight(self, values, dtype):
        """A weight on the last device, and its values as the type rounds them."""
        t = self.ctx.new_tensor(dtype, values.shape)
        self.ctx.alloc(self.devices[-1], [t], usage=ggml.Usage.WEIGHTS)
        t.set(values)
        return t, t.numpy().astype(np.float64)

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


def silu(x):
    return x / (1 + np.exp(-x))


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shapes", [((5,), (5,)), ((3, 7), (7,)), ((2, 3, 4, 5), (3, 1, 5)), ((4, 6), (2, 3))], ids=str)
def test_binary(bench, name, shapes, rng):
    a, b = rng.standard_normal(shapes[0]), rng.uniform(1, 2, shapes[1])
    got = bench.run(getattr(ggml, name)(bench.tensor(a), bench.tensor(b)))
    ne = [(1,) * (4 - v.ndim) + v.shape for v in (a, b)]
    repeated = np.tile(b.reshape(ne[1]), [m // n for m, n in zip(*ne, strict=True)])
    want = BINARY[name](a.reshape(ne[0]), repeated).reshape(a.shape)
    assert got.shape == a.shape
    assert relative_error(got, want) < TOLERANCE[ggml.F32]


@pytest.mark.parametrize("dtype", [ggml.F16, ggml.BF16], ids=lambda t: t.name)
def test_binary_in_half_precision(bench, dtype, rng):
    a, b = rng.standard_normal((4, 32)), rng.standard_normal((4, 32))
    got = bench.run(ggml.add(bench.tensor(a, dtype), bench.tensor(b, dtype)))
    assert relative_error(got, a + b) < TOLERANCE[dtype]


def erf(x):
    return np.vectorize(math.erf)(x)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": silu,
    "gelu": gelu,
    "gelu_erf": lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
    "gelu_quick": lambda x: x * sigmoid(1.702 * x),
}
UNARY = ACTIVATIONS | {
    "sqr": np.square,
    "sqrt": np.sqrt,
    "log": np.log,
    "exp": np.exp,
    "expm1": np.expm1,
    "sin": np.sin,
    "cos": np.cos,
    "abs": np.abs,
    "sgn": np.sign,
    "neg": np.negative,
    "step": lambda x: (x > 0) * 1.0,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
    "trunc": np.trunc,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "rms_norm": lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6),
    "norm": lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "sum": np.sum,
    "sum_rows": lambda x: x.sum(-1, keepdims=True),
    "mean": lambda x: x.mean(-1, keepdims=True),
    "cumsum": lambda x: x.cumsum(-1),
    "cont": lambda x: x,
}


def draw(name, shape, rng):
    return rng.uniform(0.1, 4, shape) if name in ("log", "sqrt") else 2 * rng.standard_normal(shape)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("shape", [(33,), (4, 64), (2, 3, 2, 17)], ids=str)
def test_unary(bench, name, shape, rng):
    x = draw(name, shape, rng)
    got = bench.run(getattr(ggml, name)(bench.tensor(x)))
    want = UNARY[name](x.astype(np.float32).astype(np.float64))
    assert got.shape == want.shape
    # The CPU's gelus look values up in a half-precision table.
    assert relative_error(got, want) < (1e-3 if "gelu" in name else TOLERANCE[ggml.F32])


@pytest.mark.parametrize("name", sorted(set(UNARY) - {"rms_norm", "norm", "sum", "sum_rows", "mean", "cumsum", "cont"}))
def test_unary_in_half_precision(bench, name, rng):
    x = draw(name, (3, 32), rng).astype(np.float16)
    got = bench.run(getattr(ggml, name)(bench.tensor(x, ggml.F16)))
    assert got.dtype == np.float16
    assert relative_error(got, UNARY[name](x.astype(np.float64))) < TOLERANCE[ggml.F16]


@pytest.mark.parametrize("name", sorted(n for n in ggml.ops.__all__ if n.endswith("_inplace")))
def test_in_place(bench, name, rng):
    """The result is right, and is a view of the operand."""
    plain = name.removesuffix("_inplace")
    x = draw(plain, (3, 32), rng).astype(np.float32)
    operand = ggml.scale(bench.tensor(x), 1.0)  # computed, so that the input itself stays
    if plain == "scale":
        result, want = ggml.scale_inplace(operand, 3.0), 3.0 * x
    elif plain in BINARY:
        y = rng.uniform(1, 2, (1, 32)).astype(np.float32)
        result, want = getattr(ggml, name)(operand, bench.tensor(y)), BINARY[plain](x, y)
    else:
        result, want = getattr(ggml, name)(operand), UNARY[plain](x.astype(np.float64))
    assert result.ptr.view_src == operand.ptr
    assert relative_error(bench.run(result), want) < (1e-3 if "gelu" in name else TOLERANCE[ggml.F32])


GATED = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu", "geglu_erf": "gelu_erf", "geglu_quick": "gelu_quick"}


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("dtype", [ggml.F32, ggml.F16], ids=lambda t: t.name)
def test_gated_units(bench, name, dtype, rng):
    f = ACTIVATIONS[GATED[name]]
    both = rng.standard_normal((4, 64)).astype(np.float16)
    x, y = both[:, :32].astype(np.float64), both[:, 32:].astype(np.float64)
    t, left, right = bench.tensor(both, dtype), bench.tensor(x, dtype), bench.tensor(y, dtype)
    got = bench.run(
        getattr(ggml, name)(t), getattr(ggml, f"{name}_swapped")(t), getattr(ggml, f"{name}_split")(left, right)
    )
    for result, want in zip(got, (f(x) * y, x * f(y), f(x) * y), strict=True):
        assert result.shape == (4, 32)
        assert relative_error(result, want) < max(TOLERANCE[dtype], 1e-3)


def test_swiglu_oai(bench, rng):
    x, y = 3 * rng.standard_normal((2, 32)), 3 * rng.standard_normal((2, 32))
    got = bench.run(ggml.swiglu_oai(bench.tensor(x), bench.tensor(y), 1.7, 2.0))
    low = np.minimum(x, 2.0)
    assert relative_error(got, low * sigmoid(1.7 * low) * (1 + np.clip(y, -2, 2))) < TOLERANCE[ggml.F32]


def test_clamp_and_scale_bias(bench, rng):
    x = rng.standard_normal((3, 32))
    t = bench.tensor(x)
    clamped, scaled = bench.run(ggml.clamp(ggml.scale(t, 1.0), -0.5, 1.0), ggml.scale_bias(t, 2.0, -1.0))
    assert relative_error(clamped, np.clip(x, -0.5, 1)) < TOLERANCE[ggml.F32]
    assert relative_error(scaled, 2 * x - 1) < TOLERANCE[ggml.F32]


@pytest.mark.parametrize("shape", [(1, 5), (7, 33), (12,)], ids=str)
def test_argmax(bench, shape, rng):
    x = rng.standard_normal(shape)
    got = bench.run(ggml.argmax(bench.tensor(x)))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, x.argmax(-1))


@pytest.mark.parametrize("shapes", [((3,), (6,)), ((3,), (2, 3)), ((2, 1, 3), (2, 2, 4, 6))], ids=str)
def test_repeat(bench, shapes, rng):
    small, large = shapes
    x = rng.standard_normal(small)
    padded = (1,) * (len(large) - len(small)) + small
    want = np.tile(x, [m // n for m, n in zip(large, padded, strict=True)])
    got = bench.run(ggml.repeat(bench.tensor(x), large))
    assert got.shape == large
    assert relative_error(got, want) < TOLERANCE[ggml.F32]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_concat(bench, axis, rng):
    a = rng.standard_normal((2, 3, 4))
    b = rng.standard_normal([5 if i == axis % 3 else n for i, n in enumerate(a.shape)])
    got = bench.run(ggml.concat(bench.tensor(a), bench.tensor(b), axis))
    assert relative_error(got, np.concatenate([a, b], axis)) < TOLERANCE[ggml.F32]


def test_scale_and_swiglu(bench, rng):
    a, b = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 3, 8))
    x, y = bench.tensor(a), bench.tensor(b)
    scaled, gated = bench.run(ggml.scale(x, -2.5), ggml.swiglu_split(x, y))
    assert relative_error(scaled, -2.5 * a) < TOLERANCE[ggml.F32]
    assert relative_error(gated, silu(a) * b) < TOLERANCE[ggml.F32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: t.name)
@pytest.mark.parametrize("sizes", [(1, 16, 256), (9, 33, 512)], ids=str)
def test_products(bench, dtype, sizes, rng):
    m, n, k = sizes
    x = rng.standard_normal((m, k))
    w, rounded = bench.weight(rng.standard_normal((n, k)), dtype)
    bias = rng.standard_normal(n)
    got = bench.run(ggml.linear(bench.tensor(x), w, bench.tensor(bias)))
    assert got.shape == (m, n)
    assert got.dtype == np.float32
    # Backends may round the operands to half precision, or to 8 bits beside quantized weights, and add up in F16.
    assert relative_error(got, x @ rounded.T + bias) < max(TOLERANCE[dtype], 5e-3)


def test_products_with_sums_in_f32(bench, rng):
    x = rng.standard_normal((9, 512))
    w, rounded = bench.weight(rng.standard_normal((33, 512)), ggml.F16)
    got = bench.run(ggml.mul_mat(w, bench.tensor(x), prec=ggml.Prec.F32))
    assert relative_error(got, x @ rounded.T) < 1e-3


def test_products_with_leading_axes(bench, rng):
    a, b = rng.standard_normal((2, 5, 32)), rng.standard_normal((3, 4, 7, 32))
    got = bench.run(ggml.mul_mat(bench.tensor(a), bench.tensor(b)))
    want = np.einsum("bcmk,bcnk->bcmn", b, np.repeat(np.broadcast_to(a, (3, 2, 5, 32)), 2, axis=1))
    assert got.shape == (3, 4, 7, 5)
    assert relative_error(got, want) < 1e-3


def test_a_vector_gives_a_vector(bench, rng):
    w, x = rng.standard_normal((6, 32)), rng.standard_normal(32)
    got = bench.run(ggml.linear(bench.tensor(x), bench.tensor(w)))
    assert got.shape == (6,)
    assert relative_error(got, w @ x) < 1e-3


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1), (-1, 1, 0)], ids=str)
def test_shapes(bench, axes, rng):
    x = rng.standard_normal((2, 3, 4))
    t = bench.tensor(x)
    outputs = [
        ggml.cont(ggml.permute(t, axes)),
        ggml.cont(ggml.transpose(t)),
        ggml.cont(ggml.reshape(t, (4, -1))),
        ggml.cont(ggml.view(t, (2, 2), strides=(48, 4), offset=16)),
        ggml.cast(t, "f16"),
    ]
    got = bench.run(*outputs)
    wants = [x.transpose(axes), x.swapaxes(1, 2), x.reshape(4, 6), x[:, 1, :2], x]
    for result, want in zip(got, wants, strict=True):
        assert result.shape == want.shape
        assert relative_error(result, want) < 1e-3


def test_views_without_a_copy_read_back(devices, rng):
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


@pytest.mark.parametrize("dtype", [ggml.F32, ggml.F16, ggml.Q8_0, ggml.Q4_1], ids=lambda t: t.name)
def test_rows(bench, dtype, rng):
    table, rounded = bench.weight(rng.standard_normal((10, 64)), dtype)
    numbers = np.array([3, 0, 9, 3], np.int32)
    got = bench.run(ggml.get_rows(table, bench.tensor(numbers, ggml.I32)))
    assert relative_error(got, rounded[numbers]) < 1e-3


@pytest.mark.parametrize("dtype", [ggml.F32, ggml.F16], ids=lambda t: t.name)
def test_written_rows(devices, dtype, rng):
    new = rng.standard_normal((3, 32))
    with ggml.Context() as ctx:
        cache = ctx.new_tensor(dtype, (8, 32))
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


def test_row_numbers_are_checked_when_they_are_set(devices):
    with ggml.Context() as ctx:
        table, rows = ctx.new_tensor("f32", (10, 4)), ctx.new_tensor("i32", (2,))
        ctx.alloc("CPU", [rows])
        rows.set([0, 10])
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
        with pytest.raises(ValueError, match="must be an input tensor"):
            ggml.get_rows(table, ggml.reshape(rows, (2,)))
        assert got.shape == (2, 4)


def rope(x, positions, n_dims, base, neox):
    out = x.copy()
    angle = positions[:, None] * base ** (-2 * np.arange(n_dims // 2) / n_dims)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = (
        (slice(0, n_dims // 2), slice(n_dims // 2, n_dims)) if neox else (slice(0, n_dims, 2), slice(1, n_dims, 2))
    )
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


@pytest.mark.parametrize("mode", ggml.RopeMode, ids=lambda m: m.name)
@pytest.mark.parametrize("n_dims", [32, 16])
def test_rope(bench, mode, n_dims, rng):
    x, positions = rng.standard_normal((5, 3, 32)), np.array([0, 1, 7, 100, 999], np.int32)
    got = bench.run(
        ggml.rope_ext(bench.tensor(x), bench.tensor(positions, ggml.I32), n_dims=n_dims, mode=mode, freq_base=1e4)
    )
    assert relative_error(got, rope(x, positions, n_dims, 1e4, mode == ggml.RopeMode.NEOX)) < 1e-4


def test_soft_max(bench, rng):
    x, mask = rng.standard_normal((3, 5, 8)), np.triu(np.full((5, 8), -np.inf), 1)
    got = bench.run(ggml.soft_max_ext(bench.tensor(x), bench.tensor(mask), scale=0.5))
    e = np.exp(0.5 * x + mask)
    assert relative_error(got, e / e.sum(-1, keepdims=True)) < TOLERANCE[ggml.F32]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_attention(bench, heads, n, rng):
    h, kv = heads
    q, k, v = rng.standard_normal((h, n, 64)), rng.standard_normal((kv, 256, 64)), rng.standard_normal((kv, 256, 64))
    mask = np.where(np.arange(256) <= 200 + np.arange(n)[:, None], 0.0, -np.inf)
    tk, tv = (bench.tensor(x, ggml.F16) for x in (k, v))
    got = bench.run(ggml.flash_attn_ext(bench.tensor(q), tk, tv, bench.tensor(mask, ggml.F16), scale=0.125))
    scores = np.einsum("hnd,hkd->hnk", q, np.repeat(k, h // kv, 0)) * 0.125 + mask
    p = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("hnk,hkd->nhd", p / p.sum(-1, keepdims=True), np.repeat(v, h // kv, 0))
    assert got.shape == (n, h, 64)
    assert relative_error(got, want) < 3e-3


def test_results_live_in_the_youngest_context():
    with ggml.Context() as old, ggml.Context() as young:
        w, x = old.new_tensor("f32", (4, 4)), young.new_tensor("f32", (4, 4))
        assert ggml.add(w, x).context is young
        assert ggml.add(x, w).context is young
        assert ggml.relu(w).context is old
        assert ggml.relu(w, ctx=young).context is young
        assert ggml.relu(w).op is Op.UNARY


WRONG = {
    "mul_mat: inner sizes differ: a (32, 64) F32 · b (8, 63) F32": lambda t: ggml.mul_mat(t(32, 64), t(8, 63)),
    "leading sizes of b must be multiples": lambda t: ggml.mul_mat(t(2, 4, 8), t(3, 4, 8)),
    "mul_mat: the rows of a and b must be contiguous": lambda t: ggml.mul_mat(ggml.transpose(t(8, 4)), t(3, 8)),
    "the rows of a and b must be contiguous (use cont): a (4, 8) F32 · b (3, 8)": lambda t: ggml.mul_mat(
        t(4, 8), ggml.transpose(t(8, 3))
    ),
    "add: the rows of a must be contiguous": lambda t: ggml.add(ggml.transpose(t(8, 4)), t(8)),
    "add: the rows of a and b": lambda t: ggml.add(t(32, 32, dtype="q4_0"), ggml.transpose(t(32, 32))),
    "rms_norm: a must be F32 with contiguous rows": lambda t: ggml.rms_norm(ggml.transpose(t(1, 4))),
    "cast: Q8_1 is a format inside": lambda t: ggml.cast(t(32), "q8_1"),
    "mul_mat: a must be a float or quantized": lambda t: ggml.mul_mat(t(4, 8, dtype="i32"), t(3, 8)),
    "add: b does not broadcast to a": lambda t: ggml.add(t(3, 4), t(2, 4)),
    "add: b does not broadcast": lambda t: ggml.add(t(4), t(3, 4)),
    "mul: types must be equal floats": lambda t: ggml.mul(t(4, dtype="i32"), t(4, dtype="i32")),
    "sub: types must be equal floats": lambda t: ggml.sub(t(4), t(4, dtype="f16")),
    "add: a quantized a takes an F32 b": lambda t: ggml.add(t(32, dtype="q4_0"), t(1)),
    "relu: a must be one of BF16, F16, F32": lambda t: ggml.relu(t(4, dtype="i32")),
    "silu: a must be one of F16, F32": lambda t: ggml.silu(t(4, dtype="bf16")),
    "gelu: a must be one of F16, F32": lambda t: ggml.gelu(t(4, dtype="bf16")),
    "relu: the rows of a must be contiguous": lambda t: ggml.relu(ggml.transpose(t(4, 5))),
    "scale: a must be contiguous F32": lambda t: ggml.scale(ggml.transpose(t(4, 5)), 2.0),
    "swiglu_split: x and y must have one shape": lambda t: ggml.swiglu_split(t(4), t(5)),
    "swiglu_split: x and y must be contiguous": lambda t: ggml.swiglu_split(
        ggml.transpose(t(4, 5)), ggml.transpose(t(4, 5))
    ),
    "rms_norm: a must be F32": lambda t: ggml.rms_norm(t(4, dtype="f16")),
    "rms_norm: eps must be at least 0": lambda t: ggml.rms_norm(t(4), -1.0),
    "norm: eps must be at least 0, not nan": lambda t: ggml.norm(t(4), float("nan")),
    "swiglu: a must be F32 or F16 with an even last size": lambda t: ggml.swiglu(t(5)),
    "swiglu: a must be contiguous": lambda t: ggml.swiglu(ggml.transpose(t(4, 6))),
    "swiglu_oai: x and y must be F32": lambda t: ggml.swiglu_oai(t(4, dtype="f16"), t(4, dtype="f16"), 1, 1),
    "scale_bias: a must be contiguous F32": lambda t: ggml.scale_bias(t(4, dtype="f16"), 1, 1),
    "scale_inplace: a must be contiguous F32": lambda t: ggml.scale_inplace(t(4, dtype="f16"), 1),
    "leaky_relu: a must be contiguous F32 or F16": lambda t: ggml.leaky_relu(ggml.transpose(t(4, 5))),
    "clamp: low 2 is above high 1": lambda t: ggml.clamp(t(4), 2, 1),
    "clamp: low nan": lambda t: ggml.clamp(t(4), float("nan"), 1),
    "sum: a must be F32": lambda t: ggml.sum(t(4, dtype="f16")),
    "mean: a must be F32": lambda t: ggml.mean(ggml.transpose(t(4, 5))),
    "cumsum: a must be F32": lambda t: ggml.cumsum(t(4, dtype="i32")),
    "argmax: a must be an F32 matrix": lambda t: ggml.argmax(t(2, 3, 4)),
    "repeat: (5,) is no multiple": lambda t: ggml.repeat(t(2), (5,)),
    "repeat: (4,) is no multiple": lambda t: ggml.repeat(t(1, 2), (4,)),
    "repeat: a must be F32, F16": lambda t: ggml.repeat(t(32, dtype="q4_0"), (64,)),
    "concat: a and b must have as many axes, 0": lambda t: ggml.concat(t(2), t(2, 2)),
    "concat: a and b must have as many axes, 1": lambda t: ggml.concat(t(2), t(2), 1),
    "concat: a and b must be of one type": lambda t: ggml.concat(t(2), t(2, dtype="f16")),
    "concat: a and b differ in more than axis 0": lambda t: ggml.concat(t(2, 3), t(2, 4)),
    "reshape: (5,) has another number": lambda t: ggml.reshape(t(4), (5,)),
    "reshape: (3, -1) has another number": lambda t: ggml.reshape(t(4), (3, -1)),
    "reshape: a must be contiguous": lambda t: ggml.reshape(ggml.transpose(t(4, 5)), (20,)),
    "reshape: rows of 16 are no whole blocks": lambda t: ggml.reshape(t(32, dtype="q4_0"), (2, 16)),
    "permute: (0, 0) is no permutation": lambda t: ggml.permute(t(4, 5), (0, 0)),
    "permute: (1, 0) is no permutation": lambda t: ggml.permute(t(4), (1, 0)),
    "transpose: a must have at least two axes": lambda t: ggml.transpose(t(4)),
    "view: bytes 0 to 20": lambda t: ggml.view(t(4), (5,)),
    "view: bytes 16 to 20": lambda t: ggml.view(t(4), (1,), offset=16),
    "view: bytes 2 to 6": lambda t: ggml.view(t(4), (1,), offset=2),
    "view: bytes -4": lambda t: ggml.view(t(4), (1,), offset=-4),
    "view: strides (16,) do not fit": lambda t: ggml.view(t(4), (2, 2), strides=(16,)),
    "view: the last axis must be contiguous": lambda t: ggml.view(t(8), (2, 2), strides=(16, 8)),
    "view: strides (6, 4) are no multiples": lambda t: ggml.view(t(8), (2, 1), strides=(6, 4)),
    "view: bytes 0 to 1000": lambda t: ggml.view(t(8), (2, 1), strides=(996, 4)),
    "cont: only F32": lambda t: ggml.cont(ggml.transpose(t(2, 32, dtype="f64"))),
    "cast: there is no conversion to I32": lambda t: ggml.cast(t(4), "i32"),
    "cast: rows of 4 are no whole blocks": lambda t: ggml.cast(t(4), "q4_0"),
    "get_rows: rows must be I32": lambda t: ggml.get_rows(t(4, 4), t(2)),
    "get_rows: the leading sizes": lambda t: ggml.get_rows(t(2, 4, 4), t(2, dtype="i32")),
    "set_rows: a and b differ": lambda t: ggml.set_rows(t(4, 4), t(2, 5), t(2, dtype="i64")),
    "set_rows: one row number per row": lambda t: ggml.set_rows(t(4, 4), t(2, 4), t(3, dtype="i64")),
    "set_rows: b must be F32": lambda t: ggml.set_rows(t(4, 4), t(2, 4, dtype="f16"), t(2, dtype="i64")),
    "rope_ext: positions must be I32 of shape (5,)": lambda t: ggml.rope_ext(t(5, 2, 8), t(4, dtype="i32"), n_dims=8),
    "rope_ext: n_dims must be even": lambda t: ggml.rope_ext(t(5, 2, 8), t(5, dtype="i32"), n_dims=7),
    "rope_ext: n_dims must be even and 2 to": lambda t: ggml.rope_ext(t(5, 2, 8), t(5, dtype="i32"), n_dims=10),
    "rope_ext: freq_base": lambda t: ggml.rope_ext(t(5, 2, 8), t(5, dtype="i32"), n_dims=8, freq_base=0),
    "freq_factors must be F32": lambda t: ggml.rope_ext(t(5, 2, 8), t(5, dtype="i32"), t(3), n_dims=8),
    "soft_max_ext: a must be contiguous F32": lambda t: ggml.soft_max_ext(t(4, dtype="f16")),
    "soft_max_ext: the mask does not fit": lambda t: ggml.soft_max_ext(t(4, 4), t(4, 5)),
    "soft_max_ext: max_bias needs a mask": lambda t: ggml.soft_max_ext(t(4, 4), max_bias=8.0),
    "flash_attn_ext: q, k and v differ": lambda t: ggml.flash_attn_ext(t(2, 1, 8), t(2, 4, 8), t(2, 5, 8), scale=1),
    "flash_attn_ext: the heads of k": lambda t: ggml.flash_attn_ext(t(3, 1, 8), t(2, 4, 8), t(2, 4, 8), scale=1),
    "flash_attn_ext: the mask must be": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), t(1, 4), scale=1
    ),
    "flash_attn_ext: the mask does not fit": lambda t: ggml.flash_attn_ext(
        t(2, 3, 8), t(2, 4, 8), t(2, 4, 8), t(1, 4, dtype="f16"), scale=1
    ),
    "flash_attn_ext: max_bias": lambda t: ggml.flash_attn_ext(t(2, 1, 8), t(2, 4, 8), t(2, 4, 8), scale=1, max_bias=8),
    "flash_attn_ext: k and v must be float": lambda t: ggml.flash_attn_ext(
        t(2, 1, 8), t(2, 4, 8, dtype="i32"), t(2, 4, 8), scale=1
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_operands_name_the_rule(message):
    with ggml.Context() as ctx, pytest.raises(ValueError) as caught:
        WRONG[message](lambda *shape, dtype="f32": ctx.new_tensor(dtype, shape))
    assert message in str(caught.value)


def test_operands_are_tensors():
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (2,))
        with pytest.raises(TypeError, match="add: a Tensor is needed, not float"):
            ggml.add(t, 1.0)
        with pytest.raises(TypeError, match="a Tensor is needed, not ndarray"):
            ggml.mul_mat(np.zeros((2, 2)), t)
