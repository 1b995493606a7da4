"""Batches: token ids, positions, KV slots and attention masks of the sequences that a run computes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ggml_cffi.models.generation.kv_slots import KVRanges, KVSlots
from ggml_cffi.models.generation.sequence import TokenSequence
from ggml_cffi.models.runners.base import Batch, Runner

Mask = npt.NDArray[np.float16]
Positions = npt.NDArray[np.int32]

#: Largest number of tokens for which ggml's Vulkan backend compiles a matrix product of its own.
_FEW_TOKENS = 8


class BatchBuilder:
    """Builder of the batches of one runner, which also allocates the KV slots of their tokens.

    Parameters
    ----------
    runner
        The runner that computes the batches.
    slots
        The slots of its KV cache.
    one_by_one
        True to put the tokens of a very short prompt into batches of one token. Software devices take minutes to
        compile the shaders for each small number of tokens.
    alignment
        If above 0, the largest batch; the positions between the batches of a prompt are its multiples.
    """

    def __init__(self, runner: Runner, slots: KVSlots, *, one_by_one: bool = False, alignment: int = 0) -> None:
        self._runner, self._slots, self._alignment = runner, slots, alignment
        self._few = _FEW_TOKENS if one_by_one and not 0 < alignment <= _FEW_TOKENS else 0

    # ------------------------------------------------------------------ sizes

    def ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the token ranges of the batches that compute tokens ``start`` to ``end`` of one sequence."""
        step = self._alignment
        whole: list[tuple[int, int]] = []
        if step:
            edges = [start, *range(start // step * step + step, end, step)]
            whole, start = [*pairwise(edges)], edges[-1]
        if end - start <= self._few:
            return whole + [(i, i + 1) for i in range(start, end)]
        return whole + ([(start, end)] if step else self._runner.batch_ranges(start, end))

    def chunk_size(self, pending: int, capacity: int) -> int:
        """Return the number of ``pending`` tokens to compute in a run with room for ``capacity`` tokens; it may be 0.

        A long prompt is divided into chunks of about equal size.
        """
        n_batch = max(capacity, self._runner.n_batch)
        if pending <= self._few:
            return min(1, capacity)
        chunks = -(-pending // n_batch)
        n = -(-pending // chunks)
        return n if n <= capacity else 0 if capacity < n_batch else capacity

    # ------------------------------------------------------------------ batches

    def chunk(self, cache_id: int, ids: list[int], start: int, end: int, first_output: int) -> Batch:
        """Return the batch of tokens ``start`` to ``end`` of one sequence.

        Parameters
        ----------
        cache_id, ids
            The sequence.
        start, end
            The range of tokens.
        first_output
            Position of the first token whose logits are needed. The logits of the batch's last token are always
            computed, because a graph needs a result.
        """
        slots = self._slots.allocate(cache_id, start, end - start)
        positions = np.arange(start, end, dtype=np.int32)
        outputs = np.arange(min(max(first_output - start, 0), end - start - 1), end - start, dtype=np.int32)
        return self._batch(ids[start:end], np.full(end - start, cache_id, np.int32), positions, slots, outputs)

    def next_tokens(self, sequences: list[TokenSequence]) -> Batch:
        """Return the batch of one token of each sequence. It must be fast: devices are idle between two runs."""
        slots = self._slots
        ids = [sequence.cache_id for sequence in sequences]
        rows = [slots.allocate_one(sequence.cache_id, sequence.n_cached) for sequence in sequences]
        positions = np.array([sequence.n_cached for sequence in sequences], np.int32)
        ranges = slots.ranges_of(ids, self._runner.n_batch)
        mask, window_mask = self._last_masks(ids, positions, ranges)
        query_ids = result_ids = None
        if ranges.places:
            result_ids, query_ids = np.array(ranges.places, np.int32), np.zeros(ranges.n, np.int32)
            query_ids[result_ids] = np.arange(len(ids))
        return Batch(
            np.array([sequence.ids[sequence.n_cached] for sequence in sequences], np.int32),
            positions,
            np.array(rows, np.int64),
            mask,
            np.arange(len(sequences), dtype=np.int32),
            window_mask,
            ranges.start,
            ranges.stride,
            query_ids,
            result_ids,
        )

    def _last_masks(self, ids: list[int], positions: Positions, ranges: KVRanges) -> tuple[Mask, Mask | None]:
        """Return the masks of the last tokens of some sequences, by cache id, and for layers with a sliding window."""
        slots, start, n_kv = self._slots, ranges.start, ranges.n_kv
        window = self._runner.architecture.window
        if not ranges.places:
            masks = [slots.last_token_mask(cache_id, n_kv, start) for cache_id in ids]
            all_ids = np.array(ids, np.int32)
            return (
                masks[0][None] if len(masks) == 1 else np.stack(masks),
                slots.mask(all_ids, positions, n_kv, window, start) if window else None,
            )
        # Nothing reads the results of the other ranges, but if all slots were hidden there, they would be NaN.
        mask = np.zeros((ranges.n, n_kv), np.float16)
        window_mask = np.zeros_like(mask) if window else None
        for i, (cache_id, place) in enumerate(zip(ids, ranges.places, strict=True)):
            start = ranges.start + place * ranges.stride
            mask[place] = slots.last_token_mask(cache_id, n_kv, start)
            if window_mask is not None:
                window_mask[place] = slots.mask(np.array([cache_id]), positions[i : i + 1], n_kv, window, start)[0]
        return mask, window_mask

    def join(self, parts: list[tuple[TokenSequence, int]]) -> Batch:
        """Return the batch of the next tokens of several sequences, with one output for each sequence.

        Parameters
        ----------
        parts
            Sequences, each with its number of tokens.
        """
        tokens: list[int] = []
        sizes = [n for _, n in parts]
        rows = []
        for sequence, n in parts:
            tokens += sequence.ids[sequence.n_cached : sequence.n_cached + n]
            rows.append(self._slots.allocate(sequence.cache_id, sequence.n_cached, n))
        positions = np.concatenate([np.arange(s.n_cached, s.n_cached + n, dtype=np.int32) for s, n in parts])
        cache_ids = np.repeat(np.array([sequence.cache_id for sequence, _ in parts], np.int32), sizes)
        ends = np.cumsum(sizes, dtype=np.int32)
        return self._batch(tokens, cache_ids, positions, np.concatenate(rows), ends - 1)

    def _batch(
        self,
        tokens: list[int],
        cache_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int64],
        outputs: npt.NDArray[np.int32],
    ) -> Batch:
        """Return a batch with its attention masks."""
        ranges = self._slots.range_of(np.unique(cache_ids).tolist())
        n_kv, window = ranges.n_kv, self._runner.architecture.window
        return Batch(
            np.asarray(tokens, np.int32),
            positions,
            slots,
            self._slots.mask(cache_ids, positions, n_kv, 0, ranges.start),
            outputs,
            self._slots.mask(cache_ids, positions, n_kv, window, ranges.start) if window else None,
            ranges.start,
        )
