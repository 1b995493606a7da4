"""What the kinds of tokenizers have in common: text becomes words, and each word its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ggml_cffi.models.tokenizers.vocabulary import Vocabulary

_LONGEST_KEPT = 64
_MOST_KEPT = 50_000


class Encoder(ABC):
    """Tokens for text in which nothing is special.

    Parameters
    ----------
    vocabulary
        The tokens.

    Raises
    ------
    FormatError
        If it lacks something that this kind needs.
    """

    add_bos = False
    """Whether texts begin with the beginning token, where the file does not say."""
    framed = False
    """Whether texts always stand between the beginning and the separating token, whatever the file says."""
    bos: int | None = None
    """The beginning token, where the file names none."""
    eos: int | None = None
    """The ending token, where the file names none."""
    sep: int | None = None
    """The separating token, where the file names none."""

    space_first = False
    """Whether a space is put before a text, and before what follows a special token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._kept: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return [token for word in self.words(text) for token in self._word(word)]

    def _word(self, word: str) -> list[int]:
        tokens = self._kept.get(word)
        if tokens is None:
            tokens = self.tokens(word)
            if len(word) <= _LONGEST_KEPT:
                if len(self._kept) >= _MOST_KEPT:
                    self._kept.clear()
                self._kept[word] = tokens
        return tokens

    @abstractmethod
    def words(self, text: str) -> list[str]:
        """``text`` in parts that no token reaches beyond, written as tokens are."""

    @abstractmethod
    def tokens(self, word: str) -> list[int]:
        """Token ids of one word."""

    @abstractmethod
    def token_bytes(self, text: str) -> bytes:
        """What a normal token of this text stands for."""

    def clean(self, text: bytes) -> bytes:
        """What tokens stand for together, as it is to be read."""
        return text
