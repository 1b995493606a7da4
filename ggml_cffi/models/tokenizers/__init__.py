"""Tokenizers: text to token ids and back, with one file for each kind of vocabulary.

:class:`Tokenizer` reads a :class:`Vocabulary` from a GGUF file, finds special tokens in a text, and gives the text
between them to an :class:`Encoder` from the ``registry``. Byte-level vocabularies split a text into words first, by the
expressions of ``pre_tokenizers``, which use the character classes of ``unicode_categories``.
"""

from ggml_cffi.models.tokenizers.base import Encoder
from ggml_cffi.models.tokenizers.registry import ENCODERS
from ggml_cffi.models.tokenizers.tokenizer import IncrementalDecoder, Tokenizer, check_tokens
from ggml_cffi.models.tokenizers.vocabulary import SPECIAL, TokenType, Vocabulary

__all__ = [
    "ENCODERS",
    "SPECIAL",
    "Encoder",
    "IncrementalDecoder",
    "TokenType",
    "Tokenizer",
    "Vocabulary",
    "check_tokens",
]
