"""Text to token ids and back, from the vocabulary inside a GGUF file."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from operator import index

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.tokenizers import ENCODERS, SPECIAL, TokenType, Vocabulary


class Tokenizer:
    """The tokenizer of a GGUF file; it gives the ids that llama.cpp gives.

    Parameters
    ----------
    file
        The model file.

    Raises
    ------
    FormatError
        If the file has no vocabulary, or one that is malformed or of a kind that is not supported.
    """

    def __init__(self, file: GGUFFile) -> None:
        kind = file.metadata.get("tokenizer.ggml.model")
        encoder = ENCODERS.get(kind) if isinstance(kind, str) else None
        if encoder is None:
            raise FormatError(f"{file.path}: the tokenizer {kind!r:.80} is not supported; {', '.join(ENCODERS)} are")
        vocabulary = self._vocabulary = Vocabulary(file)
        self._encoder = encoder(vocabulary)
        self.bos = vocabulary.id("bos", encoder.bos)
        """Id of the token that begins a text, None if there is none."""
        self.eos = vocabulary.id("eos", encoder.eos)
        """Id of the token that ends a text, None if there is none."""
        self.sep = vocabulary.id("seperator", encoder.sep)  # spelt so in the format
        """Id of the token that ends each of several texts, None if there is none."""
        self.add_bos = self.bos is not None and (
            encoder.framed or vocabulary.flag("add_bos_token", self._encoder.add_bos)
        )
        """Whether texts are encoded with the beginning token."""
        self.add_eos = self.eos is not None and not encoder.framed and vocabulary.flag("add_eos_token", False)
        """Whether texts are encoded with the ending token."""
        self.add_sep = self.sep is not None and encoder.framed
        """Whether texts are encoded with the separating token at their end, as BERT wants it."""
        named = (self.eos, vocabulary.id("eot"), vocabulary.id("eom"))
        self.ends: frozenset[int] = vocabulary.ends | {i for i in named if i is not None}
        """Ids after which an answer is over."""
        self._bytes: dict[bool, dict[int, bytes]] = {False: {}, True: {}}

    def __len__(self) -> int:
        return len(self._vocabulary.texts)

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of ``text``.

        Parameters
        ----------
        text
            Any text. Lone surrogates become U+FFFD.
        special
            Whether texts like ``<|im_end|>`` mean the token of that name; False for text that is not trusted.
        bos
            Whether to begin with the beginning token; default as the model wants it. False leaves out the token that
            some models want at the end too.

        Raises
        ------
        TypeError
            If ``text`` is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        ids = [self.bos] if self.bos is not None and (self.add_bos if bos is None else bos) else []
        begins = True
        for piece in self._vocabulary.partition(_without_surrogates(text), special):
            if isinstance(piece, int):
                ids.append(piece)
                begins = True
            else:
                ids += self._encoder.encode(f" {piece}" if begins and self._encoder.space_first else piece)
                begins = False
        if bos is not False:
            ids += [self.eos] if self.eos is not None and self.add_eos else []
            ids += [self.sep] if self.sep is not None and self.add_sep else []
        return ids

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; none for control tokens unless ``special``.

        Embeddings are often padded beyond the vocabulary: ids from there stand for nothing.
        """
        known = self._bytes[special].get(token)
        if known is None:
            known = self._bytes[special][token] = self._meaning(token, special) if token < len(self) else b""
        return known

    def _meaning(self, token: int, special: bool) -> bytes:
        text = self._vocabulary.texts[token]
        match self._vocabulary.types[token]:
            case TokenType.NORMAL:
                return self._encoder.token_bytes(text)
            case TokenType.BYTE:
                return bytes([int(text[3:5], 16)])
            case TokenType.CONTROL | TokenType.UNKNOWN if not special:
                return b""
            case TokenType.CONTROL | TokenType.UNKNOWN | TokenType.USER_DEFINED:
                return text.encode("utf-8", "surrogateescape")
        return b""

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        Parameters
        ----------
        tokens
            Ids.
        special
            Whether control tokens are written out.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.

        Notes
        -----
        ``decode(encode(text, bos=False), special=True)`` is ``text`` for byte-level vocabularies that have a token for
        each byte, and for SentencePiece's, where U+2581 comes back as a space. BERT's WordPiece keeps no case, accents
        nor whitespace.
        """
        ids = self.check(tokens)
        pieces = [self.token_bytes(t, special=special) for t in ids]
        if self._encoder.space_first:
            types = self._vocabulary.types
            specials = [types[t] in SPECIAL for t in ids]
            for i, (after, here) in enumerate(zip([True, *specials], specials, strict=False)):
                if after and not here:
                    pieces[i] = pieces[i].removeprefix(b" ")
        return self._encoder.clean(b"".join(pieces)).decode("utf-8", "replace")

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
        ids = list(map(index, tokens))
    except TypeError:
        raise TypeError(f"token ids are integers, not {tokens!r:.80}") from None
    if ids and not 0 <= min(ids) <= max(ids) < n_vocab:
        wrong = next(t for t in ids if not 0 <= t < n_vocab)
        raise ValueError(f"token id {wrong} is not in the vocabulary of {n_vocab}")
    return ids


def _without_surrogates(text: str) -> str:
    """``text`` with U+FFFD for each lone surrogate; two that make a character become it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
