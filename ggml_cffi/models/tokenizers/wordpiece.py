"""WordPiece: BERT and related models."""

from __future__ import annotations

import re
import unicodedata

from ggml_cffi.models.tokenizers.base import Encoder
from ggml_cffi.models.tokenizers.unicode_categories import WHITESPACE, CharacterTable, category
from ggml_cffi.models.tokenizers.vocabulary import Vocabulary

_START = "\u2581"
#: Blocks of Chinese characters. The gap after U+2B81F is as in Hugging Face's code and llama.cpp's.
_CHINESE = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


class WordPiece(Encoder):
    """Vocabulary ``bert`` of ``tokenizer.ggml.model``: a word is cut, from its start, into the longest tokens.

    GGUF marks the start of a word with U+2581, where BERT's own vocabulary marks the continuation with ``##``.
    """

    always_framed = True
    bos, sep = 101, 102

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._lower = vocabulary.flag("normalizer.lowercase", True)
        self._strip_accents = vocabulary.flag("normalizer.strip_accents", self._lower)
        self._characters = CharacterTable(self._normalize)
        self._lengths = sorted({len(text) for text in vocabulary.texts}, reverse=True)
        self._unknown = vocabulary.id("unknown", 100)

    def split(self, text: str) -> list[str]:
        return text.translate(self._characters).split()

    def _normalize(self, character: str) -> str:
        """Return the normal form of a character, with spaces around a character that is a word of its own."""
        if self._strip_accents and category(character) != "U":
            character = unicodedata.normalize("NFD", character)[0]
        general = category(character)
        if character in WHITESPACE:
            return " "
        if character == "\ufffd" or general == "C" or (self._strip_accents and general == "M"):
            return ""
        is_word = general == "P" or (general == "S" and character.isascii()) or _is_chinese(character)
        if self._lower and general != "U":
            character = character.lower()[0]
        return f" {character} " if is_word else character

    def encode_word(self, word: str) -> list[int]:
        ids = self.vocabulary.ids
        word = _START + word
        tokens, at = [], 0
        while at < len(word):
            for n in self._lengths:
                token = ids.get(word[at : at + n]) if at + n <= len(word) else None
                if token is not None:
                    tokens.append(token)
                    at += n
                    break
            else:
                return [] if self._unknown is None else [self._unknown]
        return tokens

    def token_bytes(self, text: str) -> bytes:
        return text.replace(_START, " ").encode("utf-8", "surrogateescape")

    def clean_up(self, text: bytes) -> bytes:
        """Remove spaces before punctuation and contractions, and around lone apostrophes, as llama.cpp does."""
        text = re.sub(rb" (?=[?!.,])", b"", text).replace(b" ' ", b"'")
        return re.sub(rb" '(?=s|m|re|ve)", b"'", text)


def _is_chinese(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CHINESE)
