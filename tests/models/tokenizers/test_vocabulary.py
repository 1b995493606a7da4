"""Vocabularies: malformed, odd and random ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi.enums import GGUFType
from ggml_cffi.models import Tokenizer
from tests.scripts.make_tokens import VOCABULARIES, VOCABULARY_TEXTS
from tests.support import gguf_writer, random_vocabulary
from tests.support.tokenizers import (
    ANY_TEXT,
    BERT,
    GPT2,
    LLAMA,
    answers,
    tokenizer_of,
    tokenizer_of_file,
    wrongly_encoded,
)


def test_random_vocabularies_encode_as_in_llama_cpp(tmp_path):
    """The vocabularies have merges without a token, missing bytes, special tokens that overlap or absorb spaces."""
    wrong = []
    for seed, want in zip(range(VOCABULARIES), answers("random")["digests"], strict=True):
        vocabulary = random_vocabulary.Vocabulary(seed)
        with ggml.GGUFFile(vocabulary.write(tmp_path / "v.gguf")) as file:
            tokenizer = Tokenizer(file)
        texts = vocabulary.texts(VOCABULARY_TEXTS)
        wrong += [(seed, text) for text in wrongly_encoded(tokenizer, texts, want)]
    assert not wrong


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (GPT2, {"model": None}, "the tokenizer None is not supported; gpt2, llama, bert are"),
        (GPT2, {"model": "rwkv"}, "the tokenizer 'rwkv' is not supported"),
        (GPT2, {"model": 1}, "the tokenizer 1 is not supported"),
        (GPT2, {"tokens": None}, "'tokenizer.ggml.tokens' is missing or not a list of strings"),
        (GPT2, {"tokens": [1, 2]}, "tokens' is missing or not a list of strings"),
        (GPT2, {"tokens": (GGUFType.ARRAY, (GGUFType.STRING, []))}, "the vocabulary is empty"),
        (GPT2, {"tokens": ["a", "b", "a"]}, "the token 'a' occurs 2 times in the vocabulary"),
        (GPT2, {"merges": None}, "merges' is missing or not a list of strings"),
        (GPT2, {"merges": "a b"}, "merges' is missing or not a list of strings"),
        (GPT2, {"pre": "gpt-9"}, "the pre-tokenizer 'gpt-9' is not supported; default, gpt-2"),
        (GPT2, {"pre": 3}, "the pre-tokenizer 3 is not supported"),
        (GPT2, {"token_type": [1, 1, 1]}, "token_type' is not a list of 4 numbers"),
        (GPT2, {"token_type": ["x"] * 4}, "token_type' is not a list of 4 numbers"),
        (LLAMA, {"scores": None}, "scores' is not a list of 8 numbers"),
        (LLAMA, {"scores": ["x"] * 8}, "scores' is not a list of 8 numbers"),
        (LLAMA, {"token_type": [2, 3, 3, 1, 6, 1, 6, 1]}, "the byte token 'b' is not spelled like <0x00> to <0xFF>"),
    ],
)
def test_malformed_vocabularies_are_refused(tmp_path, base, changes, message):
    with pytest.raises(ggml.FormatError, match=message):
        tokenizer_of_file(tmp_path, base, **changes)


def test_odd_vocabularies_are_accepted(tmp_path):
    gpt2 = tokenizer_of_file(tmp_path, GPT2, merges=["", " ", "a", "a b", "a b", "b  a", "x y z"])
    assert gpt2.encode("abb</s>x") == [2, 1, 3]
    assert gpt2.end_tokens == {3}
    assert gpt2.decode([3]) == ""  # a control token by its text, whatever type the file gives
    llama = tokenizer_of_file(tmp_path, LLAMA)
    assert llama.encode("ab\nc") == [1, 7, 5, 6, 0]  # no byte tokens for c: unknown
    assert llama.decode([1, 7, 5, 6]) == "ab\n"
    unscored = (GGUFType.ARRAY, (GGUFType.FLOAT32, [float("nan"), float("inf")] * 4))
    assert tokenizer_of_file(tmp_path, LLAMA, scores=unscored).encode("ab", bos=False) in ([7, 5], [7, 3, 4])
    bert = tokenizer_of_file(tmp_path, BERT, unknown_token_id=0, bos_token_id=1, seperator_token_id=2)
    assert bert.encode("A ab c á") == [1, 3, 3, 4, 0, 3, 2]
    assert tokenizer_of_file(tmp_path, BERT).encode("a b") == [3]  # no frame, and no unknown token
    empty = tokenizer_of_file(tmp_path, GPT2, tokens=["a", "b", "", "</s>"])
    assert empty.decode([2]) == "[EMPTY_2]"
    no_byte_letters = tokenizer_of_file(tmp_path, GPT2, tokens=["a", "b", "漢", "x y"])
    assert no_byte_letters.decode([2, 3]) == "漢x y"


def test_some_special_tokens_absorb_whitespace(tmp_path):
    """Phi 3's tokens absorb spaces after them, some models' mask token those before it: GGUF has only their names."""
    tokens = ["<unk>", "<s>", "</s>", "a", "<|end|>", "<mask>", "▁", "<|endoftext|>"]
    base = LLAMA | {"tokens": tokens, "token_type": [2, 3, 3, 1, 3, 3, 1, 3], "add_space_prefix": False}
    values = {f"tokenizer.ggml.{key}": value for key, value in base.items()}

    def encode(text, **more):
        path = gguf_writer.write(tmp_path / "v.gguf", values | more, {})
        with ggml.GGUFFile(path) as file:
            return Tokenizer(file).encode(text, bos=False)

    text = "a <mask> a<|end|>  a"
    assert encode(text) == [3, 6, 5, 6, 3, 4, 6, 6, 3]
    assert encode(text, **{"general.name": "Phi-3"}) == [3, 6, 5, 3, 4, 3]
    assert encode(text, **{"general.architecture": "jina-bert-v3"}) == [3, 5, 6, 3, 4, 6, 6, 3]


FILE_TEXT = st.one_of(
    st.binary(max_size=10).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    ANY_TEXT.map(lambda text: text.encode("utf-8", "replace").decode()),
)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["gpt2", "llama", "bert"]),
    st.lists(st.tuples(FILE_TEXT, st.integers(-1, 7), st.floats(width=32)), min_size=1, max_size=20),
    st.lists(FILE_TEXT, max_size=10),
    st.dictionaries(st.sampled_from(["bos_token_id", "unknown_token_id", "add_bos_token"]), st.integers(-1, 25)),
    ANY_TEXT,
    st.booleans(),
)
def test_any_vocabulary_encodes_any_text(kind, tokens, merges, more, text, special):
    texts, types, scores = zip(*tokens, strict=True)
    model = {
        "model": kind,
        "tokens": list(texts),
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "merges": merges,
    }
    try:
        tokenizer = tokenizer_of({}, **model, **more)
    except ggml.FormatError:
        return
    ids = tokenizer.encode(text, special=special)
    assert tokenizer.check(ids) == ids
    assert isinstance(tokenizer.decode(ids, special=special), str)
