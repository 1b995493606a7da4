"""The vocabulary of a GGUF file, read as llama.cpp reads it: texts and types of tokens, special tokens."""

from __future__ import annotations

import re
from collections import Counter
from enum import IntEnum
from typing import Any

import numpy as np

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile


class TokenType(IntEnum):
    """Types of tokens: values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Types of tokens that are found in a text before it is split into words.
SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
#: Texts of tokens that end an answer, also if the file gives them another type.
_END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
)
#: Tokens of the harmony format, where ``<|end|>`` ends one channel of an answer, and another channel follows.
_CHANNEL_TEXTS = ("<|return|>", "<|call|>", "<|end|>")
#: Texts of code models' tokens by purpose, for files that name no token for that purpose.
_CODE_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
#: Older names of purposes in files, which llama.cpp still reads.
_OLD_PURPOSES = {"fim_pre": "prefix", "fim_suf": "suffix", "fim_mid": "middle"}
#: Purposes of code models' tokens that end an answer: the text after them belongs to another file.
_CODE_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_WHITESPACE = " \t\n\v\f\r"  # as C's isspace


class Vocabulary:
    """Tokens by number and by text.

    Parameters
    ----------
    file
        The model file.

    Raises
    ------
    FormatError
        If the file has no vocabulary, or a malformed one.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path, self._metadata = file.path, file.metadata
        texts = self.strings("tokens")
        if not texts:
            raise FormatError(f"{self.path}: the vocabulary is empty")
        if "" in texts:
            texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        self.texts: list[str] = texts
        """Text of each token."""
        self.ids: dict[str, int] = dict(zip(texts, range(len(texts)), strict=True))
        """Id of each text."""
        if len(self.ids) < len(texts):
            text, count = Counter(texts).most_common(1)[0]
            raise FormatError(f"{self.path}: the token {text!r:.80} occurs {count} times in the vocabulary")
        self.types: list[int] = self.numbers("token_type", "iu", TokenType.NORMAL).tolist()
        """Type of each token: a :class:`TokenType`, or another number from the file."""
        for i in np.flatnonzero(np.equal(self.types, TokenType.BYTE)):
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", texts[i]):
                raise FormatError(f"{self.path}: the byte token {texts[i]!r:.80} is not spelled like <0x00> to <0xFF>")
        self.end_tokens = self._end_tokens()
        """Ids of the tokens that end an answer."""
        self._strip_left, self._strip_right = self._strips()
        self._special = self._index()

    # ------------------------------------------------------------------ metadata

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the tokenizer's metadata."""
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        """Return a list of strings from the metadata.

        Raises
        ------
        FormatError
            If the value is missing, or not a list of strings.
        """
        value = self.get(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise FormatError(f"{self.path}: 'tokenizer.ggml.{key}' is missing or not a list of strings")
        return value

    def numbers(self, key: str, kinds: str, default: float | None) -> np.ndarray[Any, Any]:
        """Return one number for each token from the metadata.

        Parameters
        ----------
        key
            Key of the list.
        kinds
            Allowed dtype kinds of numpy.
        default
            Number for all tokens if the file has no such list; None if it must have one.

        Raises
        ------
        FormatError
            If the value is missing, or is not a list with a number for each token.
        """
        value, n = self.get(key), len(self.texts)
        if value is None and default is not None:
            return np.full(n, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) < n:
            raise FormatError(f"{self.path}: 'tokenizer.ggml.{key}' is not a list of {n} numbers")
        return value[:n]

    def flag(self, key: str, default: bool) -> bool:
        """Return a Boolean of the metadata, ``default`` if there is none."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else default

    def id(self, key: str, default: int | None = None) -> int | None:
        """Return the id of the token that the file names for a purpose, else ``default`` or None."""
        old = _OLD_PURPOSES.get(key)
        for value in (self.get(f"{key}_token_id"), None if old is None else self.get(f"{old}_token_id"), default):
            if isinstance(value, int) and 0 <= value < len(self.texts):
                return value
        return None

    # ------------------------------------------------------------------ special tokens

    def _end_tokens(self) -> frozenset[int]:
        """Return the tokens that end an answer. Mark them, and code models' tokens, as control tokens."""
        ends = self._ids_of(_END_TEXTS)
        control = list(ends)
        if all(text in self.ids for text in _CHANNEL_TEXTS):
            ends = [token for token in ends if self.texts[token] != "<|end|>"]
        for purpose, texts in _CODE_TEXTS.items():
            named = self.id(purpose)
            found = self._ids_of(texts) if named is None else []
            control += found
            if purpose in _CODE_ENDS:
                ends += found if named is None else [named]
        for token in control:
            self.types[token] = TokenType.CONTROL
        return frozenset(ends)

    def _ids_of(self, texts: str) -> list[int]:
        """Return the ids of the texts that are in the vocabulary."""
        return [self.ids[text] for text in texts.split() if text in self.ids]

    def _strips(self) -> tuple[list[int], list[int]]:
        """Return the tokens that absorb whitespace on their left, and on their right. GGUF has no field for them."""
        name = str(self._metadata.get("general.name")).lower()
        pre, architecture = str(self.get("pre")), str(self._metadata.get("general.architecture"))
        if pre.startswith(("jina-v2-de", "jina-v2-es", "jina-v2-code")) or architecture.startswith(
            ("nomic-bert-moe", "jina-bert-v3")
        ):
            return self._ids_of("<mask>"), []
        if "phi-3" in name or "phi3" in name:
            kept = self._ids_of("<unk> <s> <|endoftext|>")
            return [], [token for token in self._specials() if token not in kept]
        return self._ids_of("[MASK]") if "modern-bert" in name else [], []

    def _specials(self) -> list[int]:
        """Return the ids of all special tokens."""
        found: list[int] = np.flatnonzero(np.isin(self.types, SPECIAL)).tolist()
        return found

    def _index(self) -> dict[str, list[tuple[int, int]]]:
        """Return the special tokens by their first characters, each with its rank in the order of matching.

        Tokens with more bytes come first. Among tokens of equal size the lower id comes first; llama.cpp does not
        define that order.
        """
        index: dict[str, list[tuple[int, int]]] = {}
        longest_first = sorted(self._specials(), key=lambda i: -len(self.texts[i].encode("utf-8", "surrogateescape")))
        for rank, token in enumerate(longest_first):
            index.setdefault(self.texts[token][:4], []).append((rank, token))
        return index

    def partition(self, text: str, special: bool) -> list[str | int]:
        """Return ``text`` as a list of special tokens' ids and of the texts between them.

        A longer token is searched in the whole text before a shorter one. User-defined tokens are always found, control
        tokens and the unknown token only if ``special``.
        """
        types = SPECIAL if special else (TokenType.USER_DEFINED,)
        found = [
            item
            for start, items in self._special.items()
            if start in text
            for item in items
            if self.types[item[1]] in types and self.texts[item[1]] in text
        ]
        parts: list[str | int] = [text] if text else []
        for _, token in sorted(found):
            parts = [new for part in parts for new in self._split_at(part, token)]
        return parts

    def _split_at(self, part: str | int, token: int) -> list[str | int]:
        """Return ``part`` split at each place where the text of ``token`` is."""
        text = self.texts[token]
        if isinstance(part, int) or text not in part:
            return [part]
        parts: list[str | int] = []
        at = 0
        while (found := part.find(text, at)) >= 0:
            before = part[at:found]
            parts += [before.rstrip(_WHITESPACE) if token in self._strip_left else before, token]
            at = found + len(text)
            if token in self._strip_right:
                while at < len(part) and part[at] in _WHITESPACE:
                    at += 1
        parts.append(part[at:])
        return [new for new in parts if new != ""]
