"""Quantization of arrays, within the error limits of ggml's own tests."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import Type, c
from ggml_cffi.core import dtypes

QUANTIZED = [t for t in Type if dtypes.is_quantized(t) and t not in dtypes.INTERNAL]
#: Limits of ggml's tests: the root of the summed squared errors over n, for 2 cos(i) + 0.1.
LIMITS = {
    Type.TQ1_0: 0.01,
    Type.TQ2_0: 0.01,
    Type.Q2_K: 0.0075,
    Type.IQ2_S: 0.0075,
    Type.IQ2_XS: 0.0075,
    Type.IQ2_XXS: 0.0075,
    Type.Q3_K: 0.0040,
    Type.IQ3_S: 0.0040,
    Type.IQ3_XXS: 0.0050,
    Type.NVFP4: 0.0030,
    Type.MXFP4: 0.0040,
    Type.IQ1_S: 0.0150,
    Type.IQ1_M: 0.0150,
    Type.Q1_0: 0.0250,
    Type.Q2_0: 0.0250,
}
N = 32 * 128


@pytest.mark.parametrize("dtype", QUANTIZED, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", [(N,), (4, N // 4), (2, 2, N // 4)], ids=str)
def test_errors_are_within_ggmls_limits(dtype, shape):
    values = (0.1 + 2 * np.cos(np.arange(N))).astype(np.float32).reshape(shape)
    imatrix = np.ones(shape[-1]) if c.ggml_quantize_requires_imatrix(dtype) else None
    raw = ggml.quantize(values, dtype, imatrix)
    assert raw.dtype == np.uint8
    assert raw.shape == (*shape[:-1], dtypes.row_size(dtype, shape[-1]))
    back = ggml.dequantize(raw, dtype)
    assert back.shape == shape
    assert back.dtype == np.float32
    assert np.sqrt(((back - values).astype(np.float64) ** 2).sum()) / N < LIMITS.get(dtype, 0.002)
    np.testing.assert_array_equal(ggml.dequantize(raw.tobytes(), dtype, shape), back)


@pytest.mark.parametrize("dtype", [ggml.F32, ggml.F16, ggml.BF16, ggml.F64, ggml.I32], ids=lambda t: t.name)
def test_unquantized_types_are_exact(dtype):
    values = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(ggml.dequantize(ggml.quantize(values, dtype), dtype), values)


@pytest.mark.parametrize("dtype", ["iq2_xxs", "q4_k", "q4_0"])
def test_important_columns_have_smaller_errors(dtype, rng):
    """Compare the errors of important and unimportant columns."""
    values = rng.standard_normal((8, 512)).astype(np.float32)
    first = np.where(np.arange(512) % 2, 100.0, 0.01)
    error = [
        np.abs(ggml.dequantize(ggml.quantize(values, dtype, m), dtype) - values)[:, 1::2].mean()
        for m in (first, first[::-1])
    ]
    assert error[0] < error[1]


def test_a_tensor_accepts_quantized_bytes(rng):
    values = rng.standard_normal((4, 256)).astype(np.float32)
    with ggml.Context() as ctx:
        t = ctx.new_tensor("iq2_xxs", values.shape)
        ctx.alloc("CPU")
        raw = ggml.quantize(values, "iq2_xxs", np.ones(256))
        t.set_bytes(raw)
        np.testing.assert_array_equal(t.numpy(), ggml.dequantize(raw, "iq2_xxs"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(33), "q4_0"), ValueError, "blocks of 32"),
        ((np.zeros(100), "q4_k"), ValueError, "blocks of 256"),
        ((0.0, "q4_0"), ValueError, "give an array with rows"),
        ((np.full(32, np.nan), "q4_0"), ValueError, "not finite"),
        ((np.full(32, np.inf), "q4_0"), ValueError, "not finite"),
        ((np.zeros(256), "iq1_s"), ValueError, "needs an importance matrix"),
        ((np.zeros(32), "q4_0", np.ones(31)), ValueError, r"shape \(31,\); a tensor of shape \(32,\) needs \(32,\)"),
        ((np.zeros(32), "q4_0", np.zeros(32)), ValueError, "not all 0"),
        ((np.zeros(32), "q4_0", -np.ones(32)), ValueError, "at least 0"),
        ((np.zeros(32), "q8_1"), TypeError, "internal format of ggml's"),
        ((np.zeros(32), "q9"), TypeError, "no element type"),
        ((["a"] * 32, "q4_0"), TypeError, "numbers are needed"),
        ((np.zeros(32), "i8"), TypeError, "round it"),
    ],
)
def test_values_that_cannot_be_quantized_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ggml.quantize(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((bytes(17), "q4_0"), "rows of 17 bytes do not fill whole Q4_0 blocks of 18 bytes"),
        ((bytes(18), "q4_0", (33,)), "blocks of 32"),
        ((bytes(18), "q4_0", (64,)), "18 bytes are not a Q4_0 array of shape"),
    ],
)
def test_bytes_that_cannot_be_decoded_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ggml.dequantize(*arguments)


def test_arrays_without_rows_are_quantized():
    assert ggml.quantize(np.zeros((0, 32)), "q4_0").shape == (0, 18)
    assert ggml.dequantize(np.zeros((0, 18), np.uint8), "q4_0").shape == (0, 32)
