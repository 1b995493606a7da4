"""Headers of GGUF files: every impossible header is refused."""

import struct

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.enums import GGUFType
from tests.support import gguf_writer


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
        (head(1, 0, tensor("t", (4,), 31, 32 * 99) + bytes(99)), "reaches beyond the end"),
        (head(1, 0, tensor("t", (4,), 0, 7) + bytes(99)), "not at a multiple of 32"),
        (head(1, 0, tensor("t", (0,), 0) + bytes(99)), "no elements"),
        (head(1, 0, tensor("t", (1, 1, 1, 1, 1), 0) + bytes(99)), "5 axes"),
        (head(2, 0, tensor("t", (1,), 0) * 2 + bytes(99)), "'t' occurs twice"),
        (head(0, 2, (gguf_writer.string("k") + struct.pack("<IB", 0, 1)) * 2 + bytes(99)), "'k' occurs twice"),
    ],
)
def test_impossible_headers_are_refused(tmp_path, data, message):
    path = tmp_path / "wrong.gguf"
    path.write_bytes(data)
    with pytest.raises(ggml.FormatError, match=message):
        ggml.GGUFFile(path)


@pytest.mark.parametrize("number", [31, 99, 2**31, 2**32 - 1])
def test_a_file_with_an_unknown_type_is_listed_but_its_tensor_is_not_read(tmp_path, number):
    path = tmp_path / "unknown.gguf"
    entries = tensor("known", (4,), 0, 0) + tensor("new", (64, 2), number, 32) + tensor("last", (8,), 0, 96)
    path.write_bytes(head(3, 0, entries) + bytes(31 + 128))
    with ggml.GGUFFile(path) as file:
        info = file.tensors["new"]
        assert (info.dtype.name, int(info.dtype), info.shape, info.nbytes) == (f"TYPE_{number}", number, (2, 64), 64)
        assert file["known"].numpy().shape == (4,)
        match = rf"the loaded ggml does not have the type {number} "
        with pytest.raises(ggml.FormatError, match=rf"unknown.gguf: tensor 'new': {match}"):
            file["new"].numpy()
        with ggml.Session(["CPU"]) as session, pytest.raises(TypeError, match=match):
            session.weight(file["new"])
        with pytest.raises(TypeError, match=match):
            ggml.write_gguf(tmp_path / "copy.gguf", {}, {"new": file["new"]})
        with ggml.Context() as context, pytest.raises(TypeError, match=match):
            context.new_tensor(info.dtype, (64,))


@pytest.mark.parametrize("alignment", [0, 3, -32, "x", 0.5])
def test_impossible_alignments_are_refused(tmp_path, alignment):
    kind = (GGUFType.INT32, alignment) if isinstance(alignment, int) else alignment
    path = gguf_writer.write(tmp_path / "a.gguf", {"general.alignment": kind}, {})
    with pytest.raises(ggml.FormatError, match=r"general.alignment .* not a power of two"):
        ggml.GGUFFile(path)


def test_another_alignment_is_read(tmp_path):
    tensors = {"a": (ggml.F32, np.ones(3)), "b": (ggml.F32, np.full(3, 2))}
    path = gguf_writer.write(tmp_path / "a.gguf", {"general.alignment": 64}, tensors, alignment=64)
    with ggml.GGUFFile(path) as f:
        assert f.array("b").tolist() == [2, 2, 2]
