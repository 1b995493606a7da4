"""Random models of the benchmarks with the vocabulary of another file."""

import sys

import pytest

from benchmarks import shapes
from ggml_cffi import GGUFFile, models
from tests.support.byte_level_model import byte_level_model


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["shapes", *map(str, arguments)])
    assert shapes.main() == 0


@pytest.fixture
def source(tmp_path):
    return byte_level_model(tmp_path / "source.gguf", "{{ messages[0].content }}?", {})


def test_a_model_has_the_tokenizer_of_another_file(tmp_path, monkeypatch, source):
    alone, out = tmp_path / "vocabulary.gguf", tmp_path / "out.gguf"
    run(monkeypatch, "vocabulary", alone, "--vocabulary", source)
    with GGUFFile(alone) as file:
        assert not file.tensors
    run(monkeypatch, "tiny", out, "--type", "q4_k", "--vocabulary", alone)
    with models.load(source, ["CPU"], n_ctx=64) as other, models.load(out, ["CPU"], n_ctx=64) as model:
        assert model.tokenize("größe 12") == other.tokenize("größe 12")
        assert model.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi?"
        assert model.forward([1, 2]).shape == (2, len(other.tokenizer))
        assert model.architecture.n_embd == shapes.SHAPES["tiny"].n_embd
        assert len(list(model.generate_tokens([1, 2], 3, stop_at_end=False))) == 3


def test_a_file_without_a_vocabulary_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    run(monkeypatch, "tiny", path)
    with pytest.raises(ValueError, match=r"has no vocabulary: name another file for --vocabulary"):
        run(monkeypatch, "tiny", tmp_path / "out.gguf", "--vocabulary", path)
    with pytest.raises(SystemExit):
        run(monkeypatch, "vocabulary", tmp_path / "out.gguf")
