"""Operators of tensors, compared with numpy's."""

import operator
import re

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core.known_names import KNOWN_NAMES
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
    np.s_[None],
    np.s_[:, None],
    np.s_[..., None],
    np.s_[1, None, :, 2:],
    np.s_[None, :, 1, None],
    np.s_[0, 1:, None, ..., None],
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
        ((None, None), IndexError, "the result has 5 axes; ggml has at most 4"),
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


# ---------------------------------------------------------------------- no elements

EMPTY = {
    "add": (lambda x, y: x + y, (0, 1, 4), (0, 3, 4)),
    "add to none": (lambda x, y: x + y, (0, 4), (4,)),
    "subtract from a number": (lambda x, y: 1 - x - y, (0, 1), (1, 3)),
    "divide": (lambda x, y: x / y, (4, 0), (4, 1)),
    "power": (lambda x, y: x**2 + y**1.5, (0, 4), (0, 1)),
    "negative, absolute": (lambda x, y: -x + abs(y), (0, 4), (0, 4)),
    "matmul": (lambda x, y: x @ y, (0, 3), (3, 5)),
    "matmul of no inner elements": (lambda x, y: x @ y, (2, 0), (0, 3)),
    "matmul with a vector": (lambda x, y: x @ y, (0, 4), (4,)),
    "matmul of empty vectors": (lambda x, y: x @ y, (0,), (0,)),
    "matmul of empty stacks": (lambda x, y: x @ y, (0, 2, 3), (0, 3, 5)),
    "sums and means": (lambda x, y: x.sum(1) + x.mean(1) + y.sum(), (0, 4), (0,)),
    "sum of nothing": (lambda x, y: x.sum(0) + y.sum(0, keepdims=True), (0, 4), (0, 4)),
    "mean of nothing": (lambda x, y: x.mean() + y.mean(0), (0, 4), (0, 4)),
    "items": (lambda x, y: x[:, 0] + y[1:1, 2], (0, 4), (3, 4)),
    "a slice of results": (lambda x, y: (x + y)[:, 1:3], (0, 4), (0, 4)),
    "turned results": (lambda x, y: (x + 1).T + (y + 1).transpose(1, 0), (0, 4), (0, 4)),
    "reshaped results": (lambda x, y: (x + 1).reshape(0, 2, 2) + (y * 2).reshape(-1, 2, 2), (0, 4), (0, 4)),
    "new axes": (lambda x, y: x[None] + y[:, None].swapaxes(0, 1), (0, 4), (0, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_operators_take_arrays_without_elements(devices, name):
    function, *shapes = EMPTY[name]
    arrays = [np.ones(shape, np.float32) for shape in shapes]
    want = np.asarray(function(*arrays))
    with ggml.Session(devices) as s:
        got = s.compile(function)(*arrays)
    assert got.shape == want.shape
    np.testing.assert_array_equal(got, want)


def test_tensors_without_elements_have_values():
    with ggml.Session(["CPU"]) as s:
        for t in (s.weight(np.zeros((0, 4), np.float32)), s.zeros((2, 0), "f16")):
            for array in (t.numpy(), t.numpy(copy=False), np.asarray(t), np.from_dlpack(t)):
                assert array.shape == t.shape
            t.set(np.zeros(t.shape))


# ---------------------------------------------------------------------- numpy's other operators


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 7, -1, -2, 0.5, 1.5, -0.25], ids=str)
def test_powers(bench, exponent, rng):
    a = rng.uniform(0.5, 2, (3, 5))
    x = bench.tensor(a)
    got, turned = bench.run(x**exponent + x, x.T**exponent + 0)
    assert relative_error(got, a**exponent + a) < 1e-5
    assert relative_error(turned, a.T**exponent) < 1e-5


def test_powers_of_negative_numbers_of_zero_and_of_tensors(bench, rng):
    a, b = np.array([-2.0, 0.0, 3.0], np.float32), rng.uniform(-2, 2, (2, 3))
    base = rng.uniform(0.5, 2, (3,))
    x, y, z = bench.tensor(a), bench.tensor(b), bench.tensor(base)
    outputs = [x**2, x**3, x**0 + 0, z**y, 2.0**y, base.astype(np.float32) ** y]
    for got, want in zip(bench.run(*outputs), [a**2, a**3, a**0, base**b, 2**b, base**b], strict=True):
        assert relative_error(got, want) < 1e-5
    with pytest.raises(TypeError, match="unsupported operand"):
        x ** "2"


@pytest.mark.parametrize(
    "name",
    [
        "absolute",
        "ceil",
        "cos",
        "exp",
        "expm1",
        "floor",
        "log",
        "negative",
        "sign",
        "sin",
        "sqrt",
        "square",
        "tanh",
        "trunc",
    ],
)
def test_functions_of_numpy(bench, name, rng):
    a = rng.uniform(0.5, 3, (3, 4))
    function = getattr(np, name)
    got = bench.run(function(bench.tensor(a)) + 0)
    assert relative_error(got, function(a)) < 1e-5


def test_maximum_and_minimum_with_a_number(bench, rng):
    a = rng.standard_normal((3, 4))
    x = bench.tensor(a)
    for got, want in zip(
        bench.run(np.maximum(x, 0.5), np.minimum(0.25, x), abs(x)),
        (np.maximum(a, 0.5), np.minimum(a, 0.25), abs(a)),
        strict=True,
    ):
        assert relative_error(got, want) < 1e-6


def test_transpose_and_swapaxes(bench, rng):
    a = rng.standard_normal((2, 3, 4))
    x = bench.tensor(a)
    pairs = [
        (x.transpose(), a.transpose()),
        (x.transpose(1, 0, 2), a.transpose(1, 0, 2)),
        (x.transpose((2, 0, 1)), a.transpose((2, 0, 1))),
        (x.swapaxes(0, -1), a.swapaxes(0, -1)),
    ]
    for got, (_, want) in zip(bench.run(*(ggml.cont(t) for t, _ in pairs)), pairs, strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-6
    with pytest.raises(ValueError, match="not a permutation of the 3 axes"):
        x.transpose(0, 1)
    with pytest.raises(IndexError, match="axis 3 is not one of 3"):
        x.swapaxes(0, 3)


def test_comparisons_are_refused_before_the_values_are_known():
    with ggml.Context() as ctx:
        a, b = ctx.new_tensor("f32", (2, 3)), ctx.new_tensor("f32", (2, 3))
        with pytest.raises(TypeError, match="not compared before they are computed"):
            a < b  # noqa: B015 - what is tested
        for other in (0, 0.0, True, np.zeros(3), np.float32(1), [0.0, 0.0, 0.0]):
            for compare in (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge):
                with pytest.raises(TypeError, match="not compared before they are computed"):
                    compare(a, other)
                if not isinstance(other, list):
                    with pytest.raises(TypeError, match="not compared before they are computed"):
                        compare(other, a)
        assert a == ctx.tensors()[0]  # another object for the same tensor, as containers need it
        assert a != b
        assert a != None  # noqa: E711 - what is tested
        assert a != "a"
        assert {a: 1, b: 2}[b] == 2


def test_a_traced_function_cannot_compare_two_tensors():
    x = np.ones(3, np.float32)
    with ggml.Session(["CPU"]) as s:
        w = s.weight(x)
        for function in (lambda x, y: x * (x == y), lambda x, y: x * (x != y), lambda x, y: x * (y == w)):
            with pytest.raises(TypeError, match="not compared before they are computed"):
                s.compile(function)(x, x)
        assert s.compile(lambda x, y: x + 1 if x == x else y)(x, x).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda x: x.softmax(-1), r"no attribute 'softmax'; write ggml_cffi.soft_max\(x\)"),
        (lambda x: x.max(), "'max'; write ggml_cffi.argmax"),
        (lambda x: x.unsqueeze(0), r"'unsqueeze'; write x\[None\]"),
        (lambda x: x.nothing, "a tensor has no attribute 'nothing'$"),
        (lambda x: ggml.softmax(x), "'softmax'; write ggml_cffi.soft_max"),
        (lambda x: ggml.where(x, 1, 2), "'where'; write mask"),
    ],
)
def test_an_attribute_error_names_the_way_to_write_it(use, match):
    with ggml.Context() as ctx, pytest.raises(AttributeError, match=match):
        use(ctx.new_tensor("f32", (2, 3)))


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda x: np.maximum(x, x), "numpy.maximum does not take tensors; write ggml_cffi.clamp"),
        (lambda x: np.arctan(x), "numpy.arctan does not take tensors$"),
        (lambda x: np.add.reduce(x), "numpy.add does not take tensors"),
        (lambda x: np.exp(x, out=np.zeros(3)), "numpy.exp does not take tensors"),
    ],
)
def test_other_functions_of_numpy_are_refused(use, match):
    with ggml.Context() as ctx, pytest.raises(TypeError, match=match):
        use(ctx.new_tensor("f32", (2, 3)))


def test_known_names_name_what_exists():
    for name, text in KNOWN_NAMES.items():
        for called in re.findall(r"ggml_cffi\.(\w+)", text):
            assert hasattr(ggml, called), (name, called)
