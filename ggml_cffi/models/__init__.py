"""Models from GGUF files: loading onto devices, text generation, embeddings, perplexity, conversion.

``load`` opens a file as a ``Model``. ``architectures`` build the graphs, ``tokenizers`` turn text into token ids,
``placement`` decides which device holds which layer, ``runners`` compute batches of tokens, ``generation`` makes these
batches and keeps the KV cache, ``convert`` writes GGUF files.

>>> from ggml_cffi import models
>>> with models.load("model.gguf") as model:  # doctest: +SKIP
...     for text in model.generate("The capital of France is", max_tokens=16):
...         print(text, end="", flush=True)
"""

from typing import TYPE_CHECKING

from ggml_cffi.core.lazy_names import lazy_names
from ggml_cffi.models.architectures.registry import ARCHITECTURES
from ggml_cffi.models.convert.convert import convert
from ggml_cffi.models.fetch import fetch
from ggml_cffi.models.generation.async_stream import AsyncStream
from ggml_cffi.models.generation.completion import Completion
from ggml_cffi.models.generation.grammar import Grammar
from ggml_cffi.models.generation.logprobs import TokenLogprob
from ggml_cffi.models.generation.sampling import Sampler, SamplingParams
from ggml_cffi.models.generation.stream import Stream
from ggml_cffi.models.generation.timings import Timings
from ggml_cffi.models.generation.tool_schema import Tool, tool_schema
from ggml_cffi.models.load import load
from ggml_cffi.models.model import Model
from ggml_cffi.models.perplexity import Perplexity
from ggml_cffi.models.placement.options import SplitMode
from ggml_cffi.models.placement.placement import DevicePlan
from ggml_cffi.models.placement.plan import ModelPlan, plan
from ggml_cffi.models.placement.speed import SpeedEstimate
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ggml_cffi.models.chat_parser import (
        ChatMessage,
        ChatParser,
        ContentDelta,
        ReasoningDelta,
        ToolCall,
        ToolCallDelta,
        ToolCallEnd,
        ToolCallStart,
    )
    from ggml_cffi.models.sentence_encoder import SentenceEncoder

__getattr__ = lazy_names(
    __name__,
    {
        "ggml_cffi.models.chat_parser": """ChatMessage ChatParser ContentDelta ReasoningDelta ToolCall ToolCallDelta
            ToolCallEnd ToolCallStart""",
        "ggml_cffi.models.sentence_encoder": "SentenceEncoder",
    },
)

__all__ = [
    "ARCHITECTURES",
    "AsyncStream",
    "ChatMessage",
    "ChatParser",
    "Completion",
    "ContentDelta",
    "DevicePlan",
    "Grammar",
    "Model",
    "ModelPlan",
    "Perplexity",
    "ReasoningDelta",
    "Sampler",
    "SamplingParams",
    "SentenceEncoder",
    "SpeedEstimate",
    "SplitMode",
    "Stream",
    "Timings",
    "TokenLogprob",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallStart",
    "convert",
    "fetch",
    "load",
    "plan",
    "tool_schema",
]
