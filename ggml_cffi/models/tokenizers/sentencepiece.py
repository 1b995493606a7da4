"""SentencePiece's byte-pair encoding: Llama 2, Gemma, Mistral, Phi 3."""

from __future__ import annotations

import re

from ggml_cffi.models.tokenizers.base import Encoder
from ggml_cffi.models.tokenizers.bpe import merge
from ggml_cffi.models.tokenizers.vocabulary import Vocabulary

_SPACE = "\u2581"  # the vocabulary's character for a space


class SentencePieceBPE(Encoder):
    """Vocabulary ``llama`` of ``tokenizer.ggml.model``: characters are merged by score; byte tokens spell unknown ones.

    SentencePiece takes a text as one word. This class splits the text before each space that no token spans.
    """

    add_bos = True
    bos, eos = 1, 2

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        texts = vocabulary.texts
        self._ranks = dict(zip(texts, (-vocabulary.numbers("scores", "if", None)).tolist(), strict=True))
        self.add_space_prefix = vocabulary.flag("add_space_prefix", True)
        self._unknown = vocabulary.id("unknown", 0)
        before_space = "".join(sorted(set(re.findall(f"([^{_SPACE}\0]){_SPACE}", "\0".join(texts)))))
        self._boundaries = re.compile(f"(?<=[^{_SPACE}{re.escape(before_space)}])(?={_SPACE})")

    def split(self, text: str) -> list[str]:
        return self._boundaries.split(text.replace(" ", _SPACE))

    def encode_word(self, word: str) -> list[int]:
        ids = self.vocabulary.ids
        tokens = []
        for symbol in merge(word, self._ranks):
            token = ids.get(symbol)
            if token is not None:
                tokens.append(token)
            else:  # one character
                tokens += [t for byte in symbol.encode() if (t := self._byte_token(byte)) is not None]
        return tokens

    def _byte_token(self, byte: int) -> int | None:
        """Return the token of a byte, the unknown token where there is none."""
        ids = self.vocabulary.ids
        token = ids.get(f"<0x{byte:02X}>")
        return token if token is not None else ids.get(bytes([byte]).decode("ascii", "surrogateescape"), self._unknown)

    def token_bytes(self, text: str) -> bytes:
        return text.replace(_SPACE, " ").encode("utf-8", "surrogateescape")
