"""Byte-level byte-pair encoding: GPT-2, Llama 3, Qwen, SmolLM and most others."""

from __future__ import annotations

from ggml_cffi.errors import FormatError
from ggml_cffi.models.tokenizers.base import Encoder
from ggml_cffi.models.tokenizers.bpe import merge
from ggml_cffi.models.tokenizers.pre_tokenizers import PRE_TOKENIZERS
from ggml_cffi.models.tokenizers.vocabulary import Vocabulary


def byte_letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte: printable bytes stand for themselves, the others for letters from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_LETTERS = byte_letters()
_BYTES = {letter: b for b, letter in _LETTERS.items()}


class ByteLevelBPE(Encoder):
    """Vocabulary ``gpt2`` of ``tokenizer.ggml.model``: the bytes of a word are merged by a list of pairs."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        pre = vocabulary.get("pre", "default")
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise FormatError(f"{vocabulary.path}: the pre-tokenizer {pre!r:.80} is not supported; {known} are")
        self._pre_tokenizer = PRE_TOKENIZERS[pre]
        self.add_bos = self._pre_tokenizer.add_bos
        merges = vocabulary.strings("merges")
        # In reverse order: if a merge is listed twice, the first one counts.
        self._ranks = dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))

    def split(self, text: str) -> list[str]:
        return self._pre_tokenizer.split(text)

    def encode_word(self, word: str) -> list[int]:
        ids = self.vocabulary.ids
        letters = word.encode().decode("latin-1").translate(_LETTERS)
        if self._pre_tokenizer.ignore_merges and letters in ids:
            return [ids[letters]]
        tokens = []
        for symbol in merge(letters, self._ranks, " "):
            # A symbol that is not a token becomes the bytes of its letters. Bytes that are not tokens are lost, such as
            # some control characters with SmolLM2.
            for part in (symbol,) if symbol in ids else symbol.encode().decode("ascii", "surrogateescape"):
                if part in ids:
                    tokens.append(ids[part])
        return tokens

    def token_bytes(self, text: str) -> bytes:
        if all(letter in _BYTES for letter in text):
            return bytes(_BYTES[letter] for letter in text)
        return text.encode("utf-8", "surrogateescape")
