"""Qwen 3 without experts: qwen2 with normalized queries and keys in place of their biases.

Source: Yang et al., Qwen3 Technical Report, 2025.
"""

from __future__ import annotations

from ggml_cffi.models.architectures.decoder import Decoder
from ggml_cffi.ops import RopeMode


class Qwen3(Decoder):
    """Qwen 3, without experts."""

    name = "qwen3"
    rope_mode = RopeMode.NEOX
    head_norms = True
