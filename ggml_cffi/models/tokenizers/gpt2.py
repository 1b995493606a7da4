"""Byte-level byte-pair encoding: GPT-2, Llama 3, Qwen, SmolLM and most others."""

from __future__ import annotations

from ggml_cffi.errors import FormatError
from ggml_cffi.models.tokenizers.encoder import Encoder
from ggml_cffi.models.tokenizers.merging import merge
from ggml_cffi.models.tokenizers.vocabulary import Vocabulary
from ggml_cffi.models.tokenizers.words import PRE_TOKENIZERS


def byte_letters() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are moved up from 256."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


_LETTERS = byte_letters()
_BYTES = {letter: b for b, letter in _LETTERS.items()}


class ByteLevel(Encoder):
    """``tokenizer.ggml.model`` ``gpt2``: bytes, joined by a list of merges within words."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        pre = vocabulary.get("pre", "default")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise FormatError(f"{vocabulary.path}: the pre-tokenizer {pre!r:.80} is not supported; {known} are")
        self._pre = PRE_TOKENIZERS[pre]
        self.add_bos = self._pre.add_bos
        merges = vocabulary.strings("merges")
        # Backwards: of a merge that is there twice the first counts.
        self._ranks = dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))

    def words(self, text: str) -> list[str]:
        return self._pre.split(text)

    def tokens(self, word: str) -> list[int]:
        ids = self.vocabulary.ids
        letters = word.encode().decode("latin-1").translate(_LETTERS)
        if self._pre.ignore_merges and letters in ids:
            return [ids[letters]]
        tokens = []
        for symbol in merge(letters, self._ranks, " "):
            # What is no token falls apart into the bytes of its letters, and those that are no tokens are lost: so do
            # control characters with SmolLM2, which has no tokens for some of them.
            for part in (symbol,) if symbol in ids else symbol.encode().decode("ascii", "surrogateescape"):
                if part in ids:
                    tokens.append(ids[part])
        return tokens

    def token_bytes(self, text: str) -> bytes:
        if all(letter in _BYTES for letter in text):
            return bytes(_BYTES[letter] for letter in text)
        return text.encode("utf-8", "surrogateescape")
