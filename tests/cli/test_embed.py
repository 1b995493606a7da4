"""The command ``ggml-cffi embed``."""

import io
import json

import numpy as np
import pytest

from ggml_cffi import cli, models
from tests.support import DATA, bert_float64
from tests.support.embedding import minilm_file

GOLDEN = json.loads((DATA / "minilm.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """Return a function from a type to the GGUF file of all-MiniLM-L6-v2 with such weights."""
    source, folder = models.fetch("minilm"), tmp_path_factory.mktemp("minilm")
    return lambda dtype: minilm_file(folder, source, dtype)


def test_the_command_prints_a_line_for_each_text(minilm, capsys, monkeypatch):
    arguments = ["embed", str(minilm("f16")), "--devices", "CPU", "--threads", "1"]
    texts = [case["text"] for case in GOLDEN["cases"][:3]]
    want = np.array([case["embedding"] for case in GOLDEN["cases"][:3]])
    assert cli.main([*arguments, "--text", *texts[:2], "-t", texts[2]]) == 0
    got = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert (got * want).sum(1).min() >= 0.9999
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{text}\r\n" for text in texts)))
    assert cli.main([*arguments, "--raw", "--pooling", "mean"]) == 0
    raw = np.array([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert ((raw * want).sum(1) / np.linalg.norm(raw, axis=1)).min() >= 0.9999
    assert np.linalg.norm(raw, axis=1).min() > 1.1


def test_the_command_writes_an_array(minilm, tmp_path, capsys):
    path = tmp_path / "vectors"
    assert cli.main(["embed", str(minilm("f16")), "-t", "Hello", "--devices", "CPU", "-o", str(path)]) == 0
    assert np.load(path) @ np.array(GOLDEN["cases"][0]["embedding"]) >= 0.9999
    assert capsys.readouterr().out == ""


def test_the_command_reports_an_error_in_one_line(tmp_path, rng, capsys):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    for arguments, message in (
        (["-t", "x", "--devices", "CPU"], "tokenizer 'no_vocab'"),
        (["-t", "x", "--devices", "Vulkan99"], "no device 'Vulkan99'"),
    ):
        assert cli.main(["embed", str(path), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
