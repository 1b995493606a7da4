"""Llama: RMS norm, rotary positions, grouped-query attention, SwiGLU.

Llama 2 and 3, SmolLM2, Mistral and many other models use this architecture.
Source: Touvron et al., LLaMA, 2023.
"""

from __future__ import annotations

from ggml_cffi.models.architectures.decoder import Decoder


class Llama(Decoder):
    """Llama-like models."""

    name = "llama"
