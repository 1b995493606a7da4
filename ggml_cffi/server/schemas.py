"""The bodies of requests. Unknown fields are refused, so that no parameter is ignored in silence.

A body has a few errors at most, also if it has a million wrong values: to collect and describe all of them would take
minutes, in which the server answers nobody.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")
#: A list, whose check ends at the first error.
List = Annotated[list[T], Field(fail_fast=True)]

#: Largest number of answers to one prompt.
MAX_CHOICES = 64
#: Largest number of tokens of ``logit_bias``.
MAX_BIASES = 1024

Count = Annotated[int, Field(ge=1)]


def _check_biases(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        values = {"most": MAX_BIASES, "n": len(biases)}
        raise PydanticCustomError("too_long", "At most {most} tokens are allowed, not {n}", values)
    return biases


class Body(BaseModel, extra="forbid"):
    """Fields of every request."""

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, data: Any) -> Any:
        """Leave out all unknown fields but the first, which is the error to report; null says nothing."""
        if not isinstance(data, dict):
            return data
        unknown = next(
            (name for name, value in data.items() if name not in cls.model_fields and value is not None), None
        )
        return {name: value for name, value in data.items() if name in cls.model_fields or name == unknown}

    model: str | None = None
    """Name of the model; may be missing if there is one only."""
    user: str | None = None
    """Not used; nor are the next ones, which OpenAI's clients send for OpenAI's own purposes."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool | None = None
    """True for the counts of tokens in a last chunk."""
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """Fields of the requests that generate text."""

    temperature: float | None = None
    """Default 1, as in OpenAI's API; 0 is greedy."""
    top_p: float | None = None
    """Default 1; 0 for the most likely token alone."""
    top_k: int | None = None
    """Default 40; 0 for all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    """Over prompt and answer; default 1."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_check_biases)] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    """True to continue after an end token."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | List[str] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Function(BaseModel):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """A tool that the model must use."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(BaseModel):
    """A JSON schema with its name."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(SamplingBody):
    """The body of ``/v1/chat/completions``."""

    messages: Annotated[List[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: List[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """Passed to the chat template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template, such as ``{"enable_thinking": false}``."""


Prompts = str | List[str] | List[int] | List[List[int]]


class CompletionBody(SamplingBody):
    """The body of ``/v1/completions``."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    """True to put the prompt before the answer."""
    best_of: int | None = None
    suffix: str | None = None


class EmbeddingBody(Body):
    """The body of ``/v1/embeddings``."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    """Default ``"float"``."""
    dimensions: Count | None = None
    pooling: Literal["mean", "cls", "last"] | None = None
    """Default the pooling of the model's training."""


class RerankBody(Body):
    """The body of ``/v1/rerank``."""

    query: str
    documents: Annotated[List[str | dict[str, Any]], Field(min_length=1)]
    top_n: Count | None = None
    return_documents: bool | None = None
    """Default True."""


class TokenizeBody(Body):
    """The body of ``/tokenize``: a prompt or messages."""

    prompt: str | None = None
    messages: List[dict[str, Any]] | None = None
    tools: List[Tool] | None = None
    special: bool | None = None
    """Default True: a text such as ``<|im_end|>`` in the prompt means the token of that name."""


class DetokenizeBody(Body):
    """The body of ``/detokenize``."""

    tokens: List[int]


class ResponsesText(BaseModel):
    """The form of the text of a response."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesReasoning(BaseModel):
    """Options of the reasoning."""

    effort: str | None = None
    summary: str | None = None


class ResponsesBody(Body):
    """The body of ``/v1/responses``."""

    input: str | List[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: List[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: ResponsesText | None = None
    reasoning: ResponsesReasoning | None = None
    previous_response_id: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: List[str] | None = None
    background: bool | None = None
    stream_options: dict[str, Any] | None = None
