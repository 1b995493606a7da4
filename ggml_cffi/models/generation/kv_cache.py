"""The KV cache of one runner: the sequences that hold its slots, finished sequences that it keeps, and eviction.

The keys and values themselves are tensors on the devices (:attr:`KVCache.layers`), which the runner allocates when it
loads the model. This module assigns their rows to sequences; ``kv_slots`` has the table of the slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from ggml_cffi.models.architectures.base import LayerCache
from ggml_cffi.models.generation.kv_ranges import NeighborSlots
from ggml_cffi.models.generation.kv_slots import KVSlots
from ggml_cffi.models.generation.sequence import TokenSequence
from ggml_cffi.models.runners.base import Runner


class KVCache:
    """The KV cache of one runner, for one thread at a time.

    A finished sequence stays in the cache until its slots are needed. A later prompt with the same beginning takes its
    slots over.

    Parameters
    ----------
    runner
        The runner, which holds the tensors.
    n_ctx
        Largest number of tokens of one sequence.
    alignment
        If above 0, only the tokens of prompts are kept and reused, up to a multiple of this number.
    """

    def __init__(self, runner: Runner, n_ctx: int, alignment: int = 0) -> None:
        self._runner, self._alignment = runner, alignment
        self.slots = NeighborSlots(runner.n_slots, n_ctx) if runner.attends_to_ranges else KVSlots(runner.n_slots)
        """The slots, each with the sequence that holds it."""
        self.kept: OrderedDict[int, list[int]] = OrderedDict()
        """Token ids of finished sequences that are still in the cache, by cache id, the latest last."""
        self._last_id = 0

    @property
    def layers(self) -> Sequence[Sequence[LayerCache]]:
        """The tensors: for each layer keys and values, one pair for each device that has a part of them."""
        return self._runner.caches

    def new_id(self) -> int:
        """Return a cache id that no sequence has had."""
        self._last_id += 1
        return self._last_id

    # ------------------------------------------------------------------ finished sequences

    def keep(self, sequence: TokenSequence) -> None:
        """Keep the cached tokens of a finished sequence."""
        n = sequence.n_cached
        if n and self._alignment:
            n = self._aligned(min(n, sequence.n_prompt))
            self.slots.release(sequence.cache_id, n)
        if n:
            self.kept[sequence.cache_id] = sequence.ids[:n]

    def _aligned(self, n: int) -> int:
        """Return ``n``, rounded down to a multiple of the alignment if there is one."""
        return n - n % self._alignment if self._alignment else n

    def common_prefix(self, ids: list[int]) -> int:
        """Return the length of the longest prefix that ``ids`` has in common with a kept sequence."""
        return max((common_length(kept, ids) for kept in self.kept.values()), default=0)

    def reuse_prefix(self, sequence: TokenSequence) -> None:
        """Give ``sequence`` the slots of the kept sequence that has the longest prefix in common with it."""
        best, common = -1, 0
        prompt = sequence.ids[:-1]  # the last token is always computed, because its logits are needed
        for cache_id, ids in self.kept.items():
            n = self._aligned(common_length(ids, prompt))
            if n > common:
                best, common = cache_id, n
        if best >= 0:
            del self.kept[best]
            self.slots.release(best, common)
            sequence.cache_id, sequence.n_cached = best, common

    def clear_kept(self) -> None:
        """Free the slots of all kept sequences."""
        for cache_id in self.kept:
            self.slots.release(cache_id)
        self.kept.clear()

    # ------------------------------------------------------------------ eviction

    def free_slots(
        self, n: int, candidates: Callable[[], Sequence[TokenSequence]], by: TokenSequence | None = None
    ) -> bool:
        """Free slots until ``n`` are free. Return False if that is not possible.

        Kept sequences are evicted first, in order of age. Sequences in generation follow, the paused ones before the
        others, and in each group those that began last first.

        Parameters
        ----------
        n
            Number of slots.
        candidates
            Returns the sequences in generation that may be evicted, in the order in which they began.
        by
            The sequence that needs the slots, if a sequence in generation needs them.
        """
        while self.slots.n_free < n:
            if self.kept:
                self._evict_oldest()
                continue
            found = candidates()
            if not found:
                return False
            _, i = max((sequence.paused, i) for i, sequence in enumerate(found))
            self._evict(found[i], by)
        return True

    def place(self, cache_id: int, n: int) -> None:
        """Choose neighbouring slots for a new sequence of ``n`` tokens; evict kept ones for it if that helps."""
        slots = self.slots
        if isinstance(slots, NeighborSlots):
            start, fits = slots.find_start(n, self.kept)
            while not fits:
                self._evict_oldest()
                start, fits = slots.find_start(n, self.kept)
            slots.begin(cache_id, start)

    def clear_next(self, cache_id: int, n: int) -> None:
        """Evict kept sequences from the ``n`` slots after the last one of a sequence, where its next tokens belong."""
        if isinstance(self.slots, NeighborSlots):
            for owner in self.slots.owners_of_next(cache_id, n):
                if owner in self.kept:
                    del self.kept[owner]
                    self.slots.release(owner)

    def _evict_oldest(self) -> None:
        """Free the slots of the sequence that was kept first."""
        cache_id, _ = self.kept.popitem(last=False)
        self.slots.release(cache_id)

    def _evict(self, sequence: TokenSequence, by: TokenSequence | None) -> None:
        """Free all slots of a sequence in generation. It is computed again when there is room."""
        self.slots.release(sequence.cache_id)
        sequence.cache_id, sequence.n_cached, sequence.evicted_by = -1, 0, by


def common_length(a: list[int], b: list[int]) -> int:
    """Return the number of tokens that two sequences have in common at their beginnings."""
    n = min(len(a), len(b))
    start, end = 0, min(n, 1)
    while start < end and a[start:end] == b[start:end]:
        start, end = end, min(n, 2 * end)
    while end - start > 1:  # they differ before ``end``
        middle = (start + end) // 2
        if a[start:middle] == b[start:middle]:
            start = middle
        else:
            end = middle
    return start
