"""Incremental detokenization and stop strings."""

import pytest

from ggml_cffi import models
from ggml_cffi.models.generation import IncrementalDetokenizer, check_stop
from tests.support.generation import batcher_of


class Letters:
    """A tokenizer whose ids are code points."""

    def incremental_decoder(self, *, special=False):
        return self

    def push(self, token):
        return chr(token)

    def finish(self):
        return ""


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("hello world", "wor", "hello "),
        ("hello world", ("xyz", "lo w"), "hel"),
        ("aab", "ab", "a"),
        ("ababac", "abac", "ab"),
        ("abab", "abac", "abab"),
        ("stop", "stop", ""),
        ("hello", None, "hello"),
    ],
)
def test_text_ends_before_a_stop_string(text, stop, want):
    detokenizer = IncrementalDetokenizer(Letters(), check_stop(stop))
    got = []
    for letter in text:
        got.append(detokenizer.push(ord(letter)))
        if detokenizer.stopped:
            break
    assert "".join(got) + detokenizer.finish() == want


def test_stop_must_be_strings_that_are_not_empty():
    with pytest.raises(TypeError, match="stop must be a string"):
        check_stop([1])
    with pytest.raises(ValueError, match="must not be empty"):
        check_stop("")


def test_a_stop_string_ends_generation(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=2) as model:
        whole = "".join(model.generate("The capital of France is", 12))
        assert "\n" in whole
        assert "".join(model.generate("The capital of France is", 12, stop="\n")) == whole.split("\n")[0]
        found = list(model.generate(["The capital of France is"], 12, stop=["\n"]))
        assert "".join(chunk for _, chunk in found) == whole.split("\n")[0]
        assert not batcher_of(model).active
