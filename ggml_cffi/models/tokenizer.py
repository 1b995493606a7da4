"""Text to token ids and back, from the vocabulary inside a GGUF file.

Byte-pair encoding itself is the ``tokenizers`` library's.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ggml_cffi.errors import FormatError
from ggml_cffi.gguf import GGUFFile

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
#: ``tokenizer.ggml.pre``: how text is cut into words before the merges, as regular expressions applied in turn.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
#: Texts of tokens that end an answer, beside the one that the file names.
_END_TEXTS = frozenset({"<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>"})


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are moved up from 256."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """The tokenizer of a GGUF file.

    Parameters
    ----------
    file
        The model file.

    Raises
    ------
    FormatError
        If the file has no vocabulary, or one of a kind that is not supported.
    """

    def __init__(self, file: GGUFFile) -> None:
        meta = file.metadata
        kind = meta.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise FormatError(f"{file.path}: the tokenizer {kind!r} is not supported; 'gpt2' (byte-level BPE) is")
        tokens: Any = meta.get("tokenizer.ggml.tokens")
        merges: Any = meta.get("tokenizer.ggml.merges", [])
        if not _strings(tokens) or not _strings(merges):
            raise FormatError(f"{file.path}: the vocabulary is missing or no list of strings")
        self._texts: list[str] = tokens
        types = meta.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32))
        if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
            raise FormatError(f"{file.path}: the token types are no list of {len(tokens)} integers")
        self._types: list[int] = types.tolist()
        self.bos = self._id(meta, "bos_token_id")
        """Id of the token that begins a text, None if there is none."""
        self.eos = self._id(meta, "eos_token_id")
        """Id of the token that ends a text, None if there is none."""
        self.add_bos = bool(meta.get("tokenizer.ggml.add_bos_token", False)) and self.bos is not None
        """Whether texts are encoded with the beginning token."""
        self.ends: frozenset[int] = frozenset(
            [i for i, text in enumerate(tokens) if text in _END_TEXTS and self._types[i] == _CONTROL]
            + [i for i in (self.eos, self._id(meta, "eot_token_id")) if i is not None]
        )
        """Ids after which an answer is over."""
        self._bytes: dict[int, bytes] = {}
        self._letters = _byte_letters()
        self._encoder = self._make(file, meta.get("tokenizer.ggml.pre", "default"), merges)

    def _id(self, meta: Any, key: str) -> int | None:
        value = meta.get(f"tokenizer.ggml.{key}")
        return value if isinstance(value, int) and 0 <= value < len(self._texts) else None

    def _make(self, file: GGUFFile, pre: Any, merges: list[str]) -> Any:
        from tokenizers import AddedToken, Regex
        from tokenizers import Tokenizer as Encoder
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise FormatError(f"{file.path}: the pre-tokenizer {pre!r} is not supported; {known} are")
        vocab = {text: i for i, text in enumerate(self._texts)}
        pairs = []
        for merge in merges:
            left, _, right = merge.partition(" ") if merge[:1] != " " else (merge[0], "", merge[2:])
            if left in vocab and right in vocab and left + right in vocab:
                pairs.append((left, right))
        try:
            encoder = Encoder(BPE(vocab=vocab, merges=pairs, ignore_merges=pre in ("llama-bpe", "llama3")))
            special = [i for i, t in enumerate(self._types) if t == _CONTROL]
            encoder.add_special_tokens([AddedToken(self._texts[i], normalized=False) for i in special])
            user = [i for i, t in enumerate(self._types) if t == _USER_DEFINED]
            encoder.add_tokens([AddedToken(self._texts[i], normalized=False) for i in user])
        except Exception as error:  # the library raises plain Exception
            raise FormatError(f"{file.path}: the vocabulary is not usable: {error}") from None
        splits = [Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
        encoder.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
        return encoder

    def __len__(self) -> int:
        return len(self._texts)

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of ``text``.

        Parameters
        ----------
        text
            Any text. Lone surrogates become U+FFFD.
        special
            Whether texts like ``<|im_end|>`` mean the token of that name; False for text that is not trusted.
        bos
            Whether to begin with the beginning token; default as the model wants it.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        clean = text.encode("utf-8", "replace" if text.isascii() else "surrogatepass").decode("utf-8", "replace")
        if special:
            ids = self._encoder.encode(clean, add_special_tokens=False).ids
        else:
            self._encoder.encode_special_tokens = True
            try:
                ids = self._encoder.encode(clean, add_special_tokens=False).ids
            finally:
                self._encoder.encode_special_tokens = False
        first = self.add_bos if bos is None else bos and self.bos is not None
        return [self.bos, *ids] if first else list(ids)  # type: ignore[list-item]

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; none for control tokens unless ``special``.

        Embeddings are often padded beyond the vocabulary: ids from there stand for nothing.
        """
        if token >= len(self._types):
            return b""
        kind = self._types[token]
        if kind in (_CONTROL, _UNUSED):
            return self._texts[token].encode("utf-8", "surrogateescape") if special else b""
        known = self._bytes.get(token)
        if known is None:
            text = self._texts[token]
            if kind == _USER_DEFINED or not all(letter in self._letters for letter in text):
                known = text.encode("utf-8", "surrogateescape")
            else:
                known = bytes(self._letters[letter] for letter in text)
            self._bytes[token] = known
        return known

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.
        """
        ids = self.check(tokens)
        return b"".join(self.token_bytes(t, special=special) for t in ids).decode("utf-8", "replace")

    def check(self, tokens: Iterable[int]) -> list[int]:
        """``tokens`` as a list of ids of this vocabulary."""
        return check_tokens(tokens, len(self))

    def stream(self) -> Stream:
        """Decodes token by token; pieces are held back until their characters are whole."""
        return Stream(self)


class Stream:
    """Incremental decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What was held back."""
        return self._decoder.decode(b"", final=True)


def check_tokens(tokens: Iterable[int] | Sequence[int], n_vocab: int) -> list[int]:
    """``tokens`` as a list of ids below ``n_vocab``.

    Raises
    ------
    TypeError, ValueError
        If they are no integers, or out of range.
    """
    try:
        ids = [t.__index__() for t in tokens]
    except (TypeError, AttributeError):
        raise TypeError(f"token ids are integers, not {tokens!r:.80}") from None
    for t in ids:
        if not 0 <= t < n_vocab:
            raise ValueError(f"token id {t} is not in the vocabulary of {n_vocab}")
    return ids


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
