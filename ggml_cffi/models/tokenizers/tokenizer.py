"""The tokenizer of a GGUF file: text to token ids and back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from operator import index

from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.tokenizers.registry import ENCODERS, LLAMA_CPP_ENCODERS
from ggml_cffi.models.tokenizers.vocabulary import SPECIAL, TokenType, Vocabulary


class Tokenizer:
    """The tokenizer of a GGUF file. It returns the same ids as llama.cpp; WordPiece, those of Hugging Face.

    Parameters
    ----------
    file
        The model file.
    llama_cpp
        True for llama.cpp's ids with WordPiece too. By default BERT models get the tokens that they were trained with.

    Raises
    ------
    FormatError
        If the file has no vocabulary, a malformed one, or one of a kind that is not supported.
    """

    def __init__(self, file: GGUFFile, *, llama_cpp: bool = False) -> None:
        name = file.metadata.get("tokenizer.ggml.model")
        encoders = LLAMA_CPP_ENCODERS if llama_cpp else ENCODERS
        encoder = encoders.get(name) if isinstance(name, str) else None
        if encoder is None:
            raise FormatError(f"{file.path}: the tokenizer {name!r:.80} is not supported; {', '.join(ENCODERS)} are")
        vocabulary = self._vocabulary = Vocabulary(file)
        self._encoder = encoder(vocabulary)
        self.bos = vocabulary.id("bos", encoder.bos)
        """Id of the token that begins a sequence, None if there is none."""
        self.eos = vocabulary.id("eos", encoder.eos)
        """Id of the token that ends a sequence, None if there is none."""
        self.sep = vocabulary.id("seperator", encoder.sep)  # GGUF's own spelling
        """Id of the token that separates sequences, None if there is none."""
        self.add_bos = self.bos is not None and (
            encoder.always_framed or vocabulary.flag("add_bos_token", self._encoder.add_bos)
        )
        """True if texts are encoded with the beginning token."""
        self.add_eos = self.eos is not None and not encoder.always_framed and vocabulary.flag("add_eos_token", False)
        """True if texts are encoded with the ending token."""
        self.add_sep = self.sep is not None and encoder.always_framed
        """True if texts are encoded with the separating token at their end, as BERT needs it."""
        named = (self.eos, vocabulary.id("eot"), vocabulary.id("eom"))
        self.end_tokens: frozenset[int] = vocabulary.end_tokens | {i for i in named if i is not None}
        """Ids of the tokens that end an answer."""
        self._bytes: dict[bool, dict[int, bytes]] = {False: {}, True: {}}

    def __len__(self) -> int:
        return len(self._vocabulary.texts)

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """Return the token ids of ``text``.

        Parameters
        ----------
        text
            Any text. Lone surrogates become U+FFFD.
        special
            True if texts such as ``<|im_end|>`` mean the token of that name. Give False for text that is not trusted.
        bos
            True to begin with the beginning token; default as the model needs it. False also leaves out the token that
            some models need at the end.

        Raises
        ------
        TypeError
            If ``text`` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        ids = [self.bos] if self.bos is not None and (self.add_bos if bos is None else bos) else []
        after_special = True
        for part in self._vocabulary.partition(_replace_surrogates(text), special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                ids += self._encoder.encode(f" {part}" if after_special and self._encoder.add_space_prefix else part)
                after_special = False
        if bos is not False:
            ids += [self.eos] if self.eos is not None and self.add_eos else []
            ids += [self.sep] if self.sep is not None and self.add_sep else []
        return ids

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text that may have its own beginning and ending token, as rendered chats do.

        They are those of :meth:`encode`, without a second beginning or ending token.
        """
        ids = self.encode(text, special=special)
        if self.add_bos and ids[:2] == [self.bos, self.bos]:
            del ids[0]
        if self.add_eos and ids[-2:] == [self.eos, self.eos]:
            del ids[-1]
        return ids

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens by the names that chat templates use, such as ``bos_token``."""
        ids = {"bos_token": self.bos, "eos_token": self.eos, "sep_token": self.sep}
        more = {"unk_token": "unknown", "pad_token": "padding", "mask_token": "mask"}
        ids |= {name: self._vocabulary.id(key) for name, key in more.items()}
        return {
            name: self.token_bytes(token, special=True).decode("utf-8", "replace")
            for name, token in ids.items()
            if token is not None
        }

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes that a token stands for, no bytes for control tokens unless ``special``.

        Ids beyond the vocabulary stand for no bytes: embeddings are often padded.
        """
        known = self._bytes[special].get(token)
        if known is None:
            known = self._bytes[special][token] = self._token_bytes(token, special) if token < len(self) else b""
        return known

    def _token_bytes(self, token: int, special: bool) -> bytes:
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
        """Return the text of token ids. Bytes that are not valid UTF-8 become U+FFFD.

        Parameters
        ----------
        tokens
            Token ids.
        special
            True to write control tokens too.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.

        Notes
        -----
        ``decode(encode(text, bos=False), special=True)`` is ``text`` for byte-level vocabularies that have a token for
        each byte, and for SentencePiece's, where U+2581 comes back as a space. BERT's WordPiece loses case, accents and
        whitespace.
        """
        ids = self.check(tokens)
        parts = [self.token_bytes(t, special=special) for t in ids]
        if self._encoder.add_space_prefix:
            types = self._vocabulary.types
            specials = [types[t] in SPECIAL for t in ids]
            for i, (after_special, is_special) in enumerate(zip([True, *specials], specials, strict=False)):
                if after_special and not is_special:
                    parts[i] = parts[i].removeprefix(b" ")
        return self._encoder.clean_up(b"".join(parts)).decode("utf-8", "replace")

    def check(self, tokens: Iterable[int]) -> list[int]:
        """Return ``tokens`` as a list of valid ids; see :func:`check_tokens` for the errors."""
        return check_tokens(tokens, len(self))

    def incremental_decoder(self, *, special: bool = False) -> IncrementalDecoder:
        """Return a decoder that takes one token after another, and writes control tokens if ``special``."""
        return IncrementalDecoder(self, special=special)


class IncrementalDecoder:
    """Decoder of one token after another. It holds bytes back until their characters are complete."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token, special=self._special))

    def finish(self) -> str:
        """Return the text of the bytes held back, at the end of the tokens."""
        return self._decoder.decode(b"", final=True)


def check_tokens(tokens: Iterable[int] | Sequence[int], n_vocab: int) -> list[int]:
    """Return ``tokens`` as a list of ids below ``n_vocab``.

    Raises
    ------
    TypeError, ValueError
        If an item is not an integer, or out of range.
    """
    try:
        if isinstance(tokens, bytes | bytearray | memoryview):  # their items would be integers
            raise TypeError
        ids = list(map(index, tokens))
    except TypeError:
        raise TypeError(f"token ids must be integers, not {tokens!r:.80}") from None
    if ids and not 0 <= min(ids) <= max(ids) < n_vocab:
        wrong = next(t for t in ids if not 0 <= t < n_vocab)
        raise ValueError(f"token id {wrong} is not in the vocabulary of {n_vocab}")
    return ids


def _replace_surrogates(text: str) -> str:
    """Return ``text`` with U+FFFD for each lone surrogate, and a character for each pair of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
