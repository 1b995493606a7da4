"""KV slots: the token in each row of the KV cache, and the attention masks that result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ggml_cffi.models.runners.base import n_kv_for

#: The owner of a free slot.
FREE = -1
_VISIBLE, _HIDDEN = np.float16(0), np.float16(-np.inf)


@dataclass(frozen=True)
class KVRanges:
    """Ranges of KV slots with equal lengths, at equal distances, to which the tokens of a batch attend."""

    start: int
    """First slot of the first range."""
    n_kv: int
    """Number of slots of each range."""
    stride: int = 0
    """Number of slots from the start of a range to that of the next."""
    places: tuple[int, ...] = ()
    """For each sequence its range; empty if all attend to one."""

    @property
    def n(self) -> int:
        """Number of ranges, 0 if all sequences attend to one. Some ranges may belong to no sequence."""
        return max(self.places) + 1 if self.places else 0


class KVSlots:
    """The slots of one KV cache, which several sequences share.

    A slot is one row of every layer's cache: it holds the keys and values of one token. A token may go to any free
    slot; an attention mask hides the slots of other sequences.

    Parameters
    ----------
    n_slots
        Rows of the cache.
    """

    def __init__(self, n_slots: int) -> None:
        self.sequence = np.full(n_slots, FREE, np.int32)
        """For each slot the id of the sequence whose token it holds, -1 for a free one."""
        self.position = np.zeros(n_slots, np.int32)
        """For each slot the position of its token in that sequence."""
        self.n_free = n_slots
        """Number of free slots."""
        self.end = 0
        """Number of the last slot in use, plus one."""
        self._visible: dict[int, npt.NDArray[np.float16]] = {}  # mask rows of sequences in decode, kept up to date

    def __len__(self) -> int:
        return len(self.sequence)

    def allocate(self, sequence: int, start: int, n: int) -> npt.NDArray[np.int64]:
        """Give the first ``n`` free slots to the tokens of ``sequence`` from position ``start`` on, and return them.

        At least ``n`` slots must be free.
        """
        slots = np.flatnonzero(self.sequence == FREE)[:n]
        self._take(sequence, slots, np.arange(start, start + n, dtype=np.int32))
        return slots.astype(np.int64, copy=False)

    def _take(self, sequence: int, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int32]) -> None:
        """Give free slots, at least one, to the tokens at some positions."""
        self.sequence[slots], self.position[slots] = sequence, positions
        if sequence in self._visible:
            self._visible[sequence][slots] = _VISIBLE
        self.n_free -= len(slots)
        self.end = max(self.end, int(slots.max()) + 1)

    def allocate_one(self, sequence: int, position: int) -> int:
        """Give the first free slot to one token, and return it. It takes a tenth of the time of :meth:`allocate`."""
        slot = int(self.sequence.argmin())  # the least value marks free slots
        self._take_one(sequence, slot, position)
        return slot

    def _take_one(self, sequence: int, slot: int, position: int) -> None:
        """Give a free slot to the token at a position."""
        self.sequence[slot], self.position[slot] = sequence, position
        if sequence in self._visible:
            self._visible[sequence][slot] = _VISIBLE
        self.n_free -= 1
        if slot >= self.end:
            self.end = slot + 1

    def release(self, sequence: int, start: int = 0) -> None:
        """Free the slots of ``sequence`` from position ``start`` on."""
        slots = np.flatnonzero((self.sequence == sequence) & (self.position >= start))
        self.sequence[slots] = FREE
        self._visible.pop(sequence, None)
        self.n_free += len(slots)
        used = np.flatnonzero(self.sequence != FREE)
        self.end = int(used[-1]) + 1 if used.size else 0

    def slots_of(self, sequence: int) -> npt.NDArray[np.int64]:
        """Return the slots of a sequence in the order of its positions."""
        slots = np.flatnonzero(self.sequence == sequence)
        return slots[np.argsort(self.position[slots])]

    def range_of(self, sequences: Sequence[int]) -> KVRanges:
        """Return the range of slots to which the tokens of some sequences attend: all slots in use."""
        return KVRanges(0, n_kv_for(self.end, len(self)))

    def ranges_of(self, sequences: Sequence[int], most: int) -> KVRanges:
        """Return the ranges of slots to which the last tokens of some sequences attend: one range for all of them.

        ``most`` is the largest number of ranges.
        """
        return self.range_of(sequences)

    def last_token_mask(self, sequence: int, n_kv: int, start: int = 0) -> npt.NDArray[np.float16]:
        """Return the attention mask of a sequence's last token over ``n_kv`` slots from ``start`` on.

        The token attends to the whole sequence. The array ``(n_kv,)`` is a view that later calls change. Do not write
        to it.
        """
        visible = self._visible.get(sequence)
        if visible is None:
            visible = self._visible[sequence] = np.where(self.sequence == sequence, _VISIBLE, _HIDDEN)
        return visible[start : start + n_kv]

    def mask(
        self,
        sequences: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        n_kv: int,
        window: int = 0,
        start: int = 0,
    ) -> npt.NDArray[np.float16]:
        """Return the attention mask of tokens over ``n_kv`` slots from ``start`` on: 0 is visible, ``-inf`` is hidden.

        Parameters
        ----------
        sequences, positions
            Sequence and position of each token, ``(n,)`` each. A token attends to its own sequence, up to itself.
        window
            If above 0, the number of last tokens that are visible, the token itself included.

        Returns
        -------
        numpy.ndarray
            float16 ``(n, n_kv)``.
        """
        owner, at = self.sequence[start : start + n_kv], self.position[start : start + n_kv]
        edges = [0, *(np.flatnonzero(sequences[1:] != sequences[:-1]) + 1).tolist(), len(sequences)]
        if len(edges) > len(sequences):  # one token of each
            return _as_mask((owner != sequences[:, None]) | _out_of_sight(at, positions, window))
        mask = np.full((len(sequences), n_kv), _HIDDEN)
        for first, end in pairwise(edges):  # of each sequence's tokens, over its own slots only
            own = np.flatnonzero(owner == sequences[first])
            hidden = _as_mask(_out_of_sight(at[own], positions[first:end], window))
            if own.size and own[-1] - own[0] < own.size:  # neighbors, which take a third of the time
                mask[first:end, own[0] : own[-1] + 1] = hidden
            else:
                mask[first:end, own] = hidden
        return mask


def _out_of_sight(at: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], window: int) -> npt.NDArray[np.bool_]:
    """Return for each of some positions of a sequence which other ones, ``at``, it does not see."""
    hidden: npt.NDArray[np.bool_] = at > positions[:, None]
    if window:
        hidden |= at <= positions[:, None] - window
    return hidden


def _as_mask(hidden: npt.NDArray[np.bool_]) -> npt.NDArray[np.float16]:
    """Return a mask from what it hides."""
    bits: npt.NDArray[np.uint16] = np.multiply(hidden, _HIDDEN.view(np.uint16))  # a third of np.where's time
    return bits.view(np.float16)
