"""Gemma 3: sliding-window attention in most layers, full attention in every sixth, and GeGLU.

Gemma's norms multiply by ``1 + weight``. GGUF files hold that sum, so the norms here are ordinary ones.
Source: Gemma Team, Gemma 3 Technical Report, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np

from ggml_cffi import ops
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import FormatError
from ggml_cffi.models.architectures.base import Inputs, Metadata
from ggml_cffi.models.architectures.decoder import Decoder, Rope
from ggml_cffi.ops import RopeMode

_PATTERN = 6  # default distance from one layer with full attention to the next
_LAYERS_27B = 62  # the 27B model scales its scores differently, and only its number of layers identifies it


class Gemma3(Decoder):
    """Gemma 3, text."""

    name = "gemma3"
    rope_mode = RopeMode.NEOX
    head_norms = True
    post_norms = True

    def read(self, meta: Metadata) -> None:
        super().read(meta)
        if self.n_layers == _LAYERS_27B and not meta.get("attention.scale", float, 0.0):
            self.scale = 1.0 / sqrt(self.n_embd // self.n_heads)
        self.attention_cap = meta.nonnegative("attn_logit_softcapping", 0.0)
        self.logit_cap = meta.nonnegative("final_logit_softcapping", 0.0)
        self.window = meta.get("attention.sliding_window", int, 0)
        if not 0 <= self.window < 2**31:
            raise FormatError(f"{self.file.path}: the sliding window of {self.window} tokens is impossible")
        self._read_pattern(meta)
        for key, size in (
            ("attention.key_length_swa", self.head_size),
            ("attention.value_length_swa", self.v_size),
            ("rope.dimension_count_swa", self.rope.n_dims),
        ):
            if meta.positive_int(key, size) != size:
                raise FormatError(f"{self.file.path}: {self.name}.{key} differs from that of other layers, {size}")
        # A window is shorter than the context in training, so its positions need no scaling.
        base = meta.nonnegative("rope.freq_base_swa", 0.0) or 10000.0
        self.local_rope = Rope(self.rope_mode, self.rope.n_dims, base)

    def _read_pattern(self, meta: Metadata) -> None:
        key = "attention.sliding_window_pattern"
        given = meta.raw(key)
        self._local: list[bool] | None = None
        if isinstance(given, list | np.ndarray):  # one flag per layer
            self._local = [bool(local) for local in given]
            if len(self._local) != self.n_layers:
                raise FormatError(
                    f"{self.file.path}: {self.name}.{key} has {len(given)} flags for {self.n_layers} layers"
                )
        else:
            self._period = meta.positive_int(key, _PATTERN)

    def is_local(self, i: int) -> bool:
        if not self.window:
            return False
        return self._local[i] if self._local is not None else i % self._period < self._period - 1

    def layer_rope(self, i: int) -> Rope:
        return self.local_rope if self.is_local(i) else self.rope

    def embed(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        return ops.scale(super().embed(weights, inputs), sqrt(self.n_embd))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return ops.geglu_split(gate, up)

    def logits(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        logits = super().logits(weights, hidden)
        return ops.scale(ops.tanh(ops.scale(logits, 1.0 / cap)), cap) if (cap := self.logit_cap) else logits
