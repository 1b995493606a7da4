"""What every runner of a model does: tokens and what they may look at in, logits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError
from ggml_cffi.models.architectures.base import Architecture, LayerCache
from ggml_cffi.models.runners.weights import DevicePlacement, Progress, Weights
from ggml_cffi.scheduler.scheduler import Scheduler

KV_STEP = 256  # attention looks at a multiple of this many cache rows, so that one graph serves many tokens

_FEWEST_IN_FLIGHT = 256  # tokens of a batch that is computed at the same time as another, rather than with it

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Tokens to compute in one run."""

    tokens: npt.NDArray[np.int32]
    """Ids, ``(n,)``."""
    positions: npt.NDArray[np.int32]
    """Positions in their texts, ``(n,)``."""
    rows: npt.NDArray[np.int64]
    """Cache rows for their keys and values, ``(n,)``."""
    mask: npt.NDArray[np.float16]
    """What they may look at, ``(n, n_kv)``."""
    wanted: npt.NDArray[np.int32]
    """Those of them whose results are wanted, ``(n_out,)``."""
    near: npt.NDArray[np.float16] | None = None
    """As ``mask``, for layers with a sliding window."""

    def check(self, n_vocab: int, n_rows: int) -> None:
        """Raise ValueError if ids, rows or wanted tokens are out of range: ggml would end the process, or worse."""
        for name, values, end in (
            ("token ids", self.tokens, n_vocab),
            ("cache rows", self.rows, n_rows),
            ("wanted tokens", self.wanted, len(self.tokens)),
        ):
            if len(values) and not 0 <= values.min() <= values.max() < end:
                raise ValueError(f"{name} are 0 to {end - 1}, not {values.min()} to {values.max()}")


class Runner(Closing, ABC):
    """A model with its weights and its cache on its devices.

    One call at a time: whoever shares a runner between threads holds a lock around each.
    """

    architecture: Architecture
    n_batch: int
    """Most tokens of a :class:`Batch`."""
    n_rows: int
    """Rows of the cache: a multiple of :data:`KV_STEP`."""
    n_at_once: int | None = None
    """Tokens of one text that are quicker together than more of them are, if that is less than :attr:`n_batch`."""
    n_in_flight: int = 1
    """Batches that are computed at the same time, if :meth:`run_all` gets as many."""
    n_together: int = 1
    """Batches that are worth giving to :meth:`run_all` together: the next is made while one is computed."""
    placement: list[DevicePlacement]
    """What each device holds."""
    placed: Weights | None = None
    """The weights, where each is whole on one device."""
    caches: Sequence[Sequence[LayerCache]]
    """For each layer the keys and values; in parts by heads, where several devices have some each."""

    def n_kv(self, end: int) -> int:
        """How many cache rows a run looks at whose last row in use is before ``end``."""
        return min(-(-max(end, 1) // KV_STEP) * KV_STEP, self.n_rows)

    def ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Tokens ``start`` to ``end`` of a text as batches of about equal size."""
        n = end - start
        parts = -(-n // min(self.n_batch, self.n_at_once or n))
        if parts < self.n_in_flight:  # smaller batches, which take longer for each token, but at the same time
            parts = max(min(self.n_in_flight, n // _FEWEST_IN_FLIGHT), parts)
        return [*pairwise([start + n * i // parts for i in range(parts + 1)])]

    @abstractmethod
    def run(self, batch: Batch) -> Logits:
        """Logits ``(n_out, n_vocab)`` of the tokens of ``batch`` that are wanted, until the next run.

        Raises
        ------
        ClosedError
            If the model is closed.
        """

    def run_all(self, batches: Iterable[Batch]) -> Generator[Logits, None, None]:
        """The logits of batches, in their order, each until the next is asked for.

        Each batch may look at what those before it have written to the cache. It is asked for when it can begin:
        its keys and values need rows of the cache from then on. Close the generator if it is left early: it waits for
        what is in flight.
        """
        yield from map(self.run, batches)

    @abstractmethod
    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """What the last run computed, in order, and on which backend each; views, which compute nothing, left out."""

    @property
    @abstractmethod
    def scheduler(self) -> Scheduler:
        """A scheduler over all devices.

        Raises
        ------
        ClosedError
            If the model is closed.
        """

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the model is closed."""

    def check_open(self) -> None:
        """Raise ClosedError if the model is closed."""
        if self.closed:
            raise ClosedError("this model is closed")


class WholeRunner(Runner):
    """A runner whose weights are each whole on one device.

    Parameters
    ----------
    architecture
        The model.
    backends
        The preferred first, the CPU last.
    n_ctx
        Rows of the KV cache, which are rounded up.
    n_batch
        Most tokens of one run.
    kv_dtype
        Type of keys and values in the cache.
    progress
        Called with bytes done and bytes in all while weights are loaded.
    where
        For each layer the index of its backend; default :func:`~ggml_cffi.models.runners.weights.split_layers`.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        n_ctx: int,
        n_batch: int,
        kv_dtype: Type,
        progress: Progress | None,
        where: Sequence[int] | None,
    ) -> None:
        self.architecture, self.n_batch, self.n_rows = architecture, n_batch, n_rows(n_ctx)
        self._scheduler: Scheduler | None = None  # there once all else is
        self.weights = self.placed = Weights(architecture, backends, self.n_rows, kv_dtype, progress, where=where)
        self.placement, self.caches = self.weights.placement, [[cache] for cache in self.weights.cache]

    @property
    def closed(self) -> bool:
        """Whether the model is closed."""
        return self._scheduler is None

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler over all devices."""
        if self._scheduler is None:
            raise ClosedError("this model is closed")
        return self._scheduler

    def close(self) -> None:
        """Free weights, caches and scheduler."""
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close()
        self.weights.close()


def n_rows(n_ctx: int) -> int:
    """Rows of the cache for a context: a multiple of :data:`KV_STEP`."""
    return -(-n_ctx // KV_STEP) * KV_STEP
