"""Writing GGUF: read back by ourselves, by ggml's own reader and by the gguf package; nothing half-written stays."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import tracemalloc

import gguf
import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import GGUFType, GGUFValue, c
from ggml_cffi.core import dtypes
from tests.support import ROOT

SCALARS = {
    "u8": GGUFValue(200, GGUFType.UINT8),
    "i8": GGUFValue(-100, GGUFType.INT8),
    "u16": GGUFValue(60_000, GGUFType.UINT16),
    "i16": GGUFValue(-30_000, GGUFType.INT16),
    "u32": GGUFValue(4_000_000_000, GGUFType.UINT32),
    "i32": GGUFValue(-2_000_000_000, GGUFType.INT32),
    "u64": GGUFValue(2**63 + 1, GGUFType.UINT64),
    "i64": GGUFValue(-(2**62), GGUFType.INT64),
    "f32": GGUFValue(0.5, GGUFType.FLOAT32),
    "f64": GGUFValue(0.1, GGUFType.FLOAT64),
    "bool": GGUFValue(True, GGUFType.BOOL),
    "text": GGUFValue("größe 🙂\n\0\x1b[31m", GGUFType.STRING),
    "empty text": GGUFValue("", GGUFType.STRING),
    "no utf-8": GGUFValue("a\udcff\udc80", GGUFType.STRING),
}
ARRAYS = {
    **{
        f"a {kind.name}": GGUFValue([1, 0, 1] if kind is not GGUFType.BOOL else [True, False], GGUFType.ARRAY, kind)
        for kind in GGUFType
        if kind not in (GGUFType.STRING, GGUFType.ARRAY)
    },
    "texts": GGUFValue(["a", "", "größe", "\udcff"], GGUFType.ARRAY, GGUFType.STRING),
    "no texts": GGUFValue([], GGUFType.ARRAY, GGUFType.STRING),
    "no numbers": GGUFValue([], GGUFType.ARRAY, GGUFType.UINT8),
}
NESTED = {
    "nested": GGUFValue([[1, 2], ["x"], [[0.5]]], GGUFType.ARRAY, GGUFType.ARRAY),
    "no arrays": GGUFValue([], GGUFType.ARRAY, GGUFType.ARRAY),
}


def read(path):
    """Metadata and tensors, as they are after the file is closed."""
    with ggml.GGUFFile(path) as f:
        return dict(f.metadata), {name: np.array(f[name]) for name in f.tensors}


def plain(value):
    """Arrays and tuples as lists."""
    return [plain(v) for v in value] if isinstance(value, list | tuple | np.ndarray) else value


class GgmlReader:
    """What ggml's own reader, which llama.cpp uses, makes of a file."""

    def __init__(self, path):
        params = c.ffi.new("struct gguf_init_params *", {"no_alloc": True, "ctx": c.NULL})
        self.ptr = c.gguf_init_from_file(os.fsencode(path), params[0])
        assert self.ptr, "ggml cannot read it"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        c.gguf_free(self.ptr)

    def find(self, key):
        return c.gguf_find_key(self.ptr, key.encode("utf-8", "surrogateescape"))

    def tensors(self):
        start = c.gguf_get_data_offset(self.ptr)
        return {
            c.ffi.string(c.gguf_get_tensor_name(self.ptr, i)).decode(): (
                c.gguf_get_tensor_type(self.ptr, i),
                start + c.gguf_get_tensor_offset(self.ptr, i),
                c.gguf_get_tensor_size(self.ptr, i),
            )
            for i in range(c.gguf_get_n_tensors(self.ptr))
        }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.gguf"


# ---------------------------------------------------------------------- metadata


def test_every_type_of_value_comes_back(path):
    values = SCALARS | ARRAYS | NESTED
    assert ggml.write_gguf(path, values, {}) == (str(path),)
    with ggml.GGUFFile(path) as f:
        assert list(f.metadata) == list(values)
        for key, want in values.items():
            got = f.fields[key]
            assert (got.type, got.sub_type) == (want.type, want.sub_type)
            if key not in NESTED:
                assert plain(got.value) == plain(want.value)
        assert [plain(x) for x in plain(f.metadata["nested"])] == [[1, 2], ["x"], [[0.5]]]
        again = path.with_name("again.gguf")
        ggml.write_gguf(again, f.fields, {})
    assert again.read_bytes() == path.read_bytes()


