"""The vocabulary of a GGUF file: texts and kinds of tokens, and which of them are special, as llama.cpp reads it."""

from __future__ import annotations

import re
from collections import Counter
from enum import IntEnum
from typing import Any

import numpy as np

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


#: Types of tokens that are found in a text before it is cut into words.
SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
#: Texts of tokens that end an answer, whatever the file says that they are.
_ENDS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
)
#: Texts of code models' tokens by purpose; they count unless the file names a token for it.
_CODE = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
#: Purposes after whose tokens an answer is over: what follows would be another file.
_CODE_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_WHITESPACE = " \t\n\v\f\r"  # what C's isspace knows


class Vocabulary:
    """Tokens by number and by text.

    Parameters
    ----------
    file
        The model file.

    Raises
    ------
    FormatError
        If the file has no vocabulary, or one that cannot be.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.path, self._metadata = file.path, file.metadata
        texts = self.strings("tokens")
        if not texts:
            raise FormatError(f"{self.path}: the vocabulary is empty")
        if "" in texts:
            texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        self.texts: list[str] = texts
        """What each token is written as."""
        self.ids: dict[str, int] = dict(zip(texts, range(len(texts)), strict=True))
        """Numbers of the texts."""
        if len(self.ids) < len(texts):
            text, count = Counter(texts).most_common(1)[0]
            raise FormatError(f"{self.path}: the token {text!r:.80} is {count} times in the vocabulary")
        self.types: list[int] = self.numbers("token_type", "iu", TokenType.NORMAL).tolist()
        """What each token is, a :class:`TokenType` or what no such thing is."""
        for i in np.flatnonzero(np.equal(self.types, TokenType.BYTE)):
            if not re.fullmatch("<0x[0-9A-Fa-f]{2}>", texts[i]):
                raise FormatError(
                    f"{self.path}: the byte token {texts[i]!r:.80} is not written as <0x00> to <0xFF> are"
                )
        self.ends = self._ends()
        self._strip_left, self._strip_right = self._strips()
        self._special = self._index()

    # ------------------------------------------------------------------ values of the file

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the tokenizer's metadata."""
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        """A list of strings.

        Raises
        ------
        FormatError
            If it is missing, or something else.
        """
        value = self.get(key)
        if not isinstance(value, list) or not set(map(type, value)) <= {str}:
            raise FormatError(f"{self.path}: 'tokenizer.ggml.{key}' is missing or no list of strings")
        return value

    def numbers(self, key: str, kinds: str, default: float | None) -> np.ndarray[Any, Any]:
        """One number for each token, of numpy's ``kinds``; ``default`` for all if the file has none.

        Raises
        ------
        FormatError
            If they are something else, or missing and ``default`` is None.
        """
        value, n = self.get(key), len(self.texts)
        if value is None and default is not None:
            return np.full(n, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or len(value) < n:
            raise FormatError(f"{self.path}: 'tokenizer.ggml.{key}' is no list of {n} numbers")
        return value[:n]

    def flag(self, key: str, default: bool) -> bool:
        """A yes or no; ``default`` where the file says neither."""
        value = self.get(key, default)
        return value if isinstance(value, bool) else default

    def id(self, key: str, default: int | None = None) -> int | None:
        """The number of a token that the file names for a purpose; None if there is no such token."""
        for value in (self.get(f"{key}_token_id"), default):
            if isinstance(value, int) and 0 <= value < len(self.texts):
                return value
        return None

    # ------------------------------------------------------------------ special tokens

    def _ends(self) -> frozenset[int]:
        """Tokens that end an answer. Their texts make them control tokens, and those of code models too."""
        ends = self._written(_ENDS)
        control = list(ends)
        for purpose, texts in _CODE.items():
            named = self.id(purpose)
            found = self._written(texts) if named is None else []
            control += found
            if purpose in _CODE_ENDS:
                ends += found if named is None else [named]
        for token in control:
            self.types[token] = TokenType.CONTROL
        return frozenset(ends)

    def _written(self, texts: str) -> list[int]:
        """The tokens of these texts, of those that there are."""
        return [self.ids[text] for text in texts.split() if text in self.ids]

    def _strips(self) -> tuple[list[int], list[int]]:
        """Tokens that swallow the whitespace on their left, and on their right. GGUF has no field for it."""
        name = str(self._metadata.get("general.name")).lower()
        pre, architecture = str(self.get("pre")), str(self._metadata.get("general.architecture"))
        if pre.startswith(("jina-v2-de", "jina-v2-es", "jina-v2-code")) or architecture.startswith(
            ("nomic-bert-moe", "jina-bert-v3")
        ):
            return self._written("<mask>"), []
        if "phi-3" in name or "phi3" in name:
            kept = self._written("<unk> <s> <|endoftext|>")
            return [], [token for token in self._specials() if token not in kept]
        return self._written("[MASK]") if "modern-bert" in name else [], []

    def _specials(self) -> list[int]:
        found: list[int] = np.flatnonzero(np.isin(self.types, SPECIAL)).tolist()
        return found

    def _index(self) -> dict[str, list[tuple[int, int]]]:
        """Special tokens by how they begin, each with its place in the order of matching: those of most bytes first.

        Of those of as many bytes the one with the lower number; llama.cpp leaves that to chance.
        """
        index: dict[str, list[tuple[int, int]]] = {}
        longest_first = sorted(self._specials(), key=lambda i: -len(self.texts[i].encode("utf-8", "surrogateescape")))
        for place, token in enumerate(longest_first):
            index.setdefault(self.texts[token][:4], []).append((place, token))
        return index

    def partition(self, text: str, special: bool) -> list[str | int]:
        """``text`` in pieces: the special tokens that it names, and what is between them.

        A longer token is looked for everywhere before a shorter one is. User-defined tokens are always meant; control
        tokens and the unknown token only if ``special``.
        """
        kinds = SPECIAL if special else (TokenType.USER_DEFINED,)
        found = [
            item
            for start, items in self._special.items()
            if start in text
            for item in items
            if self.types[item[1]] in kinds and self.texts[item[1]] in text
        ]
        pieces: list[str | int] = [text] if text else []
        for _, token in sorted(found):
            pieces = [part for piece in pieces for part in self._parts(piece, token)]
        return pieces

    def _parts(self, piece: str | int, token: int) -> list[str | int]:
        text = self.texts[token]
        if isinstance(piece, int) or text not in piece:
            return [piece]
        parts: list[str | int] = []
        at = 0
        while (found := piece.find(text, at)) >= 0:
            before = piece[at:found]
            parts += [before.rstrip(_WHITESPACE) if token in self._strip_left else before, token]
            at = found + len(text)
            if token in self._strip_right:
                at += len(piece) - at - len(piece[at:].lstrip(_WHITESPACE))
        parts.append(piece[at:])
        return [part for part in parts if part != ""]
