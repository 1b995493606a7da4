"""Models that are split over several GGUF files."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.enums import GGUFType
from tests.support import gguf_writer


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
    """Write a model in three files, the first without tensors, as gguf-split can do."""
    contents = [{}, {"a": np.arange(3.0), "b": np.full((2, 32), 1.5)}, {"c": np.arange(5.0), "d": np.array(2.0)}]
    for i, arrays in enumerate(contents):
        values = split_values(i) | ({"general.architecture": "llama"} if i == 0 else {})
        tensors = {name: (ggml.Q8_0 if name == "b" else ggml.F32, array) for name, array in arrays.items()}
        gguf_writer.write(part(tmp_path, i), values, tensors)
    return tmp_path


def test_a_split_model_is_read_as_one(parts):
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


def test_a_single_part_may_have_any_name(tmp_path):
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
        (
            rewrite(split_values(2) | {"general.architecture": "bert"}),
            0,
            r"m-00003.* differ in general.architecture",
        ),
        (rewrite(split_values(2) | {"general.name": "other"}), 0, r"m-00003.* the two differ in general.name"),
        (rewrite(split_values(2), ("c", "a")), 0, r"m-00003-of-00003.gguf: tensor 'a' is in another part"),
        (rewrite(split_values(2), ("c",)), 0, r"m-00001-of-00003.gguf: the 3 parts have 3 tensors, not 4"),
    ],
)
def test_parts_of_different_models_are_refused(parts, change, opened, message):
    change(parts)
    with pytest.raises(ggml.FormatError, match=message):
        ggml.GGUFFile(part(parts, opened))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (split_values(0), r"part 1 of 3: its name must end in -00001-of-00003.gguf"),
        (split_values(2), r"part 3 of 3: its name must end in -00003-of-00003.gguf"),
        ({"split.count": 3}, "split.no is None"),
        ({"split.count": "3"}, "split.count is '3'"),
        ({"split.count": True}, "split.count is True"),
    ],
)
def test_parts_under_other_names_are_refused(tmp_path, values, message):
    path = gguf_writer.write(tmp_path / "any.gguf", values, {})
    with pytest.raises(ggml.FormatError, match=message):
        ggml.GGUFFile(path)


def test_an_impossible_number_of_parts_is_refused(tmp_path):
    n = 10**12
    values = {"split.no": 0, "split.count": (GGUFType.UINT64, n), "split.tensors.count": 0}
    path = gguf_writer.write(tmp_path / f"m-00001-of-{n}.gguf", values, {})
    with pytest.raises(ggml.FormatError, match="part 1 of 1000000000000"):
        ggml.GGUFFile(path)
