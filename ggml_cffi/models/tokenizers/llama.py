"""SentencePiece's byte-pair encoding: Llama 2, Gemma, Mistral, Phi 3."""

from __future__ import annotations

import re

from ggml_cffi.models.tokenizers.encoder import Encoder
from ggml_cffi.models.tokenizers.merging import merge
from ggml_cffi.models.tokenizers.vocabulary import Vocabulary

_SPACE = "\u2581"


class SentencePiece(Encoder):
    """``tokenizer.ggml.model`` ``llama``: characters, joined to tokens of ever higher score; bytes for what is left.

    Spaces are written as U+2581. The text is one word in principle; it is cut where no token can reach across.
    """

    add_bos = True
    bos, eos = 1, 2

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        texts = vocabulary.texts
        self._ranks = dict(zip(texts, (-vocabulary.numbers("scores", "if", None)).tolist(), strict=True))
        self.space_first = vocabulary.flag("add_space_prefix", True)
        self._unknown = vocabulary.id("unknown", 0)
        inner = "".join(sorted(set(re.findall(f"([^{_SPACE}\0]){_SPACE}", "\0".join(texts)))))
        self._cuts = re.compile(f"(?<=[^{_SPACE}{re.escape(inner)}])(?={_SPACE})")

    def words(self, text: str) -> list[str]:
        return self._cuts.split(text.replace(" ", _SPACE))

    def tokens(self, word: str) -> list[int]:
        ids = self.vocabulary.ids
        tokens = []
        for symbol in merge(word, self._ranks):
            token = ids.get(symbol)
            if token is not None:
                tokens.append(token)
            else:  # one character
                tokens += [t for byte in symbol.encode() if (t := self._byte(byte)) is not None]
        return tokens

    def _byte(self, byte: int) -> int | None:
        ids = self.vocabulary.ids
        token = ids.get(f"<0x{byte:02X}>")
        return token if token is not None else ids.get(bytes([byte]).decode("ascii", "surrogateescape"), self._unknown)

    def token_bytes(self, text: str) -> bytes:
        return text.replace(_SPACE, " ").encode("utf-8", "surrogateescape")
