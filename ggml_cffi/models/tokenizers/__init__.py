"""Kinds of tokenizers, one file each, by their names in GGUF."""

from ggml_cffi.models.tokenizers.bert import WordPiece
from ggml_cffi.models.tokenizers.encoder import Encoder
from ggml_cffi.models.tokenizers.gpt2 import ByteLevel
from ggml_cffi.models.tokenizers.llama import SentencePiece
from ggml_cffi.models.tokenizers.vocabulary import SPECIAL, TokenType, Vocabulary

#: Encoders by ``tokenizer.ggml.model``. A new one is one more file, and a line here.
ENCODERS: dict[str, type[Encoder]] = {"gpt2": ByteLevel, "llama": SentencePiece, "bert": WordPiece}

__all__ = ["ENCODERS", "SPECIAL", "Encoder", "TokenType", "Vocabulary"]
