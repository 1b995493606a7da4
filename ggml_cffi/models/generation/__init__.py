"""Text generation: continuous batching, the KV cache, sampling, chat templates, incremental detokenization.

One :class:`Batcher` drives one runner. It holds the sequences in generation (:class:`TokenSequence`), forms batches of
their next tokens (:class:`BatchBuilder`), runs the batches, and samples. :class:`KVCache` assigns slots to sequences
(:class:`KVSlots`), keeps finished sequences for later prompts, and evicts sequences; ``kv_snapshot`` writes the kept
ones to a file. ``requests`` continues prompts with one batcher, or with those of several replicas.
"""

from ggml_cffi.models.generation.async_stream import AsyncStream
from ggml_cffi.models.generation.batcher import Batcher
from ggml_cffi.models.generation.batches import BatchBuilder
from ggml_cffi.models.generation.chat import Chat, ChatTemplate, Message
from ggml_cffi.models.generation.completion import Completion
from ggml_cffi.models.generation.detokenize import (
    IncrementalDetokenizer,
    check_stop,
    numbered_text_chunks,
    text_chunks,
)
from ggml_cffi.models.generation.grammar import Grammar
from ggml_cffi.models.generation.kv_cache import KVCache
from ggml_cffi.models.generation.kv_slots import KVSlots
from ggml_cffi.models.generation.logprobs import TokenLogprob
from ggml_cffi.models.generation.requests import (
    Request,
    choose_batcher,
    generate_many,
    generate_on_replicas,
    generate_one,
)
from ggml_cffi.models.generation.sampling import LogitsProcessor, Sampler, SamplingOptions, SamplingParams
from ggml_cffi.models.generation.sequence import TokenSequence
from ggml_cffi.models.generation.stream import Stream
from ggml_cffi.models.generation.timings import Timings

__all__ = [
    "AsyncStream",
    "BatchBuilder",
    "Batcher",
    "Chat",
    "ChatTemplate",
    "Completion",
    "Grammar",
    "IncrementalDetokenizer",
    "KVCache",
    "KVSlots",
    "LogitsProcessor",
    "Message",
    "Request",
    "Sampler",
    "SamplingOptions",
    "SamplingParams",
    "Stream",
    "Timings",
    "TokenLogprob",
    "TokenSequence",
    "check_stop",
    "choose_batcher",
    "generate_many",
    "generate_on_replicas",
    "generate_one",
    "numbered_text_chunks",
    "text_chunks",
]
