"""`DeterministicBatcher`: equal calls have equal results, bit for bit, whatever else the model computes.

Sums are rounded in another way in batches of another size, with another number of KV slots, or with keys in other
slots. This batcher therefore computes each sequence as if it were alone: its tokens have the first KV slots in order,
its prompt is divided at the same positions, and its answer is computed token by token.
"""

from __future__ import annotations

from ggml_cffi.models.generation.batcher import Batcher
from ggml_cffi.models.generation.sequence import TokenSequence
from ggml_cffi.models.runners.base import KV_STEP, Runner


class DeterministicBatcher(Batcher):
    """A batcher for one sequence at a time, which it always computes in the same steps.

    A sequence has the whole KV cache until it ends or its caller pauses; then the next one takes it. Whole batches of
    its prompt are kept for later prompts with the same beginning.

    Parameters
    ----------
    runner, n_ctx, one_by_one
        As for :class:`~ggml_cffi.models.generation.batcher.Batcher`.
    """

    def __init__(self, runner: Runner, n_ctx: int, *, one_by_one: bool = False) -> None:
        size = runner.best_prefill_batch or (KV_STEP if runner.n_in_flight > 1 else runner.n_batch)
        self._size = min(size, runner.n_batch)
        super().__init__(runner, n_ctx, one_by_one=one_by_one, alignment=self._size)

    def allocate(self, n: int) -> int:
        self._clear()
        return self.cache.new_id()

    def _plan(self) -> list[tuple[TokenSequence, int]]:
        owner = next((s for s in self.active if s.n_cached), None)
        waiting = [s for s in self.active if s.waiting and not (s.ready or s.cancelled)]
        if owner not in waiting and owner is not None and not owner.paused:
            return []  # its caller is about to ask for the next token
        if not waiting:
            return []
        sequence = owner if owner is not None and owner in waiting else waiting[0]
        if not sequence.n_cached:
            self._clear()
            sequence.cache_id = self.cache.new_id()
        pending = sequence.n_prompt - sequence.n_cached
        if pending <= 0:
            return [(sequence, 1)]
        batches = max(self.runner.n_batch * self.runner.n_queued_batches // self._size, 1)
        return [(sequence, min(pending, batches * self._size))]

    def _clear(self) -> None:
        """Free all slots."""
        n = len(self.cache.slots)
        self.cache.free_slots(n, lambda: [sequence for sequence in self.active if sequence.n_cached])
