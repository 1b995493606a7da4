"""GGUF files: what is read, and what is refused."""

import struct

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


def test_tensors(path):
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
    assert kept[0, 0] == np.float32(a[0, 0])  # the mapping lives on with the array
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
        except TypeError:  # a type that ggml has but cannot decode
            refused += 1
    assert refused > 200


def head(n_tensors, n_pairs, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs) + rest


def tensor(name, shape, kind, offset=0):
    return gguf_writer.string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (head(0, 0, version=1), "version 1 is not supported"),
        (head(0, 0, version=3 << 24), "big-endian"),
        (head(2**63, 0, bytes(99)), "do not fit a file"),
        (head(0, 2**40, bytes(99)), "do not fit a file"),
        (head(0, 1, gguf_writer.string("k") + struct.pack("<I", 99) + bytes(99)), "value type 99"),
        (head(0, 1, gguf_writer.string("k") + struct.pack("<IIQ", 9, 8, 2**50) + bytes(9)), "strings does not fit"),
        (head(0, 1, gguf_writer.string("k") + struct.pack("<IIQ", 9, 9, 2**50) + bytes(9)), "do not fit the file"),
        (head(0, 1, gguf_writer.string("k") + struct.pack("<IIQ", 9, 5, 2**62) + bytes(9)), "cut short"),
        (head(0, 1, struct.pack("<Q", 2**63) + bytes(99)), "cut short"),
        (head(1, 0, tensor("t", (2**32, 2**32), 0) + bytes(99)), "reaches beyond the end"),
        (head(1, 0, tensor("t", (2**62, 4, 4, 4), 0) + bytes(99)), "reaches beyond the end"),
        (head(1, 0, tensor("t", (33,), 2) + bytes(99)), "blocks of 32"),
        (head(1, 0, tensor("t", (4,), 31) + bytes(99)), "type 31, which ggml does not have"),
        (head(1, 0, tensor("t", (4,), 0, 7) + bytes(99)), "not at a multiple of 32"),
        (head(1, 0, tensor("t", (0,), 0) + bytes(99)), "no elements"),
        (head(1, 0, tensor("t", (1, 1, 1, 1, 1), 0) + bytes(99)), "5 axes"),
        (head(2, 0, tensor("t", (1,), 0) * 2 + bytes(99)), "'t' occurs twice"),
        (head(0, 2, (gguf_writer.string("k") + struct.pack("<IB", 0, 1)) * 2 + bytes(99)), "'k' occurs twice"),
    ],
)
def test_lies_are_found(tmp_path, data, message):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(data)
    with pytest.raises(ggml.FormatError, match=message):
        ggml.GGUFFile(path)


@pytest.mark.parametrize("alignment", [0, 3, -32, "x", 0.5])
def test_impossible_alignments(tmp_path, alignment):
    kind = (GGUFType.INT32, alignment) if isinstance(alignment, int) else alignment
    path = gguf_writer.write(tmp_path / "a.gguf", {"general.alignment": kind}, {})
    with pytest.raises(ggml.FormatError, match=r"general.alignment .* not a power of two"):
        ggml.GGUFFile(path)


def test_other_alignment(tmp_path):
    tensors = {"a": (ggml.F32, np.ones(3)), "b": (ggml.F32, np.full(3, 2))}
    path = gguf_writer.write(tmp_path / "a.gguf", {"general.alignment": 64}, tensors, alignment=64)
    with ggml.GGUFFile(path) as f:
        assert f.array("b").tolist() == [2, 2, 2]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        ggml.GGUFFile(tmp_path / "nothing.gguf")
    with pytest.raises(IsADirectoryError):
        ggml.GGUFFile(tmp_path)


# ---------------------------------------------------------------------- several files


def split_values(part, count=3, n=4):
    return {
        "split.no": (GGUFType.UINT16, part),
        "split.count": (GGUFType.UINT16, count),
        "split.tensors.count": (GGUFType.INT32, n),
    }


def part(folder, i, count=3):
    return folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"


@pytest.fixture
def parts(tmp_path):
    """A model in three files, the first of which has no tensors, as gguf-split can write it."""
    contents = [{}, {"a": np.arange(3.0), "b": np.full((2, 32), 1.5)}, {"c": np.arange(5.0), "d": np.array(2.0)}]
    for i, arrays in enumerate(contents):
        values = split_values(i) | ({"general.architecture": "llama"} if i == 0 else {})
        tensors = {name: (ggml.Q8_0 if name == "b" else ggml.F32, array) for name, array in arrays.items()}
        gguf_writer.write(part(tmp_path, i), values, tensors)
    return tmp_path


