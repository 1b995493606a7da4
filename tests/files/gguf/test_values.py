"""Values of a GGUF header: the types of Python values, read back here, by ggml's own reader and by the gguf package."""

import os

import gguf
import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import GGUFType, GGUFValue, c
from tests.support.gguf_reader import GgmlReader, as_lists

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


def test_every_type_of_value_is_read_back(path):
    values = SCALARS | ARRAYS | NESTED
    assert ggml.write_gguf(path, values, {}) == (str(path),)
    with ggml.GGUFFile(path) as f:
        assert list(f.metadata) == list(values)
        for key, want in values.items():
            got = f.fields[key]
            assert (got.type, got.sub_type) == (want.type, want.sub_type)
            if key not in NESTED:
                assert as_lists(got.value) == as_lists(want.value)
        assert [as_lists(x) for x in as_lists(f.metadata["nested"])] == [[1, 2], ["x"], [[0.5]]]
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


def test_the_gguf_package_reads_every_type(path, rng):
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
        assert reader.fields[key].contents() == as_lists(want.value), key
    assert [t.name for t in reader.tensors] == list(arrays)
    for t in reader.tensors:
        source = arrays[t.name][0] if isinstance(arrays[t.name], tuple) else arrays[t.name]
        assert tuple(t.shape[::-1]) == source.shape
        assert t.data_offset % 64 == 0
        got = gguf.dequantize(t.data, t.tensor_type) if t.name.startswith("q") else t.data
        limit = 0.1 * np.abs(source).max() if t.name.startswith("q") else 0
        assert np.abs(got - source).max() <= limit


def test_files_that_the_gguf_package_wrote_are_read(path, rng):
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
    # The fields, their order and the data are the same; padding at the end may differ.
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
def test_python_values_get_a_gguf_type(path, value, kind, sub_type):
    ggml.write_gguf(path, {"k": value}, {})
    with ggml.GGUFFile(path) as f:
        got = f.fields["k"]
        assert (got.type, got.sub_type) == (kind, sub_type)
        want = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        assert as_lists(got.plain()) == as_lists(want)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "metadata 'k': GGUF has no type for NoneType"),
        ({}, TypeError, "no type for dict"),
        ([None], TypeError, "no type for NoneType"),
        (1j, TypeError, "no type for complex"),
        (np.complex64(1), TypeError, "numpy's complex64"),
        ([], ValueError, "an empty list has no type"),
        ([1, "a"], TypeError, "must all be of one type"),
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


@pytest.mark.parametrize(
    ("key", "message"), [("", "metadata key '' has 0 bytes"), ("k" * 65536, "65536 bytes; 1 to 65535")]
)
def test_keys_that_cannot_be_written(path, key, message):
    with pytest.raises(ValueError, match=message):
        ggml.write_gguf(path, {key: 1}, {})
