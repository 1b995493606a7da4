"""Interface of a runner: a batch of tokens in, logits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.errors import ClosedError
from ggml_cffi.models.architectures.base import Architecture, LayerCache
from ggml_cffi.models.runners.weights import DevicePlacement, Weights
from ggml_cffi.scheduler.scheduler import Scheduler

#: Attention reads a multiple of this many KV slots, so that one graph serves many tokens.
KV_STEP = 256

#: A range of KV slots has a multiple of this many slots, and the cache has at least as many slots for each range.
RANGE_STEP = 32

#: Sequences that :meth:`Model.generate` computes together if its caller names no number.
MAX_SEQUENCES = 16

_SMALLEST_IN_FLIGHT = 256  # tokens of a batch, if several batches are to be in flight

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Batch:
    """Tokens to compute in one run."""

    tokens: npt.NDArray[np.int32]
    """Token ids, ``(n,)``."""
    positions: npt.NDArray[np.int32]
    """Positions of the tokens in their sequences, ``(n,)``."""
    kv_slots: npt.NDArray[np.int64]
    """KV slots that receive the tokens' keys and values, ``(n,)``."""
    mask: npt.NDArray[np.float16]
    """Attention mask, ``(n, n_kv)``: 0 where a token attends to a KV slot, ``-inf`` elsewhere. With ranges of KV slots
    it has a row for each range: ``(n_ranges, n_kv)``."""
    output_ids: npt.NDArray[np.int32]
    """Tokens with an output, by their place in the batch, ``(n_out,)``."""
    window_mask: npt.NDArray[np.float16] | None = None
    """Mask of the layers with a sliding window. Default ``mask``."""
    kv_start: int = 0
    """KV slot of the mask's first column. Only a runner that :attr:`~Runner.attends_to_ranges` can have another than
    0, and the fields below."""
    kv_stride: int = 0
    """Number of KV slots from the start of one range to that of the next."""
    query_ids: npt.NDArray[np.int32] | None = None
    """For each range of KV slots the token that attends to it, by its place in the batch, ``(n_ranges,)``. None if all
    tokens attend to the same range. A range may have any token if nothing reads its result."""
    result_ids: npt.NDArray[np.int32] | None = None
    """For each token its range, ``(n,)``; None with :attr:`query_ids`."""

    def check(self, n_vocab: int, n_slots: int) -> None:
        """Raise ValueError if token ids, KV slots or output ids are out of range: ggml would end the process."""
        for name, values, end in (
            ("token ids", self.tokens, n_vocab),
            ("KV slots", self.kv_slots, n_slots),
            ("output ids", self.output_ids, len(self.tokens)),
        ):
            if len(values) and not 0 <= values.min() <= values.max() < end:
                raise ValueError(f"{name} are {values.min()} to {values.max()}: they must be 0 to {end - 1}")


class Runner(Closing, ABC):
    """A model with its weights and KV cache on its devices.

    One thread at a time may call a runner: threads that share it hold a lock around each call. A runner does not check
    batches, and ids that are out of range end the process; see :meth:`Batch.check`.
    """

    architecture: Architecture
    weights: Weights
    """Weights and KV caches."""
    n_batch: int
    """Largest number of tokens in a :class:`Batch`."""
    n_slots: int
    """KV slots of the cache, a multiple of :data:`KV_STEP`."""
    best_prefill_batch: int | None = None
    """Batch size at which one sequence's prefill is fastest, if that is less than :attr:`n_batch`."""
    n_in_flight: int = 1
    """Number of batches that are computed at the same time, if :meth:`run_all` gets that many."""
    attends_to_ranges: bool = False
    """True if batches of one sequence attend to its own KV slots only, and a token of each of several sequences to a
    range of slots; sequences then have neighbouring slots. On a processor, attention takes as long as it has slots."""
    abort_lock: AbstractContextManager[Any]
    """Lock to hold while a run is noted as begun or ended, and during :meth:`abort`. Reentrant: a signal handler may
    abort at any point."""
    abort_requested: bool = False
    """True after :meth:`abort`, until the caller of the run has noted its end."""
    n_queued_batches: int = 1
    """Number of batches to pass to one :meth:`run_all`: the next is built while one is computed."""

    @property
    def placement(self) -> list[DevicePlacement]:
        """Layers and bytes that each device holds."""
        return self.weights.placement

    @property
    def caches(self) -> Sequence[Sequence[LayerCache]]:
        """For each layer the keys and values: one entry for each device that computes the layer."""
        return self.weights.caches

    @property
    @abstractmethod
    def scheduler(self) -> Scheduler | None:
        """A scheduler over all devices, for embeddings; None if layers are sharded."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """True once the model is closed."""

    @abstractmethod
    def run(self, batch: Batch, meanwhile: Callable[[], object] | None = None) -> Logits:
        """Return the logits ``(n_out, n_vocab)`` of a batch's output tokens, valid until the next run.

        Parameters
        ----------
        batch
            The batch.
        meanwhile
            Called once: while devices compute, or before if the host has no time then. It must not wait for locks that
            another thread holds while it waits for a device.

        Raises
        ------
        ClosedError
            If the model is closed.
        """

    def run_all(self, batches: Iterable[Batch]) -> Generator[Logits, None, None]:
        """Yield the logits of batches in order, each valid until the next is asked for.

        A batch may attend to the KV slots of earlier batches. The runner takes a batch from ``batches`` when it can
        begin to compute it; its tokens need KV slots from then on. Close the generator if you leave it early: it
        then waits for batches in flight.
        """
        yield from map(self.run, batches)

    def abort(self) -> None:
        """Stop the run in progress, from any thread, if the device can: the run raises :class:`AbortedError`.

        Only the CPU can. The caller holds :attr:`abort_lock`.
        """
        self.abort_requested = True

    @abstractmethod
    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """Return the nodes that the last run computed, in order, each with its backend. Views are left out."""

    def batch_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return tokens ``start`` to ``end`` of a sequence as ranges of about equal size, one for each batch."""
        n = end - start
        parts = -(-n // min(self.n_batch, self.best_prefill_batch or n))
        if parts < self.n_in_flight:  # smaller batches take longer for each token, but run at the same time
            parts = max(min(self.n_in_flight, n // _SMALLEST_IN_FLIGHT), parts)
        return [*pairwise([start + n * i // parts for i in range(parts + 1)])]

    def check_open(self) -> None:
        """Raise ClosedError if the model is closed."""
        if self.closed:
            raise ClosedError("this model is closed")


def n_kv_for(end: int, n_slots: int) -> int:
    """Return the number of KV slots that attention reads if all slots in use are before ``end``."""
    return min(-(-max(end, 1) // KV_STEP) * KV_STEP, n_slots)


def kv_slots_for(n_ctx: int) -> int:
    """Return the number of KV slots for a context: a multiple of :data:`KV_STEP`."""
    return -(-n_ctx // KV_STEP) * KV_STEP
