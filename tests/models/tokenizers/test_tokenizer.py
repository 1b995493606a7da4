"""Tokenizers of real models: ids and texts compared with llama.cpp's, round trips, arguments."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scripts.make_tokens import FEW, digest
from tests.support.tokenizers import (
    ANY_TEXT,
    NAMES,
    TEXTS,
    answers,
    round_trip,
    split_digests,
    tokenizer_of,
    wrongly_encoded,
)


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_texts_are_encoded_as_by_llama_cpp(tokenizers, name):
    """Compare the ids with special tokens and without, and the text that is decoded from the former."""
    tokenizer, want = tokenizers[name], answers(name)
    for text, special, plain in want["examples"]:
        assert (tokenizer.encode(text), tokenizer.encode(text, special=False)) == (special, plain)
    wrong, changed = [], []
    for text, expected in zip(TEXTS, split_digests(want["digests"], len(TEXTS)), strict=True):
        ids, plain = tokenizer.encode(text), tokenizer.encode(text, special=False)
        decoded = tokenizer.decode(ids, special=True)
        if digest(ids, plain, decoded, size=3) != expected:
            wrong.append(text)
        if decoded != round_trip(name, text):
            changed.append(text)
    assert not wrong
    assert name == "minilm" or not changed


def test_a_space_prefix_is_added_and_removed(metadata):
    """Llama 2's vocabulary needs the prefix. The test sets the flag for Gemma's vocabulary."""
    tokenizer = tokenizer_of(metadata["gemma3"], add_space_prefix=True)
    assert not wrongly_encoded(tokenizer, TEXTS[:FEW], answers("gemma3")["add_space_prefix"])
    for text in TEXTS[:FEW]:
        assert tokenizer.decode(tokenizer.encode(text, bos=False), special=True) == text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode("one <eos> two")) == "one  two"


def test_end_tokens_are_those_of_llama_cpp(tokenizers):
    assert tokenizers["smollm2"].end_tokens == {0, 2, 4}  # <|endoftext|>, <|im_end|>, <reponame>
    assert tokenizers["gemma3"].end_tokens == {1, 106, 212}  # <eos>, <end_of_turn>, </s>
    assert tokenizers["minilm"].end_tokens == {0, 102}  # [PAD], [SEP]


def test_untrusted_texts_are_decoded_unchanged(tokenizers):
    smollm2, gemma3 = tokenizers["smollm2"], tokenizers["gemma3"]
    for text in TEXTS[:1000]:
        assert smollm2.decode(smollm2.encode(text, special=False)) == round_trip("smollm2", text)
        assert gemma3.decode(gemma3.encode(text, special=False)) == text.replace("▁", " ")


def test_incremental_decoding_gives_the_same_text_as_decode(tokenizers):
    for name in ("smollm2", "gemma3"):
        tokenizer = tokenizers[name]
        for text in TEXTS[:500]:
            ids = tokenizer.encode(text)
            decoder = tokenizer.incremental_decoder()
            assert "".join([*map(decoder.push, ids), decoder.finish()]) == tokenizer.decode(ids)


def test_wordpiece_loses_case_accents_and_spaces(tokenizers):
    """Compare the decoded text with llama.cpp's."""
    tokenizer = tokenizers["minilm"]
    ids = tokenizer.encode("Größe, naïve: don't  EMBED\tthis 漢字 🙂?")
    assert ids[0] == tokenizer.bos == 101
    assert ids[-1] == tokenizer.sep == 102
    assert tokenizer.decode(ids) == " große, naive : don't embed this 漢?"  # unknown: 字 and 🙂
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode("embedding", bos=False) == tokenizer.encode("embedding")[1:-1]


