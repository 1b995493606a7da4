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


#: Words of more characters are unknown, which keeps the time to encode them short.
_LONGEST_WORD = 100


class WordPiece(Encoder):
    """Vocabulary ``bert`` of ``tokenizer.ggml.model``: a word is cut, from its start, into the longest tokens.

    Characters and words are those of Hugging Face's tokenizers, with which the models were trained. GGUF marks the
    start of a word with U+2581, where BERT's own vocabulary marks the continuation with ``##``.
    """

    always_framed = True
    bos, sep = 101, 102
    longest_word: int | None = _LONGEST_WORD
    """Largest number of characters of a word that is not unknown; None for no limit."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.lower = vocabulary.flag("normalizer.lowercase", True)
        self.strip_accents = vocabulary.flag("normalizer.strip_accents", self.lower)
        self._characters = CharacterTable(self.normalize)
        self._lengths = sorted({len(text) for text in vocabulary.texts}, reverse=True)
        self._unknown = vocabulary.id("unknown", 100)

    def split(self, text: str) -> list[str]:
        return text.translate(self._characters).split()

    def normalize(self, character: str) -> str:
        """Return the normal form of a character, with spaces around each part that is a word of its own."""
        if character in "\t\n\r":
            return " "
        if character in "\0\ufffd" or unicodedata.category(character)[0] == "C":
            return ""
        if character in WHITESPACE:
            return " "
        if self.strip_accents:
            parts = unicodedata.normalize("NFD", character)
            normal = "".join(part for part in parts if unicodedata.category(part) != "Mn")
        else:
            normal = character
        normal = "".join(part.lower() for part in normal) if self.lower else normal
        if _is_chinese(character):
            return f" {normal} "
        return "".join(f" {part} " if _is_punctuation(part) else part for part in normal)

    def encode_word(self, word: str) -> list[int]:
        if self.longest_word is not None and len(word) > self.longest_word:
            return self._unknown_word()
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
                return self._unknown_word()
        return tokens

    def _unknown_word(self) -> list[int]:
        return [] if self._unknown is None else [self._unknown]

    def token_bytes(self, text: str) -> bytes:
        return text.replace(_START, " ").encode("utf-8", "surrogateescape")

    def clean_up(self, text: bytes) -> bytes:
        """Remove spaces before punctuation and contractions, and around lone apostrophes, as llama.cpp does."""
        text = re.sub(rb" (?=[?!.,])", b"", text).replace(b" ' ", b"'")
        return re.sub(rb" '(?=s|m|re|ve)", b"'", text)


class LlamaCppWordPiece(WordPiece):
    """WordPiece as llama.cpp computes it.

    The ids differ from those of :class:`WordPiece` where a character decomposes into several (Hangul), for marks that
    take space (category Mc, as in Hindi), for words of more than 100 characters, and for characters that Unicode has
    not assigned.
    """

    longest_word = None

    def normalize(self, character: str) -> str:
        if self.strip_accents and category(character) != "U":
            character = unicodedata.normalize("NFD", character)[0]
        general = category(character)
        if character in WHITESPACE:
            return " "
        if character == "\ufffd" or general == "C" or (self.strip_accents and general == "M"):
            return ""
        is_word = general == "P" or (general == "S" and character.isascii()) or _is_chinese(character)
        if self.lower and general != "U":
            character = character.lower()[0]
        return f" {character} " if is_word else character


def _is_punctuation(character: str) -> bool:
    if character.isascii():
        return character.isprintable() and not (character.isalnum() or character == " ")
    return unicodedata.category(character)[0] == "P"


def _is_chinese(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CHINESE)
