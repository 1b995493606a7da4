"""A sequence in generation: its tokens, its number in the KV cache, and the state of its caller."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from threading import get_ident

import numpy as np
import numpy.typing as npt

from ggml_cffi.models.generation.sampling import Sampler
from ggml_cffi.models.generation.timings import Timings

#: Seconds without a call for the next token after which a sequence counts as paused.
PAUSE_SECONDS = 1.0


@dataclass(eq=False)
class TokenSequence:
    """The tokens of a prompt and those generated after it.

    :meth:`Batcher.add <ggml_cffi.models.generation.batcher.Batcher.add>` creates it, and the batcher changes it. Only
    :meth:`ask` and :meth:`take` may be called, and :attr:`cancelled` set, without the batcher's lock.
    """

    ids: list[int]
    """Token ids: the prompt's, then the generated ones."""
    sampler: Sampler
    n_prompt: int
    """Number of tokens of the prompt."""
    cache_id: int = -1
    """Number of the sequence in the KV cache, -1 while it holds no slots."""
    n_cached: int = 0
    """Number of tokens whose keys and values are in the KV cache."""
    n_taken: int = 0
    """Number of tokens that the caller has, those of the prompt included."""
    waiting: bool = False
    """True while a caller waits for the next token."""
    last_call: tuple[int, float] = (0, 0.0)
    """Thread and time of the last call for a token."""
    evicted_by: TokenSequence | None = None
    """The sequence that took the KV slots of this one, which returns to the cache once that one pauses or ends."""
    finished: bool = False
    cancelled: bool = False
    """True if no further token is wanted. The caller ends the sequence."""
    error: Exception | None = None
    """Exception of the sampler, after which there is no further token."""
    timings: Timings = field(default_factory=Timings)

    @property
    def ready(self) -> bool:
        """True if a token was generated that the caller has not taken, or the sampler failed."""
        return self.n_taken < len(self.ids) or self.error is not None

    def ask(self) -> None:
        """Note that the calling thread waits for the next token."""
        self.last_call = get_ident(), time.monotonic()
        self.waiting = True

    def take(self) -> int:
        """Return the next token, which must be ready, or raise the exception of the sampler."""
        self.waiting = False
        if self.error is not None:
            raise self.error
        self.n_taken += 1
        return self.ids[self.n_taken - 1]

    def sample(self, logits: npt.NDArray[np.float32]) -> None:
        """Choose the next token from its logits. An exception of the sampler belongs to this sequence only."""
        try:
            self.ids.append(self.sampler(logits, self.ids))
        except Exception as error:
            self.error = error

    @property
    def paused(self) -> bool:
        """True if the caller does other work: its thread is in another call now, or made no call for a while."""
        if self.waiting:
            return False
        thread, when = self.last_call
        return thread == get_ident() or time.monotonic() - when > PAUSE_SECONDS

    @property
    def n_pending(self) -> int:
        """Number of tokens that are not computed yet."""
        return len(self.ids) - self.n_cached
