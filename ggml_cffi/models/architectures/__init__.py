"""Model architectures: the sizes, tensors and graph of each, one file per architecture, and their registry."""

from ggml_cffi.models.architectures.base import Architecture, Inputs, LayerCache, Metadata, TensorParallelSpec
from ggml_cffi.models.architectures.decoder import Decoder, Rope
from ggml_cffi.models.architectures.registry import ARCHITECTURES, architecture_of, context_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Decoder",
    "Inputs",
    "LayerCache",
    "Metadata",
    "Rope",
    "TensorParallelSpec",
    "architecture_of",
    "context_of",
]
