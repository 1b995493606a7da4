"""Runners: a model with its weights and KV cache on its devices, batches of tokens in and logits out.

``PipelineRunner`` computes on GPUs without a scheduler: in stages, each on one device or on several that share every
layer. ``ScheduledRunner`` computes through ggml's scheduler, for layers on the CPU and on remote devices. ``weights``
loads whole weights and shards for both.
"""

from ggml_cffi.models.runners.base import Batch, Runner
from ggml_cffi.models.runners.embedding import Embedder
from ggml_cffi.models.runners.pipeline import PipelineRunner
from ggml_cffi.models.runners.scheduled import ScheduledRunner
from ggml_cffi.models.runners.stage_spec import StageSpec, even_stages
from ggml_cffi.models.runners.weights import DevicePlacement, Weights

__all__ = [
    "Batch",
    "DevicePlacement",
    "Embedder",
    "PipelineRunner",
    "Runner",
    "ScheduledRunner",
    "StageSpec",
    "Weights",
    "even_stages",
]
