"""Conversion of Hugging Face folders to GGUF files."""

from ggml_cffi.models.convert.convert import convert

__all__ = ["convert"]