def test_ggml_reads_every_type_but_nested_arrays(path):
    ggml.write_gguf(path, SCALARS | ARRAYS, {"t": np.ones(3, np.float32)})
    with GgmlReader(path) as r:
        assert c.gguf_get_n_kv(r.ptr) == len(SCALARS | ARRAYS)
        for key, want in SCALARS.items():
            assert c.gguf_get_kv_type(r.ptr, r.find(key)) == want.type
        assert c.gguf_get_val_u64(r.ptr, r.find("u64")) == 2**63 + 1
        assert c.gguf_get_val_f64(r.ptr, r.find("f64")) == 0.1
        for key, want in ARRAYS.items():
            assert c.gguf_get_arr_type(r.ptr, r.find(key)) == want.sub_type
            assert c.gguf_get_arr_n(r.ptr, r.find(key)) == len(want.value)
        assert c.ffi.string(c.gguf_get_arr_str(r.ptr, r.find("texts"), 2)).decode() == "größe"


def test_the_gguf_package_reads_it(path, rng):
    arrays = {
        "f32": rng.standard_normal((3, 5)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "f64": (np.arange(3.0), "f64"),
        "i8": np.arange(-3, 3, dtype=np.int8),
        "i64": np.array([2**40]),
        "q8_0": (rng.standard_normal((4, 64)), "q8_0"),
        "q4_k": (rng.standard_normal((2, 3, 256)), ggml.Q4_K),
    }
    values = {
        key: v for key, v in (SCALARS | ARRAYS).items() if "utf-8" not in key and key != "texts" and v.value != []
    }
    ggml.write_gguf(path, values, arrays, alignment=64)
    reader = gguf.GGUFReader(path)
    for key, want in values.items():
        assert reader.fields[key].contents() == plain(want.value), key
    assert [t.name for t in reader.tensors] == list(arrays)
    for t in reader.tensors:
        source = arrays[t.name][0] if isinstance(arrays[t.name], tuple) else arrays[t.name]
        assert tuple(t.shape[::-1]) == source.shape
        assert t.data_offset % 64 == 0
        got = gguf.dequantize(t.data, t.tensor_type) if t.name.startswith("q") else t.data
        limit = 0.1 * np.abs(source).max() if t.name.startswith("q") else 0
        assert np.abs(got - source).max() <= limit


def test_files_of_the_gguf_package(path, rng):
    writer = gguf.GGUFWriter(path, "llama")
    for key, want in SCALARS.items():
        if key != "no utf-8":
            writer.add_key_value(key, want.value, gguf.GGUFValueType(want.type))
    writer.add_array("texts", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_custom_alignment(64)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    writer.add_tensor("x", x)
    writer.add_tensor("q", gguf.quantize(x, gguf.GGMLQuantizationType.Q5_1), raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with ggml.GGUFFile(path) as f:
        for key, want in SCALARS.items():
            if key not in ("no utf-8", "empty text"):
                assert (f.metadata[key], f.fields[key].type) == (want.value, want.type)
        assert (f.metadata["texts"], f.metadata["numbers"].tolist()) == (["a", "b"], [1, 2, 3])
        np.testing.assert_array_equal(f.array("x"), x)
        assert f.tensors["q"].dtype is ggml.Q5_1
        assert np.abs(f.array("q") - x).max() < 0.2
        copy = path.with_name("copy.gguf")
        ggml.write_gguf(copy, f.fields, {name: f[name] for name in f.tensors})
    # It differs in what padding there is before the data, if at all: the same fields, in the same order, and bytes.
    assert copy.read_bytes().rstrip(b"\0") == path.read_bytes().rstrip(b"\0")


@pytest.mark.parametrize(
    ("value", "kind", "sub_type"),
    [
        (True, GGUFType.BOOL, None),
        (3, GGUFType.UINT32, None),
        (-3, GGUFType.INT32, None),
        (2**32, GGUFType.UINT64, None),
        (-(2**32), GGUFType.INT64, None),
        (0.5, GGUFType.FLOAT32, None),
        ("a", GGUFType.STRING, None),
        (b"\xff", GGUFType.STRING, None),
        (np.uint8(3), GGUFType.UINT8, None),
        (np.float64(0.1), GGUFType.FLOAT64, None),
        (np.float16(0.5), GGUFType.FLOAT32, None),
        (np.int16(-3), GGUFType.INT16, None),
        (np.bool_(False), GGUFType.BOOL, None),
        ([1, -2], GGUFType.ARRAY, GGUFType.INT32),
        ((1, 2**31), GGUFType.ARRAY, GGUFType.UINT32),
        ([-1, 2**31], GGUFType.ARRAY, GGUFType.INT64),
        ([1, 2**63], GGUFType.ARRAY, GGUFType.UINT64),
        ([1, 0.5], GGUFType.ARRAY, GGUFType.FLOAT32),
        ([True], GGUFType.ARRAY, GGUFType.BOOL),
        (["a", "b"], GGUFType.ARRAY, GGUFType.STRING),
        (np.array(["a", "b"]), GGUFType.ARRAY, GGUFType.STRING),
        (np.arange(3, dtype=np.int8), GGUFType.ARRAY, GGUFType.INT8),
        (np.zeros(0, np.uint16), GGUFType.ARRAY, GGUFType.UINT16),
        (np.zeros((2, 3)), GGUFType.ARRAY, GGUFType.ARRAY),
        ([[1], ["a"]], GGUFType.ARRAY, GGUFType.ARRAY),
    ],
    ids=repr,
)
def test_types_of_python_values(path, value, kind, sub_type):
    ggml.write_gguf(path, {"k": value}, {})
    with ggml.GGUFFile(path) as f:
        got = f.fields["k"]
        assert (got.type, got.sub_type) == (kind, sub_type)
        want = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        assert plain(got.plain()) == plain(want)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "metadata 'k': GGUF has no type for NoneType"),
        ({}, TypeError, "no type for dict"),
        ([None], TypeError, "no type for NoneType"),
        (1j, TypeError, "no type for complex"),
        (np.complex64(1), TypeError, "numpy's complex64"),
        ([], ValueError, "an empty list has no type"),
        ([1, "a"], TypeError, "of one kind"),
        (2**64, ValueError, "more than 64 bits"),
        ([-1, 2**63], ValueError, "more than 64 bits"),
        (1e39, ValueError, "too large for FLOAT32"),
        ("\ud800", ValueError, "metadata 'k': .*surrogates"),
        (GGUFValue(256, GGUFType.UINT8), ValueError, "256 does not fit UINT8"),
        (GGUFValue(-1, GGUFType.UINT64), ValueError, "-1 does not fit UINT64"),
        (GGUFValue(0.5, GGUFType.INT32), TypeError, "INT32 cannot hold"),
        (GGUFValue(1, GGUFType.BOOL), TypeError, "BOOL cannot hold"),
        (GGUFValue(True, GGUFType.INT8), TypeError, "INT8 cannot hold"),
        (GGUFValue(1, GGUFType.STRING), TypeError, "a STRING is a str, not int"),
        (GGUFValue([1], GGUFType.INT8), TypeError, "an? INT8 is one number"),
        (GGUFValue([1], GGUFType.ARRAY), TypeError, "needs the type of its elements"),
        (GGUFValue("ab", GGUFType.ARRAY, GGUFType.STRING), TypeError, "an ARRAY is a list"),
        (GGUFValue([1], GGUFType.ARRAY, GGUFType.ARRAY), TypeError, "has lists or arrays as elements"),
        (GGUFValue(np.array([300]), GGUFType.ARRAY, GGUFType.UINT8), ValueError, "300 does not fit"),
        (GGUFValue(1, 99), ValueError, "99 is not a valid GGUFType"),
        ([[[[[[[[[[1]]]]]]]]]], ValueError, "nested deeper than 8"),
    ],
    ids=repr,
)
def test_values_that_cannot_be_written(path, value, error, message):
    with pytest.raises(error, match=message):
        ggml.write_gguf(path, {"k": value}, {})
    assert os.listdir(path.parent) == []


