"""The llama architecture: RMS norm, rotary positions, grouped-query attention, SwiGLU.

Source: Touvron et al., LLaMA, 2023. SmolLM2, Llama 2 and 3, Mistral and many others are of this kind.
"""

from __future__ import annotations

from ggml_cffi.models.architectures.decoder import Decoder


class Llama(Decoder):
    """Llama-like models."""

    name = "llama"
