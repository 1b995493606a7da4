"""Base of the encoders of all vocabularies: they split a text into words, and encode each word by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ggml_cffi.models.tokenizers.vocabulary import Vocabulary

_LONGEST_CACHED_WORD = 64
_CACHED_WORDS = 50_000


class Encoder(ABC):
    """Encoder of text without special tokens; one subclass for each kind of vocabulary.

    Parameters
    ----------
    vocabulary
        The tokens.

    Raises
    ------
    FormatError
        If the vocabulary lacks something that this kind needs.
    """

    add_bos = False
    """True if sequences begin with the beginning token, unless the file has a flag for it."""
    always_framed = False
    """True if the beginning and the separating token always enclose a sequence, even if the file disagrees."""
    bos: int | None = None
    """Default id of the beginning token."""
    eos: int | None = None
    """Default id of the ending token."""
    sep: int | None = None
    """Default id of the separating token."""

    add_space_prefix = False
    """True if a space is put before a text, and before the text after a special token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""
        return [token for word in self.split(text) for token in self._encode_cached(word)]

    def _encode_cached(self, word: str) -> list[int]:
        """Return the token ids of one word; frequent words come from a cache."""
        tokens = self._cache.get(word)
        if tokens is None:
            tokens = self.encode_word(word)
            if len(word) <= _LONGEST_CACHED_WORD:
                if len(self._cache) >= _CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = tokens
        return tokens

    @abstractmethod
    def split(self, text: str) -> list[str]:
        """Return ``text`` as words, spelled as the vocabulary spells them. No token extends over two words."""

    @abstractmethod
    def encode_word(self, word: str) -> list[int]:
        """Return the token ids of one word."""

    @abstractmethod
    def token_bytes(self, text: str) -> bytes:
        """Return the bytes that a normal token with this text stands for."""

    def clean_up(self, text: bytes) -> bytes:
        """Return the decoded bytes of several tokens with corrected spaces, if this kind of vocabulary needs it."""
        return text
