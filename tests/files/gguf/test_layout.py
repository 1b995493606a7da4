"""Division of a model over several GGUF files when it is written."""

import itertools
import os

import gguf
import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support.gguf_reader import GgmlReader


def test_a_large_model_is_split_into_parts(path, rng):
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
def test_parts_are_as_large_as_allowed(path, max_bytes):
    """A file is larger than the limit only if it has one tensor; the first tensor of the next file would not fit."""
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


def test_parts_that_the_gguf_package_wrote_are_read(path, rng):
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


def test_impossible_limits_of_parts_are_refused(path):
    with pytest.raises(ValueError, match="max_bytes must be at least 1, not 0"):
        ggml.write_gguf(path, {}, {"t": [1.0]}, max_bytes=0)
    many = {f"{i}": np.zeros(1, np.int8) for i in range(2**16)}
    with pytest.raises(ValueError, match="65536 files of 1 bytes are too many"):
        ggml.write_gguf(path, {}, many, max_bytes=1)
    assert os.listdir(path.parent) == []