# ---------------------------------------------------------------------- tensors


def test_what_tensors_are_made_from(path, rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    other = path.with_name("other.gguf")
    ggml.write_gguf(other, {}, {"x": x, "q": (x, "q5_0")})
    with ggml.GGUFFile(other) as f:
        sources = {
            "array": x,
            "list": [[1.0, 2.0], [3.0, 4.0]],
            "double": x.astype(np.float64),
            "transposed": x.T,
            "big-endian": x.astype(">f4"),
            "cast": (x, "f16"),
            "bf16": (x, ggml.BF16),
            "quantized": (x, "q8_0"),
            "scalar": np.float32(2.5),
            "from a file": f["q"],
            "decoded from a file": (f["q"], "f16"),
            "requantized": (f["x"], "q5_0"),
            "raw": ggml.RawTensor(ggml.quantize(x, "q4_0"), "q4_0"),
            "lazy": ggml.LazyTensor((4, 64), "q5_0", lambda: f["x"]),
            "lazy array": ggml.LazyTensor((4, 64), ggml.F32, lambda: x),
            "4d": np.arange(24, dtype=np.int32).reshape(2, 3, 2, 2),
        }
        ggml.write_gguf(path, {}, sources)
        want_q5 = f.raw("q").tobytes()
    with ggml.GGUFFile(path) as f:
        assert list(f.tensors) == list(sources)
        for name in ("array", "double", "big-endian", "lazy array"):
            assert f.tensors[name].dtype is ggml.F32
            np.testing.assert_array_equal(f.array(name), x)
        np.testing.assert_array_equal(f.array("transposed"), x.T)
        assert f.array("list").tolist() == [[1, 2], [3, 4]]
        np.testing.assert_array_equal(f.array("cast"), x.astype(np.float16))
        for name, dtype in (("bf16", ggml.BF16), ("quantized", ggml.Q8_0), ("raw", ggml.Q4_0)):
            assert f.tensors[name].dtype is dtype
            assert f.raw(name).tobytes() == ggml.quantize(x, dtype).tobytes()
        for name in ("from a file", "requantized", "lazy"):
            assert f.tensors[name].dtype is ggml.Q5_0
            assert f.raw(name).tobytes() == want_q5
        np.testing.assert_array_equal(
            f.array("decoded from a file"),
            ggml.dequantize(np.frombuffer(want_q5, np.uint8), "q5_0", (4, 64)).astype("f2"),
        )
        assert f.array("scalar") == 2.5
        assert f.array("4d").tolist() == sources["4d"].tolist()


def test_pieces_are_whole_rows(path, rng):
    """More rows than are converted at a time, and rows longer than that."""
    many, long = rng.standard_normal((9000, 64)), rng.standard_normal((3, 1 << 19))
    ggml.write_gguf(path, {}, {"many": (many, "q4_0"), "long": (long, "q4_k"), "one": (long[0], "f16")})
    with ggml.GGUFFile(path) as f:
        assert f.raw("many").tobytes() == ggml.quantize(many, "q4_0").tobytes()
        assert f.raw("long").tobytes() == ggml.quantize(long, "q4_k").tobytes()
        np.testing.assert_array_equal(f.array("one"), long[0].astype(np.float16))


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096, None])
def test_alignment(path, alignment):
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
        ({"t": (np.zeros(32), "q8_1")}, TypeError, "inside ggml's products"),
        ({"t": (np.zeros(256), "iq1_s")}, ValueError, "tensor 't': .*importance matrix"),
        ({"t": (np.zeros(32), "q9")}, TypeError, "tensor 't': ggml has no element type"),
        ({"t": np.zeros(3, np.uint8)}, TypeError, "tensor 't': ggml has no element type"),
        ({"t": ["a"]}, TypeError, "tensor 't': numbers are needed"),
        ({"t": (np.full(32, np.nan), "q4_0")}, ValueError, "tensor 't': values that are not finite"),
        ({"t": (np.full(3, 1e6), "f16")}, ValueError, "tensor 't': 1e[+]06 is too large for F16"),
        ({"t": np.full(3, 1e60)}, ValueError, "too large for F32"),
        ({"t": (np.ones(3), "i32")}, TypeError, "tensor 't': .*round it"),
        ({"t": lambda: [1.0]}, TypeError, r"LazyTensor\(shape, dtype, function\)"),
        ({"t": (ggml.LazyTensor((1,), "f32", list), "f16")}, TypeError, "has its type itself"),
        ({"t": ggml.LazyTensor((2,), "f32", lambda: [1.0])}, ValueError, r"returned shape \(1,\), not \(2,\)"),
        ({"t": ggml.LazyTensor((0,), "f32", list)}, ValueError, "none of them empty"),
    ],
    ids=lambda value: None if isinstance(value, type) else repr(value)[:30],
)
def test_tensors_that_cannot_be_written(path, tensors, error, message):
    with pytest.raises(error, match=message):
        ggml.write_gguf(path, {}, tensors)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize(
    ("key", "message"), [("", "metadata key '' has 0 bytes"), ("k" * 65536, "65536 bytes; 1 to 65535")]
)
def test_keys_that_cannot_be_written(path, key, message):
    with pytest.raises(ValueError, match=message):
        ggml.write_gguf(path, {key: 1}, {})


