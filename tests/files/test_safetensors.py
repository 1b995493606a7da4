"""Tensors of safetensors files, read through the ``safetensors`` library."""

import json
import os
import sys

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import ggml_cffi as ggml

FLOATS = np.arange(12, dtype=np.float32).reshape(3, 4) / 4
BITS = (FLOATS.view(np.uint32) >> 16).astype(np.uint16)  # the same numbers in bfloat16


def save(path, arrays, **kinds):
    """Write a file; ``kinds`` names the types that numpy lacks, for arrays of their bits."""
    specs = {
        name: safetensors.TensorSpec(
            dtype=kinds.get(name, a.dtype.name), shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for name, a in arrays.items()
    }
    safetensors.serialize_file(specs, path, {"format": "pt"})
    return path


@pytest.fixture
def path(tmp_path):
    arrays = {
        "f32": FLOATS,
        "f16": FLOATS.astype(np.float16),
        "f64": FLOATS.astype(np.float64),
        "bf16": BITS,
        "i64": np.arange(3),
        "i8": np.arange(-2, 2, dtype=np.int8),
        "u8": np.arange(4, dtype=np.uint8),
        "bool": np.array([True, False]),
        "f8": np.arange(6, dtype=np.uint8),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    return save(tmp_path / "m.safetensors", arrays, bf16="bfloat16", f8="float8_e4m3fn")


def test_tensors_are_arrays(path):
    with ggml.from_safetensors(path) as f:
        assert (len(f), "f32" in f, "x" in f) == (11, True, False)
        assert f.metadata == {"format": "pt"}
        for name, dtype in (("f32", "f4"), ("f16", "f2"), ("f64", "f8"), ("bf16", "f4")):
            array = np.asarray(f[name])
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, FLOATS)
        assert not np.asarray(f["f32"]).flags.writeable
        assert f["i64"].numpy().tolist() == [0, 1, 2]
        assert f["i8"].numpy().tolist() == [-2, -1, 0, 1]
        assert f["u8"].numpy().tolist() == [0, 1, 2, 3]
        assert f["bool"].numpy().tolist() == [True, False]
        assert f["scalar"].numpy() == 2.5
        assert f["empty"].numpy().shape == (0, 4)
        assert (f["bf16"].dtype, f["bf16"].shape, f["bf16"].size) == (ggml.BF16, (3, 4), 12)
        assert f["bf16"].raw().tobytes() == BITS.tobytes()
        assert repr(f["f8"]) == "<SafeTensor f8 F8_E4M3 (6,)>"
        assert repr(f) == "<SafetensorsFile m.safetensors: 11 tensors>"
        with pytest.raises(TypeError, match=r"m.safetensors: tensor 'f8' has type F8_E4M3, which ggml lacks"):
            f["f8"].numpy()
        with pytest.raises(TypeError, match="has type U8, which ggml lacks"):
            f["u8"].dtype  # noqa: B018
        with pytest.raises(KeyError, match=r"m.safetensors has no tensor 'x'"):
            f["x"]
        kept = f["f32"].numpy()
    assert kept[0, 1] == 0.25  # the array keeps the mapping alive
    with pytest.raises(ggml.ClosedError, match=r"m.safetensors is closed"):
        f["f32"].raw()


def test_tensors_go_into_gguf_files_and_sessions(path, tmp_path):
    target = tmp_path / "m.gguf"
    with ggml.from_safetensors(path) as f:
        numbers = {name: f[name] for name in f if name not in ("u8", "bool", "f8", "empty")}
        ggml.write_gguf(target, {"general.architecture": "mine"}, numbers | {"half": (f["bf16"], "f16")})
        with pytest.raises(TypeError, match=r"tensor 'u8': .*has type U8, which ggml lacks"):
            ggml.write_gguf(target, {}, {"u8": f["u8"]})
        with ggml.Session(["CPU"]) as s:
            for name in ("f32", "f16", "bf16"):
                w = s.weight(f[name])
                assert w.dtype is f[name].dtype
                np.testing.assert_array_equal(w.numpy(), FLOATS)
            assert s.weight(f["bf16"], dtype="f32").dtype is ggml.F32
            assert s.weight(f["empty"]).shape == (0, 4)
    with ggml.GGUFFile(target) as f:
        assert f.tensors["bf16"].dtype is ggml.BF16
        assert f.raw("bf16").tobytes() == BITS.tobytes()
        assert f.tensors["f64"].dtype is ggml.F64
        np.testing.assert_array_equal(f.array("half"), FLOATS)
        assert f.array("scalar") == 2.5


@pytest.fixture
def index(tmp_path):
    save_file({"a": FLOATS, "b": FLOATS + 1}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"c": FLOATS + 2}, tmp_path / "m-00002-of-00002.safetensors")
    where = {"a": "m-00001-of-00002.safetensors", "b": "m-00001-of-00002.safetensors"}
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": where | {"c": "m-00002-of-00002.safetensors"}}))
    return path


def test_several_files_are_read_through_their_index(index):
    with ggml.from_safetensors(index) as f:
        assert sorted(f) == ["a", "b", "c"]
        for i, name in enumerate("abc"):
            np.testing.assert_array_equal(f[name].numpy(), FLOATS + i)
    save_file({"b": FLOATS}, index.with_name("m-00002-of-00002.safetensors"))
    with pytest.raises(ggml.FormatError, match=r"m-00002-of-00002.safetensors: tensor 'b' is in another file"):
        ggml.from_safetensors(index)
    os.remove(index.with_name("m-00002-of-00002.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002"):
        ggml.from_safetensors(index)
    for text in ("x", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(ggml.FormatError, match=r"index.json: not an index of safetensors files"):
            ggml.from_safetensors(index)


def test_every_truncation_is_an_error(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for n in [*range(16), *range(16, len(whole), 7), len(whole) - 1]:
        cut.write_bytes(whole[:n])
        with pytest.raises(ggml.FormatError, match=r"cut\.safetensors: "):
            ggml.from_safetensors(cut)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ggml.from_safetensors(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        ggml.from_safetensors(tmp_path)


def test_without_the_library_the_error_names_the_package_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"of the extra models: pip install '\.\[models\]'"):
        ggml.from_safetensors(path)
