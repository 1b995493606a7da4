"""WordPiece: the tokens of Hugging Face's tokenizers, and where llama.cpp's differ."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models import Tokenizer
from ggml_cffi.models.tokenizers.unicode_categories import WHITESPACE
from tests.support.embedding import minilm_file
from tests.support.tokenizers import tokenizer_of

CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
CHINESE += ((0x20000, 0x2A6DF), (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF))


def words(text):
    """Return the words of a text in the steps of Hugging Face's ``BertNormalizer`` and ``BertPreTokenizer``."""
    kept = [c for c in text if c in "\t\n\r" or (c not in "\0\ufffd" and unicodedata.category(c)[0] != "C")]
    spaced = [" " if c in WHITESPACE else f" {c} " if any(a <= ord(c) <= b for a, b in CHINESE) else c for c in kept]
    plain = [c for c in unicodedata.normalize("NFD", "".join(spaced)) if unicodedata.category(c) != "Mn"]
    lower = [part for c in plain for part in c.lower()]
    ascii_punctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    parts = [f" {c} " if c in ascii_punctuation or unicodedata.category(c)[0] == "P" else c for c in lower]
    return "".join(parts).split()


def reference(vocabulary, text):
    """Return the ids of a text, the longest token first in each word."""
    ids = [101]
    for word in words(text):
        found, at = [], 0
        while at < len(word) <= 100:
            end = next((e for e in range(len(word), at, -1) if ("" if at else "\u2581") + word[at:e] in vocabulary), 0)
            if not end:
                found = []
                break
            found.append(vocabulary[("" if at else "\u2581") + word[at:end]])
            at = end
        ids += found or [100]
    return [*ids, 102]


@pytest.fixture(scope="module")
def both(metadata):
    """Return the vocabulary by text, and the tokenizer as Hugging Face's and as llama.cpp's."""
    texts = metadata["minilm"]["tokenizer.ggml.tokens"]
    tokenizers = [tokenizer_of(metadata["minilm"], llama_cpp=flag) for flag in (False, True)]
    return {text: i for i, text in enumerate(texts)}, *tokenizers


@pytest.mark.parametrize(
    ("text", "ids"),  # by the library tokenizers, with the file of all-MiniLM-L6-v2
    [
        ("Plain café text, déjà vu!", [101, 5810, 7668, 3793, 1010, 2139, 3900, 24728, 999, 102]),
        (
            "한국어 테스트",
            [101, 1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008, 1467, 30009, 29997, 30017, 30003, 30017, 102],
        ),
        ("हिन्दी भाषा", [101, 1339, 29877, 29863, 29861, 29878, 1330, 29876, 29873, 29876, 102]),
        ("key " + "QUJD" * 30 + " end", [101, 3145, 100, 2203, 102]),
        ("ΟΔΟΣ", [101, 1169, 29722, 29730, 29733, 102]),
        ("漢字かな交じり文。", [101, 1904, 100, 1651, 30193, 100, 1657, 30212, 1861, 1636, 102]),
        ("x\xadyz\u200bw\u2028v", [101, 1060, 2100, 2480, 2860, 1058, 102]),
    ],
)
def test_ids_are_those_of_hugging_face(both, text, ids):
    vocabulary, tokenizer, _ = both
    assert tokenizer.encode(text) == ids == reference(vocabulary, text)


@pytest.mark.parametrize("text", ["한국어", "हिन्दी", "a" * 101], ids=["Hangul", "marks", "a long word"])
def test_llama_cpp_differs_and_can_be_chosen(both, text):
    vocabulary, tokenizer, as_llama_cpp = both
    assert tokenizer.encode(text) == reference(vocabulary, text)
    assert as_llama_cpp.encode(text) != tokenizer.encode(text)


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.characters(exclude_categories=["Cn", "Cs"], exclude_characters="\x0b\x0c\x1c\x1d\x1e\x1f\x85"), max_size=40
    )
)
def test_any_text_is_encoded_as_by_the_steps_of_hugging_face(both, text):
    vocabulary, tokenizer, _ = both
    assert tokenizer.encode(text, special=False) == reference(vocabulary, text)


def test_a_model_takes_another_tokenizer(tmp_path):
    path = minilm_file(tmp_path, models.fetch("minilm"), ggml.F16)
    with models.load(path, ["CPU"], n_threads=1) as model, ggml.GGUFFile(path) as file:
        first = model.embed(["한국어 테스트"])[0]
        model.tokenizer = Tokenizer(file, llama_cpp=True)
        assert first @ model.embed(["한국어 테스트"])[0] < 0.9
