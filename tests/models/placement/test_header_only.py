"""Plans of files that have only a header."""

import json

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli, models
from tests.support import gguf_writer
from tests.support.header_only import llama_header

SIZES = {"n_layers": 2, "n_embd": 256, "n_ff": 512, "n_vocab": 1000, "n_heads": 2, "n_kv": 1}


def test_a_file_without_data_is_planned_and_not_loaded(tmp_path, capsys):
    path = llama_header(tmp_path / "m.gguf", **SIZES)
    with pytest.raises(ggml.FormatError, match=r"cut short: ([\d,]+) bytes are missing: tensor 'token_embd") as caught:
        models.load(path, ["CPU"])
    with ggml.GGUFFile(path, header_only=True) as file:
        last = max(file.tensors.values(), key=lambda info: info.offset)
        missing = last.offset + last.nbytes - path.stat().st_size
        assert file.missing_bytes == missing
        assert f"{missing:,} bytes are missing" in str(caught.value)
        with pytest.raises(ggml.FormatError, match=r"the data of tensor 'output.weight' is missing"):
            file.array("output.weight")
    plan = models.plan(path, ["CPU"])
    assert plan.fits
    assert plan.missing_file_bytes == missing
    assert "of its tensors: it can be planned, not loaded." in str(plan)
    assert cli.main(["plan", str(path), "--devices", "CPU", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing_file_bytes"] == missing
    assert cli.main(["gguf", "show", str(path)]) == 0
    text = capsys.readouterr().out
    assert "The file is incomplete: " in text
    assert "blk.1.ffn_down.weight" in text
    assert cli.main(["gguf", "show", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["missing_bytes"] == missing


def test_a_model_without_data_is_not_timed(two_gpus, tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path))  # where no times are stored
    path = llama_header(tmp_path / "m.gguf", **SIZES)
    with pytest.raises(ValueError, match="split 'auto' times the model, whose data is not here: choose another split"):
        models.plan(path, two_gpus, "auto", n_ctx=64, n_batch=16)
    assert models.plan(path, ["CPU"], "auto").fits  # nothing to choose from


def test_the_plan_is_that_of_the_whole_file(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    with ggml.GGUFFile(path) as file:
        start = min(info.offset for info in file.tensors.values())
    for n in (start, start + 1000, len(whole) - 1):
        cut.write_bytes(whole[:n])
        assert models.plan(cut, ["CPU"]).devices == models.plan(path, ["CPU"]).devices
        assert models.plan(cut, ["CPU"]).missing_file_bytes >= len(whole) - n - 31  # the file ends with padding
    assert models.plan(path, ["CPU"]).missing_file_bytes == 0
    for n in (10, 1000):  # the header itself is cut short
        cut.write_bytes(whole[:n])
        with pytest.raises(ggml.FormatError, match=r"cut short|too few"):
            models.plan(cut, ["CPU"])


def test_parts_of_a_split_model_may_lack_data(tmp_path):
    for i, name in enumerate("ab"):
        values = {"split.no": i, "split.count": 2, "split.tensors.count": 2}
        part = tmp_path / f"m-{i + 1:05d}-of-00002.gguf"
        gguf_writer.write(part, values, {name: (ggml.F32, np.arange(8.0))})
        part.write_bytes(part.read_bytes()[: -8 * i or None])
    first = tmp_path / "m-00001-of-00002.gguf"
    with ggml.GGUFFile(first, header_only=True) as file:
        assert file.missing_bytes == 8
        assert file.array("a").tolist() == [*range(8)]
        with pytest.raises(ggml.FormatError, match=r"m-00002-of-00002.gguf: the data of tensor 'b' is missing"):
            file.array("b")
    with pytest.raises(ggml.FormatError, match=r"m-00002-of-00002.gguf: cut short: 8 bytes are missing"):
        ggml.GGUFFile(first)


def test_impossible_sizes_are_refused_without_data_too(tmp_path):
    path = llama_header(tmp_path / "m.gguf", **SIZES)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    raw[at : at + 16] = (2**62).to_bytes(8, "little") + (4).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(ggml.FormatError, match="reaches beyond the end of the file"):
        models.plan(path, ["CPU"])
