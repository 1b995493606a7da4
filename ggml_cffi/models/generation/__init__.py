"""Text generation: continuous batching, the KV cache, sampling, chat templates, incremental detokenization.

One :class:`Batcher` drives one runner. It keeps the sequences in generation (:class:`TokenSequence`), makes batches of
their next tokens (:class:`BatchBuilder`), has them computed, and samples. :class:`KVCache` is the KV cache: which
sequence holds which slot (:class:`KVSlots`), what is kept for later prompts, what is evicted; ``kv_snapshot`` writes it
to a file. ``requests`` continues prompts by one batcher or by those of several replicas.
"""

from ggml_cffi.models.generation.batcher import Batcher
from ggml_cffi.models.generation.batches import BatchBuilder
from ggml_cffi.models.generation.chat import Chat, Message, render
from ggml_cffi.models.generation.detokenize import (
    IncrementalDetokenizer,
    check_stop,
    numbered_text_chunks,
    text_chunks,
)
from ggml_cffi.models.generation.kv_cache import KVCache
from ggml_cffi.models.generation.kv_slots import KVSlots
from ggml_cffi.models.generation.requests import (
    Request,
    choose_batcher,
    generate_many,
    generate_on_replicas,
    generate_one,
)
from ggml_cffi.models.generation.sampling import Sampler, SamplingOptions, SamplingParams
from ggml_cffi.models.generation.sequence import TokenSequence
from ggml_cffi.models.generation.timings import Timings

__all__ = [
    "BatchBuilder",
    "Batcher",
    "Chat",
    "IncrementalDetokenizer",
    "KVCache",
    "KVSlots",
    "Message",
    "Request",
    "Sampler",
    "SamplingOptions",
    "SamplingParams",
    "Timings",
    "TokenSequence",
    "check_stop",
    "choose_batcher",
    "generate_many",
    "generate_on_replicas",
    "generate_one",
    "numbered_text_chunks",
    "render",
    "text_chunks",
]
