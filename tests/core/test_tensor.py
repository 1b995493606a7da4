"""Contexts and tensors: shapes, types, reading and writing of values."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.core import dtypes
from tests.support import relative_error

#: Relative error of a round trip through each type.
LOSS = {
    ggml.F32: 0,
    ggml.F16: 1e-3,
    ggml.BF16: 6e-3,
    ggml.Q8_0: 1e-2,
    ggml.Q5_1: 4e-2,
    ggml.Q4_0: 0.12,
    ggml.Q4_K: 9e-2,
    ggml.Q6_K: 3e-2,
    ggml.Q2_K: 0.4,
}


@pytest.mark.parametrize("dtype", LOSS, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(256,), (3, 512), (2, 3, 2, 256)])
def test_values_survive_a_round_trip(devices, dtype, shape, rng):
    values = rng.standard_normal(shape)
    with ggml.Context() as ctx:
        t = ctx.new_tensor(dtype, shape, name="t")
        ctx.alloc(devices[0])
        t.set(values)
        got = t.numpy()
    assert got.shape == shape
    assert got.dtype == dtypes.numpy_dtype(dtype)
    assert relative_error(got, values) <= max(LOSS[dtype], 1e-7)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.float64])
def test_numpys_types_are_exact(devices, dtype, rng):
    values = rng.integers(-100, 100, (4, 5)).astype(dtype)
    with ggml.Context() as ctx:
        t = ctx.new_tensor(dtype, (4, 5))
        ctx.alloc(devices[0])
        t.set(values)
        assert t.numpy().dtype == dtype
        np.testing.assert_array_equal(t.numpy(), values)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 4), (4, 1), (2, 3), (1, 1, 1, 1), (2, 1, 3, 1), (0,), (3, 0)])
def test_shapes_are_numpys(shape):
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", shape)
        assert t.shape == shape
        assert t.ne == (*reversed(shape), *(1,) * (4 - len(shape)))
        assert t.ndim == len(shape)
        assert t.size == np.prod(shape, dtype=int)
        if t.size:
            ctx.alloc("CPU")
            t.set(np.zeros(shape))
            assert t.numpy().shape == shape


@pytest.mark.parametrize(
    ("dtype", "shape", "error", "message"),
    [
        ("f32", (1, 2, 3, 4, 5), ValueError, "has 5 axes"),
        ("f32", (-1,), ValueError, "not possible"),
        ("f32", (2**40, 2**40), ValueError, "not possible"),
        ("f32", "ab", TypeError, "sequence of integers"),
        ("f32", "", TypeError, "sequence of integers"),
        ("f32", 3, TypeError, "sequence of integers"),
        ("f32", (2.5,), TypeError, "sequence of integers"),
        ("q4_0", (33,), ValueError, "blocks of 32"),
        ("q4_k", (100,), ValueError, "blocks of 256"),
        ("q4_2", (32,), TypeError, "no element type for 'q4_2'; nearest: Q4_K, Q4_1, Q4_0; it has F32"),
        (4, (32,), TypeError, "no element type for 4"),
        ("q8_k", (256,), TypeError, "internal format of ggml's"),
        (31, (32,), TypeError, "no element type"),
        (True, (32,), TypeError, "no element type"),
        (np.complex64, (32,), TypeError, "no element type"),
        (None, (32,), TypeError, ""),
    ],
)
def test_impossible_shapes_and_types_raise(dtype, shape, error, message):
    with ggml.Context() as ctx:
        if dtype is None:  # numpy reads None as float64
            assert ctx.new_tensor(dtype, shape).dtype is ggml.F64
            return
        with pytest.raises(error, match=message):
            ctx.new_tensor(dtype, shape)


def test_values_that_do_not_fit_raise():
    with ggml.Context() as ctx:
        f = ctx.new_tensor("f32", (2, 3))
        i = ctx.new_tensor("i8", (3,))
        with pytest.raises(ValueError, match=r"no memory: use Context.alloc"):
            f.set(np.zeros((2, 3)))
        with pytest.raises(ValueError, match="no memory"):
            f.numpy()
        ctx.alloc("CPU")
        with pytest.raises(ValueError, match=r"takes an array of shape \(2, 3\), not \(3, 2\)"):
            f.set(np.zeros((3, 2)))
        with pytest.raises(TypeError, match="numbers are needed"):
            f.set(np.full((2, 3), "x"))
        with pytest.raises(TypeError, match="round it to integers first"):
            i.set(np.zeros(3))
        with pytest.raises(ValueError, match="values from 0 to 200 do not fit I8"):
            i.set(np.array([0, 1, 200]))
        with pytest.raises(ValueError, match="takes 24 bytes, not 3"):
            f.set_bytes(b"abc")


@pytest.mark.parametrize("dtype", ["iq2_xxs", "iq1_s"])
def test_some_types_need_an_importance_matrix(dtype):
    with ggml.Context() as ctx:
        t = ctx.new_tensor(dtype, (256,))
        ctx.alloc("CPU")
        with pytest.raises(ValueError, match="importance matrix"):
            t.set(np.zeros(256))


def test_host_memory_can_be_viewed():
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (2, 3))
        q = ctx.new_tensor("q8_0", (32,))
        ctx.alloc("CPU")
        t.set(np.arange(6).reshape(2, 3))
        view = t.numpy(copy=False)
        view[1, 2] = 42
        assert t.numpy()[1, 2] == 42
        with pytest.raises(ValueError, match="take a copy"):
            q.numpy(copy=False)
    assert view[1, 2] == 42  # the view keeps the memory alive


def test_device_memory_cannot_be_viewed(two_gpus):
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (2, 3))
        ctx.alloc(two_gpus[0])
        with pytest.raises(ValueError, match="only host memory can be viewed"):
            t.numpy(copy=False)


def test_names_are_kept_and_checked():
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (2,), name="größe")
        assert t.name == "größe"
        t.name = "x" * 100
        assert t.name == "x" * 63
        assert "F32 (2,)" in repr(t)


def test_tensors_are_equal_if_they_are_one_tensor():
    with ggml.Context() as ctx:
        a, b = ctx.new_tensor("f32", (2,)), ctx.new_tensor("f32", (2,))
        assert a != b
        assert ctx.tensors() == [a, b]
        assert len({a, b, *ctx.tensors()}) == 2


def test_a_context_grows():
    with ggml.Context() as ctx:
        tensors = [ctx.new_tensor("f32", (1,), name=str(i)) for i in range(10_000)]
        assert ctx.tensors() == tensors
        assert tensors[9_999].name == "9999"
        assert ctx.n_tensors == 10_000


def test_tensors_that_cannot_be_allocated_raise():
    with ggml.Context() as ctx, ggml.Context() as other:
        a = ctx.new_tensor("f32", (2,))
        b = ggml.relu(a)
        with pytest.raises(ValueError, match="is computed or a view"):
            ctx.alloc("CPU", [b])
        with pytest.raises(ValueError, match="another context"):
            other.alloc("CPU", [a])
        ctx.alloc("CPU")
        with pytest.raises(ValueError, match="has memory already"):
            ctx.alloc("CPU", [a])
        assert ctx.alloc("CPU") == []


def test_a_tensor_larger_than_memory_raises():
    with ggml.Context() as ctx:
        t = ctx.new_tensor("f32", (2**46,))
        with pytest.raises(ggml.OutOfMemoryError, match="no room"):
            ctx.alloc("CPU")
        assert not t.is_allocated
        assert ctx.buffers == ()


def test_a_tensor_may_be_larger_than_the_maximum_buffer(devices):
    """``max_size`` limits buffers of several tensors, not a single tensor."""
    with ggml.Context() as ctx:
        small = [ctx.new_tensor("i8", (1000,)) for _ in range(3)]
        kind = ggml.BufferType.of(devices[0])
        assert len(ctx.alloc(kind, small)) == 1
        if kind.max_size < 2**32:
            large = ctx.new_tensor("i8", (kind.max_size + 1,))
            more = ctx.new_tensor("i8", (1000,))
            assert len(ctx.alloc(kind, [large, more])) == 2


def test_types_have_block_sizes():
    assert dtypes.block_size(ggml.Q4_K) == 256
    assert dtypes.type_size(ggml.Q8_0) == 34
    assert dtypes.row_size(ggml.Q4_0, 64) == 36
    assert dtypes.is_quantized(ggml.Q4_0)
    assert not dtypes.is_quantized(ggml.BF16)
    assert dtypes.as_type("Q4_K") is dtypes.as_type(c.GGML_TYPE_Q4_K) is ggml.Q4_K
    assert dtypes.as_type(np.float16) is dtypes.as_type(">f2") is ggml.F16


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_a_part_of_the_bytes_can_be_read_and_written(devices, dtype):
    with ggml.Context() as ctx:
        t = ctx.new_tensor(dtype, (4, 64))
        ctx.alloc(devices[-1])
        n = t.nbytes // 4
        row = np.arange(n, dtype=np.uint8)
        t.set_bytes(row, 2 * n)
        want = np.zeros((4, n), np.uint8)
        want[2] = row
        np.testing.assert_array_equal(t.get_bytes().reshape(4, n), want)
        np.testing.assert_array_equal(t.get_bytes(2 * n, n), row)
        for wrong in (-1, 3 * n + 1):
            with pytest.raises(ValueError, match="from byte"):
                t.set_bytes(row, wrong)
            with pytest.raises(ValueError, match="from byte"):
                t.get_bytes(wrong, n)
