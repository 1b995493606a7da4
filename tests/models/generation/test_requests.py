"""Requests: several prompts in one call."""

import pytest

from ggml_cffi import models
from tests.support.generation import CLEAR


def test_a_list_of_prompts_gives_numbered_chunks(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=2) as model:
        want = ["".join(model.generate(text, 8)) for text in CLEAR]
        got = ["", "", ""]
        for number, piece in model.generate(CLEAR, 8, max_sequences=2):
            got[number] += piece
        assert got == want
        assert list(model.generate([], 8)) == []
        assert model.timings.decoded_tokens == 0
        chats = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Bye"}]]
        assert {number for number, _ in model.generate(chats, 4)} == {0, 1}
        with pytest.raises(ValueError, match="max_sequences must be at least 1"):
            model.generate(CLEAR, 8, max_sequences=0)
        # Each prompt has a seed of its own, and equal seeds give equal choices.
        again = [dict.fromkeys(range(3), "") for _ in range(2)]
        for found in again:
            for number, piece in model.generate(3 * ["Once upon"], 6, temperature=1.5, seed=3):
                found[number] += piece
        assert again[0] == again[1]
        assert len(set(again[0].values())) > 1
