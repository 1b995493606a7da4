"""Perplexity compared with llama.cpp and float64."""

import numpy as np
import pytest

from ggml_cffi import models
from tests.support import DATA, llama_float64
from tests.support.generation import random_prompts


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("smollm2", 14.371341),
        # the sum is the same for all models; Gemma 3 is compared with llama.cpp by its tokens in every run
        pytest.param("gemma3", 18.211288, marks=pytest.mark.nightly),
    ],
)
def test_perplexity_is_that_of_llama_cpp(name, want):
    """Compare with llama-cpp-python 0.3.36 on the CPU (``want``): windows of 256 tokens of tests/data/prose.txt."""
    text = (DATA / "prose.txt").read_text(encoding="utf-8")
    with models.load(models.fetch(name), ["CPU"], n_ctx=256, n_threads=2) as model:
        found = model.perplexity(text, n_ctx=256)
    assert found.n_tokens == 635
    assert abs(found.value / want - 1) < 0.01


def test_perplexity_against_float64(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    (ids,) = random_prompts(rng, [100])
    reference = llama_float64.Reference(path)
    losses = []
    for start in (0, 32, 64):
        window = ids[start : start + 32]
        logits = reference.forward(window)[16:31]
        logits -= logits.max(1, keepdims=True)
        losses += [np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, window[17:], strict=True)]
    with models.load(path, ["CPU"]) as model:
        found = model.perplexity(ids, n_ctx=32)
        assert abs(found.value / np.exp(np.mean(losses)) - 1) < 1e-3
        assert found.n_tokens == len(losses) == 45
        assert 0 < found.error < found.value
        assert "±" in str(found)
        with pytest.raises(ValueError, match="do not fill a window of 512"):
            model.perplexity(ids)
        with pytest.raises(ValueError, match="n_ctx must be at least 2"):
            model.perplexity(ids, n_ctx=1)
