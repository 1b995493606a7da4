"""The gemma3 architecture: most layers look back at a window of tokens, every sixth at all of them; GeGLU.

Its norms multiply by ``1 + weight``; files in GGUF hold that sum, so that here they are norms like others.
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

_PATTERN = 6  # layers from one that looks at all tokens to the next, where the file does not say
_LAYERS_27B = 62  # this size divides the scores by another root than the others; no key of a file tells


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
        self.attention_cap = meta.at_least_0("attn_logit_softcapping", 0.0)
        self.logit_cap = meta.at_least_0("final_logit_softcapping", 0.0)
        self.window = meta.get("attention.sliding_window", int, 0)
        if not 0 <= self.window < 2**31:
            raise FormatError(f"{self.file.path}: a sliding window of {self.window} tokens cannot be")
        self._read_pattern(meta)
        # Windows are short: their positions need no scaling.
        base = meta.at_least_0("rope.freq_base_swa", 0.0) or 10000.0
        self.local_rope = Rope(self.rope_mode, self.rope.n_dims, base)

    def _read_pattern(self, meta: Metadata) -> None:
        key = "attention.sliding_window_pattern"
        given = meta.file.metadata.get(f"{self.name}.{key}")
        self._local: list[bool] | None = None
        if isinstance(given, list | np.ndarray):  # for each layer, whether it is local
            self._local = [bool(local) for local in given]
            if len(self._local) != self.n_layers:
                raise FormatError(f"{self.file.path}: {self.name}.{key} is for {len(given)} layers of {self.n_layers}")
        else:
            self._period = meta.positive(key, _PATTERN)

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