def test_split_files(parts):
    with ggml.GGUFFile(part(parts, 0)) as f:
        assert f.paths == tuple(str(part(parts, i)) for i in range(3))
        assert [(t.name, t.part) for t in f.tensors.values()] == [("a", 1), ("b", 1), ("c", 2), ("d", 2)]
        assert f.metadata["general.architecture"] == "llama"
        assert f.array("a").tolist() == [0, 1, 2]
        np.testing.assert_allclose(f.array("b"), 1.5, rtol=1e-3)
        assert f.array("c").tolist() == [0, 1, 2, 3, 4]
        assert f.array("d") == 2
        info = f.tensors["c"]
        assert f.map_of(info) is f.maps[2]
        assert f.maps[2][info.offset : info.offset + info.nbytes] == f.raw("c").tobytes()
    with pytest.raises(ggml.ClosedError):
        f.maps  # noqa: B018


def test_one_part_of_one_is_a_file(tmp_path):
    path = gguf_writer.write(tmp_path / "any.gguf", split_values(0, 1, 1), {"a": (ggml.F32, np.ones(3))})
    with ggml.GGUFFile(path) as f:
        assert f.paths == (str(path),)
        assert list(f.tensors) == ["a"]


def rewrite(values, tensors=("c", "d")):
    return lambda p: gguf_writer.write(part(p, 2), values, {t: (ggml.F32, np.ones(3)) for t in tensors})


@pytest.mark.parametrize(
    ("change", "opened", "message"),
    [
        (lambda p: None, 1, r"m-00002-of-00003.gguf is part 2 of 3: open the first part, .*m-00001-of-00003.gguf"),
        (lambda p: part(p, 2).unlink(), 0, r"m-00003-of-00003.gguf is missing: it is part 3"),
        (lambda p: part(p, 2).write_bytes(b""), 0, r"m-00003-of-00003.gguf: 0 bytes are too few"),
        (lambda p: part(p, 2).write_bytes(b"x" * 99), 0, r"m-00003-of-00003.gguf: not a GGUF file"),
        (rewrite({}), 0, r"m-00003-of-00003.gguf: split.no is None"),
        (rewrite(split_values(1)), 0, r"m-00003-of-00003.gguf is no part .* split.no is 1, not 2"),
        (rewrite(split_values(2, 4)), 0, r"m-00003-of-00003.gguf is no part .* split.count is 4, not 3"),
        (rewrite(split_values(2, 3, 5)), 0, r"m-00003-of-00003.gguf is no part .* split.tensors.count is 5, not 4"),
        (rewrite(split_values(2) | {"split.no": "two"}), 0, r"m-00003-of-00003.gguf: split.no is 'two'"),
        (rewrite(split_values(2) | {"general.architecture": "bert"}), 0, r"m-00003.* its general.architecture is ano"),
        (rewrite(split_values(2) | {"general.name": "other"}), 0, r"m-00003.* its general.name is another"),
        (rewrite(split_values(2), ("c", "a")), 0, r"m-00003-of-00003.gguf: tensor 'a' is in another part"),
        (rewrite(split_values(2), ("c",)), 0, r"m-00001-of-00003.gguf: the 3 parts have 3 tensors, not 4"),
    ],
)
def test_parts_that_do_not_belong_together(parts, change, opened, message):
    change(parts)
    with pytest.raises(ggml.FormatError, match=message):
        ggml.GGUFFile(part(parts, opened))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (split_values(0), r"part 1 of 3; the others are found by a name that ends in -00001-of-00003.gguf"),
        (split_values(2), r"part 3 of 3; the others are found by a name that ends in -00003-of-00003.gguf"),
        ({"split.count": 3}, "split.no is None"),
        ({"split.count": "3"}, "split.count is '3'"),
        ({"split.count": True}, "split.count is True"),
    ],
)
def test_parts_without_their_names(tmp_path, values, message):
    path = gguf_writer.write(tmp_path / "any.gguf", values, {})
    with pytest.raises(ggml.FormatError, match=message):
        ggml.GGUFFile(path)


def test_impossibly_many_parts(tmp_path):
    n = 10**12
    values = {"split.no": 0, "split.count": (GGUFType.UINT64, n), "split.tensors.count": 0}
    path = gguf_writer.write(tmp_path / f"m-00001-of-{n}.gguf", values, {})
    with pytest.raises(ggml.FormatError, match="part 1 of 1000000000000"):
        ggml.GGUFFile(path)


def test_fields_have_the_types_of_the_file(path):
    with ggml.GGUFFile(path) as f:
        assert {key: f.fields[key].type for key in VALUES} == {key: kind for key, (kind, _) in VALUES.items()}
        nested = f.fields["nested"]
        assert (nested.type, nested.sub_type) == (GGUFType.ARRAY, GGUFType.ARRAY)
        assert [inner.sub_type for inner in nested.value] == [GGUFType.UINT8, GGUFType.STRING]
        assert f.fields["empty"].sub_type is GGUFType.STRING