@pytest.mark.parametrize("alignment", [0, 3, -32, 2**32, 0.5, "32"])
def test_impossible_alignments(path, alignment):
    with pytest.raises(ValueError, match="alignment must be a power of two"):
        ggml.write_gguf(path, {}, {}, alignment=alignment)
    with pytest.raises(ValueError, match="alignment must be a power of two"):
        ggml.write_gguf(path, {"general.alignment": alignment}, {})


def test_lazy_tensors_need_a_function():
    with pytest.raises(TypeError, match="takes a function that returns the values, not list"):
        ggml.LazyTensor((2,), "f32", [1.0, 2.0])


def test_raw_tensors(rng):
    raw = ggml.quantize(rng.standard_normal((3, 4, 64)), "q4_0")
    t = ggml.RawTensor(raw, "q4_0")
    assert (t.shape, t.dtype, t.size) == ((3, 4, 64), ggml.Q4_0, 768)
    np.testing.assert_array_equal(np.asarray(t), ggml.dequantize(raw, "q4_0"))
    np.testing.assert_array_equal(ggml.RawTensor(raw.tobytes(), "q4_0", (12, 64)).numpy(), t.numpy().reshape(12, 64))
    assert not t.raw().flags.writeable
    assert raw.flags.writeable
    assert ggml.RawTensor(np.ones(3, np.float32), "f32").numpy().tolist() == [1, 1, 1]
    assert np.array(t, copy=True).flags.writeable
    with pytest.raises(ValueError, match="rows of 17 bytes are no whole Q4_0 blocks of 18"):
        ggml.RawTensor(bytes(17), "q4_0")
    with pytest.raises(ValueError, match=r"18 bytes are not a Q4_0 tensor of shape \(64,\)"):
        ggml.RawTensor(bytes(18), "q4_0", (64,))


