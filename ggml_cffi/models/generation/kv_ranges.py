"""KV slots for attention over ranges: a sequence's tokens are neighbours, and sequences begin at equal distances."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import gcd

import numpy as np
import numpy.typing as npt

from ggml_cffi.models.generation.kv_slots import FREE, KVRanges, KVSlots
from ggml_cffi.models.runners.base import RANGE_STEP

_ROOM = 128  # slots beyond its prompt that a new sequence gets, if there are as many
_MANY = 4  # lanes from which a kept sequence rather leaves its lane than that another one begins within a lane


class NeighborSlots(KVSlots):
    """The slots of a KV cache in which each sequence has neighbouring slots, as far as there is room.

    The cache is divided into lanes with room for a whole context, and each sequence begins a lane. If all lanes are
    taken, sequences begin at the half, the quarters, ... of lanes. If another sequence in generation has the next slot,
    a token gets any free slot; attention then reads more slots, which a mask hides.

    Parameters
    ----------
    n_slots
        Rows of the cache.
    n_ctx
        Largest number of tokens of one sequence.
    """

    def __init__(self, n_slots: int, n_ctx: int) -> None:
        super().__init__(n_slots)
        self._lane = max(n_slots // max(n_slots // n_ctx, 1), RANGE_STEP)
        self._spans: dict[int, tuple[int, int]] = {}  # the first slot, and the last plus one
        self._next: dict[int, int] = {}  # the slot after that of the last token

    # ------------------------------------------------------------------ allocation

    def begin(self, sequence: int, start: int) -> None:
        """Let the next token of a sequence without slots get the slot ``start``."""
        self._next[sequence] = start

    def find_start(self, n: int, kept: Collection[int] = ()) -> tuple[int, bool]:
        """Return the slot where a new sequence of ``n`` tokens shall begin.

        Parameters
        ----------
        n
            Number of tokens of the prompt.
        kept
            Sequences that may be evicted.

        Returns
        -------
        start, fits
            The slot, and False if sequences of ``kept`` must be evicted for it.
        """
        free = self.sequence == FREE
        kept_or_free = free | np.isin(self.sequence, [*kept]) if kept else free
        free_run, open_run = _run_lengths(free), _run_lengths(kept_or_free)
        parts = [self._lane >> k for k in range(self._lane.bit_length()) if self._lane >> k >= RANGE_STEP]
        many = parts[:1] if _MANY * self._lane <= len(self) else []
        for fits, distances, good in (
            (True, parts[:1], (free_run >= n) & (open_run >= self._lane)),
            (False, many, open_run >= self._lane),
            (True, parts[1:], (free_run >= n) & (open_run >= n + _ROOM)),
            (True, parts, free_run >= n),
            (False, parts, open_run >= n),
        ):
            for distance in distances:
                found = np.flatnonzero(good[::distance])
                if found.size:
                    return int(found[0]) * distance, fits or not kept
        return 0, True

    def owners_of_next(self, sequence: int, n: int) -> list[int]:
        """Return the sequences that hold some of the ``n`` slots after the last one of a sequence."""
        first = self._next[sequence]
        if n == 1:  # at each token
            owners = self.sequence[first : first + 1].tolist()
        else:
            owners = np.unique(self.sequence[first : first + n]).tolist()
        return [owner for owner in owners if owner != FREE]

    def allocate(self, sequence: int, start: int, n: int) -> npt.NDArray[np.int64]:
        if sequence not in self._next:
            self._next[sequence], _ = self.find_start(n)
        first = self._next[sequence]
        run = self.sequence[first : first + n]
        taken = np.flatnonzero(run != FREE)
        n_run = int(taken[0]) if taken.size else len(run)
        slots = np.arange(first, first + n_run, dtype=np.int64)
        if n_run < n:
            rest = np.flatnonzero(self.sequence == FREE)
            rest = rest[(rest < first) | (rest >= first + n_run)][: n - n_run]
            slots = np.concatenate([slots, rest])
        self._take(sequence, slots, np.arange(start, start + n, dtype=np.int32))
        self._note(sequence, int(slots.min()), int(slots.max()) + 1, int(slots[-1]) + 1)
        return slots

    def allocate_one(self, sequence: int, position: int) -> int:
        slot = self._next.get(sequence, len(self))
        if slot >= len(self) or self.sequence[slot] != FREE:
            return int(self.allocate(sequence, position, 1)[0])
        self._take_one(sequence, slot, position)
        self._note(sequence, slot, slot + 1, slot + 1)
        return slot

    def _note(self, sequence: int, low: int, high: int, following: int) -> None:
        span = self._spans.get(sequence)
        self._spans[sequence] = (low, high) if span is None else (min(low, span[0]), max(high, span[1]))
        self._next[sequence] = following

    def release(self, sequence: int, start: int = 0) -> None:
        super().release(sequence, start)
        self._spans.pop(sequence, None)
        self._next.pop(sequence, None)
        left = self.slots_of(sequence)
        if left.size:
            self._note(sequence, int(left.min()), int(left.max()) + 1, int(left[-1]) + 1)

    # ------------------------------------------------------------------ attention

    def range_of(self, sequences: Sequence[int]) -> KVRanges:
        """Return the one range that has all slots of some sequences."""
        spans = [self._spans[sequence] for sequence in sequences]
        return self._one_range(min(low for low, _ in spans), max(high for _, high in spans))

    def _one_range(self, low: int, high: int) -> KVRanges:
        n_kv = min(-(-(high - low) // RANGE_STEP) * RANGE_STEP, len(self))
        return KVRanges(min(low, len(self) - n_kv), n_kv)

    def ranges_of(self, sequences: Sequence[int], most: int) -> KVRanges:
        """Return a range for each of some sequences, or one for all of them if attention then reads fewer slots."""
        best = self.range_of(sequences)
        if len(sequences) == 1:
            return best
        spans = [self._spans[sequence] for sequence in sequences]
        least, distance = len(sequences) * best.n_kv, self._lane
        while distance >= RANGE_STEP:
            found = self._ranges(spans, distance)
            if found is not None:
                if found.n > min(2 * len(spans), most):
                    break
                if found.n * found.n_kv < least:
                    best, least = found, found.n * found.n_kv
            distance //= 2
        return best

    def _ranges(self, spans: list[tuple[int, int]], distance: int) -> KVRanges | None:
        """Return ranges that begin at multiples of ``distance``, one for each span; None if there are none."""
        order = sorted(range(len(spans)), key=lambda i: -spans[i][0])
        places, end = [0] * len(spans), len(self) // distance + 1
        for _ in range(3):  # a range that begins late may be too long for the cache: then it begins earlier
            following = end
            for i in order:
                places[i] = following = min(spans[i][0] // distance, following - 1)
            n_kv = max(high - place * distance for (_, high), place in zip(spans, places, strict=True))
            n_kv = -(-n_kv // RANGE_STEP) * RANGE_STEP
            first, last = places[order[-1]], places[order[0]]
            if first < 0:
                return None
            if last * distance + n_kv <= len(self):
                step = gcd(*(place - first for place in places))
                found = KVRanges(
                    first * distance, n_kv, step * distance, tuple((place - first) // step for place in places)
                )
                return found if found.n * RANGE_STEP <= len(self) else None
            end = (len(self) - n_kv) // distance + 1
        return None


def _run_lengths(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return for each index the number of True values from there to the next False, 0 where the value is False."""
    n = len(flags)
    stops = np.where(flags, n, np.arange(n))
    return np.minimum.accumulate(stops[::-1])[::-1] - np.arange(n)
