"""Writer of GGUF files: alignment, progress, memory, and tensors that cannot be written."""

import os
import tracemalloc

import gguf
import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.core import dtypes
from tests.support.gguf_reader import GgmlReader, read


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096, None])
def test_tensors_start_at_multiples_of_the_alignment(path, alignment):
    arrays = {"a": np.ones(3, np.float32), "b": np.full(5, 2, np.int8), "c": np.full(3, 3, np.float32)}
    ggml.write_gguf(path, {"general.alignment": 128} if alignment is None else {}, arrays, alignment=alignment)
    _, tensors = read(path)
    assert {name: t[0] for name, t in tensors.items()} == {"a": 1, "b": 2, "c": 3}
    with ggml.GGUFFile(path) as f, GgmlReader(path) as r:
        assert c.gguf_get_alignment(r.ptr) == (alignment or 128)
        for info in f.tensors.values():
            assert info.offset % (alignment or 128) == 0
            assert r.tensors()[info.name] == (info.dtype, info.offset, info.nbytes)
    assert {t.name: t.data[0] for t in gguf.GGUFReader(path).tensors} == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"": [1.0]}, ValueError, "tensor name '' has 0 bytes; 1 to 63"),
        ({"ö" * 32: [1.0]}, ValueError, "has 64 bytes; 1 to 63"),
        ({"a\0b": [1.0]}, ValueError, "none of them zero"),
        ({3: [1.0]}, TypeError, "a tensor name is a str, not int"),
        ([("a", [1.0]), ("b", [1.0]), ("a", [1.0])], ValueError, "tensor 'a' occurs twice"),
        ({"t": np.zeros((0, 3))}, ValueError, r"tensor 't': shape \(0, 3\).* none of them empty"),
        ({"t": np.zeros((1, 1, 1, 1, 1))}, ValueError, "up to 4 axes"),
        ({"t": (np.zeros((2, 33)), "q4_0")}, ValueError, "tensor 't': Q4_0 stores blocks of 32"),
        ({"t": (np.zeros(32), "q8_1")}, TypeError, "internal format of ggml's matrix products"),
        ({"t": (np.zeros(256), "iq1_s")}, ValueError, "tensor 't': .*importance matrix"),
        ({"t": (np.zeros(32), "q9")}, TypeError, "tensor 't': ggml has no element type"),
        ({"t": np.zeros(3, np.uint8)}, TypeError, "tensor 't': ggml has no element type"),
        ({"t": ["a"]}, TypeError, "tensor 't': numbers are needed"),
        ({"t": (np.full(32, np.nan), "q4_0")}, ValueError, "tensor 't': values that are not finite"),
        ({"t": (np.full(3, 1e6), "f16")}, ValueError, "tensor 't': 1e[+]06 is too large for F16"),
        ({"t": np.full(3, 1e60)}, ValueError, "too large for F32"),
        ({"t": (np.ones(3), "i32")}, TypeError, "tensor 't': .*round it"),
        ({"t": lambda: [1.0]}, TypeError, r"LazyTensor\(shape, dtype, function\)"),
        ({"t": (ggml.LazyTensor((1,), "f32", list), "f16")}, TypeError, "has a type of its own"),
        ({"t": ggml.LazyTensor((2,), "f32", lambda: [1.0])}, ValueError, r"returned shape \(1,\), not \(2,\)"),
        ({"t": ggml.LazyTensor((0,), "f32", list)}, ValueError, "none of them empty"),
    ],
    ids=lambda value: None if isinstance(value, type) else repr(value)[:30],
)
def test_tensors_that_cannot_be_written(path, tensors, error, message):
    with pytest.raises(error, match=message):
        ggml.write_gguf(path, {}, tensors)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("alignment", [0, 3, -32, 2**32, 0.5, "32"])
def test_impossible_alignments_cannot_be_written(path, alignment):
    with pytest.raises(ValueError, match="alignment must be a power of two"):
        ggml.write_gguf(path, {}, {}, alignment=alignment)
    with pytest.raises(ValueError, match="alignment must be a power of two"):
        ggml.write_gguf(path, {"general.alignment": alignment}, {})


def test_chunks_are_whole_rows(path, rng):
    """Convert more rows than one chunk holds, and rows that are longer than a chunk."""
    many, long = rng.standard_normal((9000, 64)), rng.standard_normal((3, 1 << 19))
    ggml.write_gguf(path, {}, {"many": (many, "q4_0"), "long": (long, "q4_k"), "one": (long[0], "f16")})
    with ggml.GGUFFile(path) as f:
        assert f.raw("many").tobytes() == ggml.quantize(many, "q4_0").tobytes()
        assert f.raw("long").tobytes() == ggml.quantize(long, "q4_k").tobytes()
        np.testing.assert_array_equal(f.array("one"), long[0].astype(np.float16))


def test_progress_counts_bytes(path):
    calls = []
    ggml.write_gguf(path, {}, {"a": np.ones(100), "b": np.ones((300, 1024))}, progress=lambda *x: calls.append(x))
    total = 4 * (100 + 300 * 1024)
    assert calls[0] == (400, total)
    assert calls[-1] == (total, total)
    assert [x for x, _ in calls] == sorted(x for x, _ in calls)
    with pytest.raises(ZeroDivisionError):
        ggml.write_gguf(path.with_name("b"), {}, {"a": [1.0]}, progress=lambda *_: 1 / 0)
    assert os.listdir(path.parent) == ["out.gguf"]


def test_a_file_can_be_replaced_while_it_is_read(path):
    ggml.write_gguf(path, {"k": 1}, {"t": np.arange(5.0)})
    with ggml.GGUFFile(path) as f:
        ggml.write_gguf(path, {"k": 2}, {"t": (f["t"], "f16")})
        assert f.array("t").tolist() == [0, 1, 2, 3, 4]
    assert read(path)[0] == {"k": 2}


def test_writing_needs_little_memory(path, rng):
    """Cast, quantize and copy a tensor with less memory than a quarter of it."""
    row = rng.standard_normal(1024).astype(np.float32)
    big = np.broadcast_to(row, (16384, 1024))  # 64 MiB, of which one row is in memory
    assert dtypes.row_size(ggml.F32, 1024) * len(big) == 64 << 20
    tracemalloc.start()
    try:
        ggml.write_gguf(path, {}, {"f": big, "q": (big, "q8_0")})
        with ggml.GGUFFile(path) as f:
            other = path.with_name("other.gguf")
            ggml.write_gguf(other, {}, {"copy": f["f"], "half": (f["f"], "f16"), "requantized": (f["q"], "q4_0")})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
    os.remove(path)
    os.remove(other)
