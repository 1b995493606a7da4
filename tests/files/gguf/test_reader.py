"""Reader of GGUF files: values, tensors, and files that are damaged or missing."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.enums import GGUFType
from tests.support import gguf_writer

VALUES = {
    "u8": (GGUFType.UINT8, 200),
    "i8": (GGUFType.INT8, -100),
    "u16": (GGUFType.UINT16, 60_000),
    "i16": (GGUFType.INT16, -30_000),
    "u32": (GGUFType.UINT32, 4_000_000_000),
    "i32": (GGUFType.INT32, -2_000_000_000),
    "u64": (GGUFType.UINT64, 2**63 + 1),
    "i64": (GGUFType.INT64, -(2**62)),
    "f32": (GGUFType.FLOAT32, 0.5),
    "f64": (GGUFType.FLOAT64, 0.1),
    "bool": (GGUFType.BOOL, True),
    "text": (GGUFType.STRING, "größe 🙂"),
}


@pytest.fixture
def path(tmp_path, rng):
    tensors = {
        "a": (ggml.F32, rng.standard_normal((3, 32))),
        "b": (ggml.Q4_0, rng.standard_normal((2, 64))),
        "c": (ggml.F16, rng.standard_normal(5)),
        "scalar": (ggml.F32, np.array(2.5)),
    }
    arrays = {
        "ints": (GGUFType.ARRAY, (GGUFType.INT32, [1, -2, 3])),
        "bools": (GGUFType.ARRAY, (GGUFType.BOOL, [True, False])),
        "texts": (GGUFType.ARRAY, (GGUFType.STRING, ["a", "", "bc"])),
        "nested": (GGUFType.ARRAY, (GGUFType.ARRAY, [(GGUFType.UINT8, [1]), (GGUFType.STRING, ["x"])])),
        "empty": (GGUFType.ARRAY, (GGUFType.STRING, [])),
    }
    return gguf_writer.write(tmp_path / "model.gguf", VALUES | arrays, tensors)


def test_values_have_python_types(path):
    with ggml.GGUFFile(path) as f:
        for key, (_, want) in VALUES.items():
            assert f.metadata[key] == want
            assert type(f.metadata[key]) is type(want)
        np.testing.assert_array_equal(f.metadata["ints"], [1, -2, 3])
        assert f.metadata["ints"].dtype == np.int32
        assert f.metadata["bools"].tolist() == [True, False]
        assert f.metadata["texts"] == ["a", "", "bc"]
        assert [list(x) for x in f.metadata["nested"]] == [[1], ["x"]]
        assert f.metadata["empty"] == []
        assert f.version == 3
        assert "4 tensors" in repr(f)
        with pytest.raises(TypeError):
            f.metadata["new"] = 1


def test_fields_keep_the_types_of_the_file(path):
    with ggml.GGUFFile(path) as f:
        assert {key: f.fields[key].type for key in VALUES} == {key: kind for key, (kind, _) in VALUES.items()}
        nested = f.fields["nested"]
        assert (nested.type, nested.sub_type) == (GGUFType.ARRAY, GGUFType.ARRAY)
        assert [inner.sub_type for inner in nested.value] == [GGUFType.UINT8, GGUFType.STRING]
        assert f.fields["empty"].sub_type is GGUFType.STRING


def test_tensors_are_arrays(path):
    a = np.random.default_rng(42).standard_normal((3, 32))  # the first numbers of the fixture's generator
    with ggml.GGUFFile(path) as f:
        assert list(f.tensors) == ["a", "b", "c", "scalar"]
        info = f.tensors["b"]
        assert (info.dtype, info.shape, info.nbytes) == (ggml.Q4_0, (2, 64), 72)
        np.testing.assert_array_equal(f.array("a"), a.astype(np.float32))
        assert not f.array("a").flags.writeable
        assert f.array("b").shape == (2, 64)
        assert f.array("c").dtype == np.float16
        assert f.array("scalar") == 2.5
        assert f.raw("b").nbytes == 72
        with pytest.raises(KeyError, match="has no tensor 'z'"):
            f.array("z")
        kept = f.array("a")
    assert kept[0, 0] == np.float32(a[0, 0])  # the array keeps the mapping alive
    with pytest.raises(ggml.ClosedError, match="is closed"):
        f.array("a")
    f.close()


def test_every_truncation_is_an_error(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    with ggml.GGUFFile(path) as f:
        end = max(t.offset + t.nbytes for t in f.tensors.values())
    for n in range(end):
        cut.write_bytes(whole[:n])
        with pytest.raises(ggml.FormatError, match=r"cut\.gguf: "):
            ggml.GGUFFile(cut)


def test_mutations_are_read_or_refused(path, tmp_path, rng):
    whole = bytearray(path.read_bytes())
    changed = tmp_path / "changed.gguf"
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(0, 700)
            data[at] = rng.choice([0, 1, 255, 128, rng.integers(0, 256)])
        changed.write_bytes(data)
        try:
            with ggml.GGUFFile(changed) as f:
                for name in f.tensors:
                    f.array(name)
        except ggml.FormatError:
            refused += 1
        except TypeError:  # ggml has the type but cannot decode it
            refused += 1
    assert refused > 200


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ggml.GGUFFile(tmp_path / "nothing.gguf")
    with pytest.raises(IsADirectoryError):
        ggml.GGUFFile(tmp_path)
