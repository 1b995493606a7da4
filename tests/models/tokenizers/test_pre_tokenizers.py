"""Pre-tokenizers compared with llama.cpp, with SmolLM2's vocabulary."""

import pytest

from ggml_cffi.models.tokenizers.pre_tokenizers import PRE_TOKENIZERS
from tests.scripts.make_tokens import FEW
from tests.support.tokenizers import TEXTS, answers, tokenizer_of, wrongly_encoded


@pytest.mark.parametrize("pre", answers("smollm2")["pre"])
def test_each_pre_tokenizer_splits_as_llama_cpp_does(metadata, pre):
    tokenizer = tokenizer_of(metadata["smollm2"], pre=pre)
    assert not wrongly_encoded(tokenizer, TEXTS[:FEW], answers("smollm2")["pre"][pre])


def test_every_pre_tokenizer_is_tested():
    tried = {PRE_TOKENIZERS[name].patterns for name in [*answers("smollm2")["pre"], "smollm"]}
    assert {kind.patterns for kind in PRE_TOKENIZERS.values()} <= tried