def test_special_tokens_are_recognised_only_in_trusted_text(tokenizers):
    for name, text, token in (
        ("smollm2", "<|im_end|>", 2),
        ("gemma3", "<end_of_turn>", 106),
        ("minilm", "[MASK]", 103),
    ):
        tokenizer = tokenizers[name]
        assert tokenizer.encode(text, bos=False) == [token]
        assert token not in tokenizer.encode(text, special=False, bos=False)
        assert tokenizer.decode([token]) == ""
        assert tokenizer.decode([token], special=True) == text
        assert tokenizer.encode(f"a{text}b", bos=False).count(token) == 1


def test_control_characters_and_surrogates_are_encoded(tokenizers):
    gemma3 = tokenizers["gemma3"]
    for text in ("a\0b", "\0", "\x01\x7f\x80\x9f", "\ufeff", "\ufffe\uffff\U0010ffff"):
        assert gemma3.decode(gemma3.encode(text, bos=False)) == text
    for tokenizer in tokenizers.values():
        assert tokenizer.encode("x\ud800y\udfff") == tokenizer.encode("x\ufffdy\ufffd")
        assert tokenizer.encode("\ud83d\ude42") == tokenizer.encode("🙂")  # a pair is one character
        with pytest.raises(TypeError, match="text must be a str, not bytes"):
            tokenizer.encode(b"x")


def test_beginning_and_ending_tokens_are_added_as_the_file_says(metadata):
    plain = tokenizer_of(metadata["smollm2"])
    assert (plain.bos, plain.eos, plain.add_bos, plain.add_eos, plain.add_sep) == (1, 2, False, False, False)
    assert plain.encode("a", bos=True) == [1, *plain.encode("a")]
    both = tokenizer_of(metadata["smollm2"], add_bos_token=True, add_eos_token=True)
    assert both.encode("a") == [1, *plain.encode("a"), 2]
    assert both.encode("a", bos=False) == plain.encode("a")
    llama3 = tokenizer_of(metadata["smollm2"], pre="llama-bpe", add_bos_token=None)
    assert llama3.add_bos
    nameless = tokenizer_of(metadata["smollm2"], add_bos_token=True, bos_token_id=None, eos_token_id=99999)
    assert (nameless.bos, nameless.eos, nameless.add_bos) == (None, None, False)
    assert nameless.encode("a", bos=True) == plain.encode("a")
    gemma3 = tokenizer_of(metadata["gemma3"], bos_token_id=None, add_bos_token=None)
    assert gemma3.bos == 1  # SentencePiece's own
    assert gemma3.add_bos


def test_token_bytes_and_padding(tokenizers, metadata):
    gemma3, texts = tokenizers["gemma3"], list(metadata["gemma3"]["tokenizer.ggml.tokens"])
    (newline,) = gemma3.encode("\n", bos=False)
    assert gemma3.token_bytes(newline) == b"\n"
    assert gemma3.token_bytes(texts.index("<0xFF>")) == b"\xff"
    assert gemma3.token_bytes(texts.index("▁the")) == b" the"
    assert gemma3.token_bytes(len(gemma3)) == b""  # embeddings may be padded
    assert gemma3.decode([texts.index("<0xFF>")]) == "\ufffd"
    with pytest.raises(ValueError, match="token id 262144 is not in the vocabulary of 262144"):
        gemma3.decode([262144])
    with pytest.raises(TypeError, match="token ids must be integers"):
        gemma3.decode(["x"])


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT, st.booleans())
def test_any_text_is_decoded_unchanged(tokenizers, text, special):
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    gemma3 = tokenizers["gemma3"]
    assert gemma3.decode(gemma3.encode(text, special=special, bos=False), special=special) == clean.replace("▁", " ")


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "\n" * 100_000, "漢" * 50_000, "<unused1>" * 10_000])
def test_long_words_take_linear_time(tokenizers, text):
    """In quadratic time these words would take hours."""
    for name in ("smollm2", "gemma3"):
        tokenizer = tokenizers[name]
        assert tokenizer.decode(tokenizer.encode(text, special=False, bos=False)) == text
    assert tokenizers["minilm"].encode(text)[-1] == 102
