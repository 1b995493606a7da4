"""The registry of vocabularies: the encoder class for each ``tokenizer.ggml.model``."""

from ggml_cffi.models.tokenizers.base import Encoder
from ggml_cffi.models.tokenizers.byte_level_bpe import ByteLevelBPE
from ggml_cffi.models.tokenizers.sentencepiece import SentencePieceBPE
from ggml_cffi.models.tokenizers.wordpiece import LlamaCppWordPiece, WordPiece

#: Encoders by ``tokenizer.ggml.model``. A new kind of vocabulary is one more file, and one line here.
ENCODERS: dict[str, type[Encoder]] = {"gpt2": ByteLevelBPE, "llama": SentencePieceBPE, "bert": WordPiece}
#: Encoders that compute llama.cpp's ids where they differ from those of the library that a model was trained with.
LLAMA_CPP_ENCODERS: dict[str, type[Encoder]] = ENCODERS | {"bert": LlamaCppWordPiece}
