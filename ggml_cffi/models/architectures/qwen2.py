"""Qwen 2 and 2.5: llama with biases for queries, keys and values, and other pairs of rotated elements.

Source: Yang et al., Qwen2 Technical Report, 2024.
"""

from __future__ import annotations

from ggml_cffi.models.architectures.decoder import Decoder
from ggml_cffi.ops import RopeMode


class Qwen2(Decoder):
    """Qwen 2 and 2.5."""

    name = "qwen2"
    rope_mode = RopeMode.NEOX