class Bfloat16:
    """An array of numbers that numpy lacks, as jax's and PyTorch's are: only its bits can be had."""

    def __init__(self, values):
        self.bits = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        self.shape, self.dtype = self.bits.shape, "bfloat16"

    def __array__(self, dtype=None, copy=None):
        return self.bits


def test_bfloat16_arrays(path):
    ggml.write_gguf(path, {}, {"t": Bfloat16([[1.0, -2.5]]), "half": (Bfloat16([1.0]), "f16")})
    with ggml.GGUFFile(path) as f:
        assert (f.tensors["t"].dtype, f.array("t").tolist()) == (ggml.BF16, [[1, -2.5]])
        assert (f.tensors["half"].dtype, f.array("half").tolist()) == (ggml.F16, [1])


def test_pytorch_tensors(path):
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    ggml.write_gguf(path, {}, {"w": w, "b": w.detach().bfloat16(), "t": w.T})
    _, tensors = read(path)
    assert tensors["w"].tolist() == tensors["b"].tolist() == tensors["t"].T.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_sessions_take_them(rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    raw = ggml.quantize(x, "q8_0")
    with ggml.Session(["CPU"]) as s:
        w = s.weight(ggml.RawTensor(raw, "q8_0"))
        assert w.dtype is ggml.Q8_0
        np.testing.assert_array_equal(w.numpy(), ggml.dequantize(raw, "q8_0"))
        assert s.weight(Bfloat16([1.0, 2.0])).dtype is ggml.BF16


# ---------------------------------------------------------------------- several files


def test_parts(path, rng):
    arrays = {f"t{i}": rng.standard_normal((10, 32)).astype(np.float32) for i in range(10)}
    values = {"general.architecture": "llama", "words": ["a", "b"]}
    names = ggml.write_gguf(path, values, arrays, max_bytes=5000, alignment=64)
    assert len(names) == 4
    assert names[0] == str(path.with_name("out-00001-of-00004.gguf"))
    assert sorted(os.listdir(path.parent)) == [os.path.basename(name) for name in names]
    assert all(os.path.getsize(name) <= 5000 for name in names)
    with ggml.GGUFFile(names[0]) as f:
        assert f.paths == names
        assert list(f.tensors) == list(arrays)
        assert f.metadata["words"] == ["a", "b"]
        for name, want in arrays.items():
            np.testing.assert_array_equal(f.array(name), want)
    seen = []
    for i, name in enumerate(names):
        reader = gguf.GGUFReader(name)
        assert reader.fields["split.no"].types == [gguf.GGUFValueType.UINT16]
        assert reader.fields["split.count"].types == [gguf.GGUFValueType.UINT16]
        assert reader.fields["split.tensors.count"].types == [gguf.GGUFValueType.INT32]
        found = [reader.fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert found == [i, 4, 10]
        with GgmlReader(name) as r:
            seen += r.tensors()
        for t in reader.tensors:
            np.testing.assert_array_equal(t.data, arrays[t.name])
    assert seen == list(arrays)


@pytest.mark.parametrize("max_bytes", [700, 1000, 1500, 2**40])
def test_sizes_of_parts(path, max_bytes):
    """No file is larger than allowed, unless it has one tensor only; none has room for the next one's first tensor."""
    arrays = {f"t{i}": np.zeros(n, np.int8) for i, n in enumerate([100, 900, 10, 10, 300, 2000, 1, 640])}
    names = ggml.write_gguf(path, {"k": "v" * 50}, arrays, max_bytes=max_bytes)
    with ggml.GGUFFile(names[0]) as f:
        by_part = [list(group) for _, group in itertools.groupby(f.tensors.values(), lambda t: t.part)]
    assert list(itertools.chain(*[[t.name for t in part] for part in by_part])) == list(arrays)
    for i, name in enumerate(names):
        assert os.path.getsize(name) <= max_bytes or len(by_part[i]) == 1
        if i + 1 < len(names):
            assert os.path.getsize(name) + by_part[i + 1][0].nbytes > max_bytes - 128
    if max_bytes == 2**40:
        assert names == (str(path),)


def test_a_split_file_becomes_one(path, rng):
    arrays = {f"t{i}": rng.standard_normal((10, 32)).astype(np.float32) for i in range(4)}
    names = ggml.write_gguf(path, {"k": 1}, arrays, max_bytes=2000)
    with ggml.GGUFFile(names[0]) as f:
        ggml.write_gguf(path, f.fields, {name: f[name] for name in f.tensors})
    with ggml.GGUFFile(path) as f:
        assert list(f.metadata) == ["k"]
        assert len(f.paths) == 1
        np.testing.assert_array_equal(f.array("t3"), arrays["t3"])


def test_parts_of_the_gguf_package(path, rng):
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=2)
    arrays = {f"t{i}": rng.standard_normal((3, 32)).astype(np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with ggml.GGUFFile(path.with_name("out-00001-of-00003.gguf")) as f:
        assert f.metadata["general.architecture"] == "llama"
        for name, want in arrays.items():
            np.testing.assert_array_equal(f.array(name), want)


def test_parts_that_are_impossible(path):
    with pytest.raises(ValueError, match="max_bytes must be at least 1, not 0"):
        ggml.write_gguf(path, {}, {"t": [1.0]}, max_bytes=0)
    many = {f"{i}": np.zeros(1, np.int8) for i in range(2**16)}
    with pytest.raises(ValueError, match="65536 files of 1 bytes are too many"):
        ggml.write_gguf(path, {}, many, max_bytes=1)
    assert os.listdir(path.parent) == []


# ---------------------------------------------------------------------- nothing half-written


def failing(at):
    """Tensors, the last of which cannot be made; ``at`` is called then."""
    return {"a": np.ones(100), "b": np.ones(100), "c": ggml.LazyTensor((3,), "f32", at)}


def stop(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("max_bytes", [None, 600])
@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_nothing_is_left_of_what_fails(path, error, max_bytes):
    path.write_bytes(b"before")
    with pytest.raises(type(error)):
        ggml.write_gguf(path, {}, failing(stop(error)), max_bytes=max_bytes)
    assert os.listdir(path.parent) == ["out.gguf"]
    assert path.read_bytes() == b"before"


def test_no_name_before_it_is_complete(path):
    seen = []
    ggml.write_gguf(
        path, {}, {"t": ggml.LazyTensor((1,), "f32", lambda: [seen.append(os.listdir(path.parent)) or 1.0])}
    )
    ((temporary,),) = seen
    assert temporary.startswith(".")
    assert os.listdir(path.parent) == ["out.gguf"]


def test_progress(path):
    calls = []
    ggml.write_gguf(path, {}, {"a": np.ones(100), "b": np.ones((300, 1024))}, progress=lambda *x: calls.append(x))
    total = 4 * (100 + 300 * 1024)
    assert calls[0] == (400, total)
    assert calls[-1] == (total, total)
    assert [x for x, _ in calls] == sorted(x for x, _ in calls)
    with pytest.raises(ZeroDivisionError):
        ggml.write_gguf(path.with_name("b"), {}, {"a": [1.0]}, progress=lambda *_: 1 / 0)
    assert os.listdir(path.parent) == ["out.gguf"]


def test_a_rename_that_fails(path, monkeypatch):
    """Of several files, none stays if one cannot have its name."""
    replace, count = os.replace, itertools.count()

    def fail(*names):
        if next(count) == 1:
            raise OSError(errno.EIO, "broken")
        replace(*names)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        ggml.write_gguf(path, {}, {"a": np.ones(100), "b": np.ones(100), "c": np.ones(100)}, max_bytes=600)
    assert os.listdir(path.parent) == []


def test_targets_that_exist(path):
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError, match=r"out.gguf exists already"):
        ggml.write_gguf(path, {}, {}, overwrite=False)
    assert path.read_bytes() == b"before"
    link = path.with_name("link.gguf")
    link.symlink_to(path.name)
    ggml.write_gguf(link, {"k": 1}, {})
    assert link.is_symlink()
    assert read(path)[0] == {"k": 1}
    os.mkfifo(path.with_name("fifo"))
    with pytest.raises(OSError, match="fifo is no regular file"):
        ggml.write_gguf(path.with_name("fifo"), {}, {})
    with pytest.raises(IsADirectoryError, match="is a folder"):
        ggml.write_gguf(path.parent, {}, {})
    with pytest.raises(FileNotFoundError):
        ggml.write_gguf(path.parent / "missing" / "x.gguf", {}, {})


def test_the_file_that_is_read_can_be_replaced(path):
    ggml.write_gguf(path, {"k": 1}, {"t": np.arange(5.0)})
    with ggml.GGUFFile(path) as f:
        ggml.write_gguf(path, {"k": 2}, {"t": (f["t"], "f16")})
        assert f.array("t").tolist() == [0, 1, 2, 3, 4]
    assert read(path)[0] == {"k": 2}


def test_ctrl_c(path):
    """A real signal, in a process of its own, in the middle of the second tensor."""
    code = f"""
import os, signal, numpy as np, ggml_cffi as ggml
def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGINT)
x = np.ones((900, 1024))
ggml.write_gguf({str(path)!r}, {{}}, {{"a": x, "b": (x, "q8_0")}}, progress=progress)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=100
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(path.parent) == []


def test_memory(path, rng):
    """What is written is never in memory: not a quarter of one tensor, be it cast, quantized or copied."""
    row = rng.standard_normal(1024).astype(np.float32)
    big = np.broadcast_to(row, (16384, 1024))  # 64 MiB, of which a row is there
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
