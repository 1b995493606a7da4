"""The interface of an engine: prompts of many clients in, events out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.handle import Closing
from ggml_cffi.models import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Job:
    """A prompt to continue."""

    ids: list[int]
    """Token ids of the prompt, at least one."""
    params: SamplingParams
    max_tokens: int | None = None
    """Largest number of tokens to generate; None until the context is full."""


@dataclass(frozen=True)
class EmbedJob:
    """Texts to embed."""

    texts: list[list[int]]
    """Token ids of each text, at least one text."""
    pooling: str | None = None
    normalize: bool = True


@dataclass(frozen=True)
class Token:
    """The next token of an answer."""

    id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Vectors:
    """The vectors of an :class:`EmbedJob`."""

    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ended:
    """The end of an answer."""

    reason: str
    """``"stop"``, ``"length"`` or ``"cancelled"``."""


@dataclass(frozen=True)
class Failed:
    """The end of a job by an error."""

    error: Exception


Event = Token | Vectors | Ended | Failed
#: Function that gets the events of one job, in any thread.
Deliver = Callable[[Event], None]


@dataclass(frozen=True)
class Facts:
    """Sizes and abilities of a loaded model."""

    n_ctx: int
    """Largest number of tokens of prompt and answer together."""
    generates: bool
    """True if the model generates text; False for an encoder."""
    n_embd: int
    max_embed_tokens: int
    """Largest number of tokens of a text to embed; 0 if the model cannot embed as it is loaded."""
    n_vocab: int
    devices: tuple[str, ...]
    n_bytes: int
    """Bytes of the model on all devices, as planned."""


class Engine(Closing, ABC):
    """Interface of the engines, in this process and in another."""

    facts: Facts

    @abstractmethod
    def submit(self, job: Job | EmbedJob, deliver: Deliver) -> Callable[[], None]:
        """Begin a job, and return a function that cancels it. Any thread may call both.

        ``deliver`` gets the events in order. The last one is :class:`Ended`, :class:`Vectors` or :class:`Failed`, and
        it comes for a cancelled job too.

        Raises
        ------
        QueueFullError
            If too many jobs wait.
        StoppingError
            If the engine stops.
        ValueError
            If the prompt does not fit, there is no text, or the parameters do not suit the model.
        """

    @property
    @abstractmethod
    def n_waiting(self) -> int:
        """Number of jobs that wait."""

    @property
    @abstractmethod
    def n_running(self) -> int:
        """Number of answers in generation."""

    @property
    @abstractmethod
    def n_generated(self) -> int:
        """Number of tokens generated so far, for all jobs together."""

    @abstractmethod
    def stop(self) -> None:
        """End all jobs with :class:`StoppingError`, and accept no others."""
