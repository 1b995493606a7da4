"""The batcher: continuous batching of several sequences over one runner.

The batcher has no thread of its own. A caller that needs a token runs a step, which computes the next token of every
sequence whose caller waits at that moment. A single caller is as fast as a plain loop. Callers in several threads share
each run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from threading import Lock, get_ident

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import AbortedError, ClosedError
from ggml_cffi.models.generation.batches import BatchBuilder
from ggml_cffi.models.generation.kv_cache import KVCache
from ggml_cffi.models.generation.logits_facts import logits_facts
from ggml_cffi.models.generation.sampling import Sampler
from ggml_cffi.models.generation.sequence import PAUSE_SECONDS, TokenSequence
from ggml_cffi.models.generation.timings import Timings
from ggml_cffi.models.runners.base import Batch, Runner

Logits = npt.NDArray[np.float32]
#: Work of a caller for the time in which devices compute.
Work = Callable[[], object]


class Batcher(Closing):
    """The loop over the sequences in generation of one runner.

    Parameters
    ----------
    runner
        The model on its devices. The batcher closes it.
    n_ctx
        Largest number of tokens of one sequence.
    one_by_one, alignment
        See :class:`~ggml_cffi.models.generation.batches.BatchBuilder`.
    """

    def __init__(self, runner: Runner, n_ctx: int, *, one_by_one: bool = False, alignment: int = 0) -> None:
        self.runner, self.n_ctx = runner, n_ctx
        self.cache = KVCache(runner, n_ctx, alignment)
        """The KV cache. Only the thread that holds :attr:`lock` may use it."""
        self.active: list[TokenSequence] = []
        """Sequences in generation, in the order in which they began."""
        self.lock = Lock()
        """The lock that every user of the runner or the cache must hold. A step holds it."""
        self._batches = BatchBuilder(runner, self.cache.slots, one_by_one=one_by_one, alignment=alignment)
        self._finished: deque[TokenSequence] = deque()  # still in ``active``
        self._running: list[TokenSequence] = []  # changed with ``runner.abort_lock``
        self._sampling_thread: int | None = None

    @property
    def workload(self) -> int:
        """Number of sequences in generation, plus one during a run, for the choice among several batchers."""
        return len(self.active) + self.lock.locked()

    @contextmanager
    def exclusive(self) -> Iterator[KVCache]:
        """Hold :attr:`lock`, move finished sequences to the kept ones, and yield the KV cache."""
        self._check_caller()
        with self.lock:
            self._settle()
            yield self.cache

    def common_prefix(self, ids: list[int]) -> int:
        """Return the length of the longest prefix that ``ids`` has in common with a kept sequence."""
        self._check_caller()
        with self.lock:
            return self.cache.common_prefix(ids)

    def _check_caller(self) -> None:
        """Raise RuntimeError in a logits processor: the step that called it holds the lock."""
        if self._sampling_thread == get_ident():
            raise RuntimeError("a logits processor cannot use the model that called it: load a second one for it")

    # ------------------------------------------------------------------ one sequence

    def add(
        self, ids: list[int], sampler: Sampler, *, reuse: bool = True, timings: Timings | None = None
    ) -> TokenSequence:
        """Begin a sequence with the prompt ``ids``.

        Parameters
        ----------
        ids
            The prompt's tokens, at least one.
        sampler
            The sampler, which chooses the next tokens.
        reuse
            True to take over the slots of a kept sequence with the same beginning.
        timings
            Counter of this sequence. Several sequences may share one.

        Raises
        ------
        ClosedError
            If the model is closed.
        """
        sequence = TokenSequence(list(ids), sampler, len(ids), n_taken=len(ids), timings=timings or Timings())
        with self.exclusive() as cache:
            self.runner.check_open()
            if reuse:
                cache.reuse_prefix(sequence)
            self.active.append(sequence)
            sequence.timings.add_prompt(len(ids), sequence.n_cached)
        return sequence

    def next(self, sequence: TokenSequence) -> int | None:
        """Return the next token of ``sequence``, computed by steps of this thread or of another.

        Returns
        -------
        int or None
            The token; None if the sequence was cancelled.

        Raises
        ------
        ClosedError
            If the model or the sequence was closed.
        Exception
            Any exception of the sequence's sampler.
        """
        sequence.ask()  # before the lock is taken: a step that another thread begins now includes this sequence
        try:
            while not (sequence.ready or sequence.cancelled):
                self.step(sequence)
        finally:
            sequence.waiting = False
        return None if sequence.cancelled else sequence.take()

    def cancel(self, sequence: TokenSequence) -> None:
        """Make a call of :meth:`next` for ``sequence`` return soon, from any thread.

        A run that computes cancelled sequences only is stopped, if the runner can stop it.
        """
        sequence.cancelled = True
        with self.runner.abort_lock:
            if self._running and all(s.cancelled for s in self._running):
                self.runner.abort()

    def finish(self, sequence: TokenSequence) -> None:
        """End ``sequence``. The cache keeps its keys and values until the slots are needed."""
        # The garbage collector may call this in any thread, even during a step: it must not wait for the lock.
        if not sequence.finished:
            sequence.finished = True
            self._finished.append(sequence)
        if self.lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self.lock.release()

    def _settle(self) -> None:
        """Move finished sequences from :attr:`active` to the kept ones; the caller holds :attr:`lock`."""
        while self._finished:
            sequence = self._finished.popleft()
            if sequence in self.active:
                self.active.remove(sequence)
                self.cache.keep(sequence)

    def logits(self, ids: list[int], n_out: int, progress: Callable[[int], None] | None = None) -> Logits:
        """Compute ``ids`` as a new sequence, and return the logits of the last ``n_out`` tokens.

        Parameters
        ----------
        ids
            Token ids.
        n_out
            Number of last tokens.
        progress
            Called after each run with the number of tokens computed so far.

        Returns
        -------
        numpy.ndarray
            float32 ``(n_out, n_vocab)``.
        """
        outputs: list[Logits] = []
        first = len(ids) - n_out
        with self.exclusive() as cache:
            cache_id = self.allocate(len(ids))
            cache.place(cache_id, len(ids))
            ranges = self._batches.ranges(0, len(ids))
            batches = (self._batches.chunk(cache_id, ids, start, end, first) for start, end in ranges)
            try:
                # Closed before the lock is free: batches can be in flight when ``progress`` raises.
                with closing(self.runner.run_all(batches)) as results:
                    for (_, end), logits in zip(ranges, results, strict=True):
                        if end > first:
                            outputs.append(logits.copy())
                        if progress is not None:
                            progress(end)
            finally:
                cache.slots.release(cache_id)
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def allocate(self, n: int) -> int:
        """Free ``n`` slots for tokens that belong to no sequence in generation, and return a cache id for them.

        The caller is inside :meth:`exclusive`, and has checked that the cache has ``n`` slots. It allocates the slots,
        and keeps or releases them before it leaves :meth:`exclusive`.
        """
        self.cache.free_slots(n, lambda: [sequence for sequence in self.active if sequence.n_cached])
        return self.cache.new_id()

    # ------------------------------------------------------------------ steps

    def step(self, caller: TokenSequence, meanwhile: Work | None = None) -> None:
        """Compute one run for ``caller`` and for every other sequence whose caller waits.

        Parameters
        ----------
        caller
            The sequence.
        meanwhile
            Work for the time in which devices compute, or this thread waits. It is called at least once then, and may
            be called in a step that computes nothing. It must not use the model.

        Raises
        ------
        ClosedError
            If the model or the sequence was closed.
        """
        self._check_caller()
        work = meanwhile or _nothing
        if self.lock.locked():  # for longer than a step, if another thread embeds texts
            work()
        with self.lock:
            if caller.ready or caller.cancelled:  # a step of another thread may have computed it
                return
            if caller.finished:
                raise ClosedError("this sequence is closed, or its model is")
            self._settle()
            start = time.perf_counter()
            parts = self._plan()
            if parts:
                for sequence, n in parts:
                    if n == sequence.n_pending:
                        sequence.sampler.prepare()
                logits = self._run_unless_cancelled(parts, work)
                if logits is None:
                    return
                self._sample(parts, logits, time.perf_counter() - start)
                return
        work()
        time.sleep(PAUSE_SECONDS / 100)  # another sequence needs the slots, and its caller is about to wait again

    def _sample(self, parts: list[tuple[TokenSequence, int]], logits: Logits, seconds: float) -> None:
        """Choose the next token of each sequence that is computed to its end, after a run of some seconds."""
        self._sampling_thread = get_ident()
        try:
            _find_facts(parts, logits)
            for (sequence, n), row in zip(parts, logits, strict=True):
                sequence.timings.add_run(n, seconds, decoded=sequence.n_cached >= sequence.n_prompt)
                sequence.n_cached += n
                if not sequence.n_pending:
                    sequence.sample(row)
        finally:
            self._sampling_thread = None

    def _plan(self) -> list[tuple[TokenSequence, int]]:
        """Return the sequences of the next run, each with the number of its tokens to compute."""
        parts: list[tuple[TokenSequence, int]] = []
        chosen = [s for s in self.active if s.waiting and not (s.ready or s.cancelled or _must_wait(s))]
        # A single sequence may fill several batches in flight.
        capacity = self.runner.n_batch * (self.runner.n_queued_batches if len(chosen) == 1 else 1)
        for sequence in sorted(chosen, key=lambda s: s.n_pending):  # decode before prefill: one token each
            n = self._batches.chunk_size(sequence.n_pending, capacity)
            if n and self._free_slots(sequence, n, parts):
                sequence.evicted_by = None
                parts.append((sequence, n))
                capacity -= n
        return parts

    def _free_slots(self, sequence: TokenSequence, n: int, parts: list[tuple[TokenSequence, int]]) -> bool:
        """Free ``n`` slots for ``sequence``, in addition to those of ``parts``. Return False if that is impossible."""
        if sequence.cache_id < 0:
            sequence.cache_id = self.cache.new_id()
        needed = n + sum(m for _, m in parts)  # slots are allocated when the batch is made
        return self.cache.slots.n_free >= needed or self.cache.free_slots(
            needed, lambda: self._evictable(sequence, parts), sequence
        )

    def _evictable(self, sequence: TokenSequence, parts: list[tuple[TokenSequence, int]]) -> list[TokenSequence]:
        """Return the sequences that may be evicted for ``sequence``: paused and later ones outside this run."""
        running = [s for s, _ in parts]
        age = self.active.index(sequence)
        return [
            s
            for i, s in enumerate(self.active)
            if s is not sequence and s.n_cached and s not in running and (i > age or s.paused)
        ]

    def _run_unless_cancelled(self, parts: list[tuple[TokenSequence, int]], work: Work) -> Logits | None:
        """Compute the parts. Return None if :meth:`cancel` stopped the run."""
        running = [sequence for sequence, _ in parts]
        with self.runner.abort_lock:
            if all(sequence.cancelled for sequence in running):
                return None
            self._running = running
        try:
            return self._run(parts, work)
        except AbortedError:
            if not any(sequence.cancelled for sequence in running):
                raise
            return None
        finally:
            with self.runner.abort_lock:
                self._running, self.runner.abort_requested = [], False

    def _run(self, parts: list[tuple[TokenSequence, int]], work: Work) -> Logits:
        """Compute the parts, and return the logits of the last token of each."""
        try:
            if not self.runner.attends_to_ranges or len(parts) == 1:
                return self._run_together(parts, work)
            # In one batch, the tokens of a prompt would attend to the slots of all sequences. A sequence gets slots
            # apart from those of others if it begins when these have theirs.
            single = [part for part in parts if _is_next_token(*part)]
            rows = iter(self._run_together(single, work).copy() if single else ())
            return np.stack(
                [next(rows) if _is_next_token(*part) else self._run_together([part], work)[-1].copy() for part in parts]
            )
        except BaseException:  # after a failure the contents of the new slots are unknown
            for sequence, _ in parts:
                self.cache.slots.release(sequence.cache_id, sequence.n_cached)
            raise

    def _run_together(self, parts: list[tuple[TokenSequence, int]], work: Work) -> Logits:
        """Compute the parts in one batch, or a single part in several."""
        for sequence, n in parts:
            if sequence.n_cached:
                self.cache.clear_next(sequence.cache_id, n)
            else:
                self.cache.place(sequence.cache_id, sequence.n_pending)
        if all(n == 1 for _, n in parts):
            return self.runner.run(self._batches.next_tokens([sequence for sequence, _ in parts]), work)
        if len(parts) == 1:
            ((sequence, n),) = parts
            ranges = self._batches.ranges(sequence.n_cached, sequence.n_cached + n)
            if len(ranges) > 1:
                work()
                with closing(self.runner.run_all(self._chunks(sequence, ranges))) as results:
                    return deque(results, maxlen=1).pop()
        return self.runner.run(self._batches.join(parts), work)

    def _chunks(self, sequence: TokenSequence, ranges: list[tuple[int, int]]) -> Iterator[Batch]:
        """Yield the batches of the ranges, until the sequence is cancelled; then raise AbortedError."""
        end = ranges[-1][1]
        for chunk in ranges:
            if sequence.cancelled:
                raise AbortedError("the sequence was cancelled")
            yield self._batches.chunk(sequence.cache_id, sequence.ids, *chunk, end - 1)

    def close(self) -> None:
        """End all sequences, and close the runner."""
        self._check_caller()
        with self.lock:
            for sequence in self.active:
                sequence.finished = True
            self.active.clear()
            self.cache.kept.clear()
            self.runner.close()


def _find_facts(parts: list[tuple[TokenSequence, int]], logits: Logits) -> None:
    """Give samplers the facts of their logits."""
    samplers = [(i, s.sampler) for i, (s, n) in enumerate(parts) if n == s.n_pending]
    kept = [i for i, sampler in samplers if sampler.needs_kept]
    if len(samplers) > 1 or kept:
        best = [i for i, sampler in samplers if sampler.needs_best]
        for (sequence, _), facts in zip(parts, logits_facts(logits, best, kept), strict=True):
            sequence.sampler.facts = facts


def _is_next_token(sequence: TokenSequence, n: int) -> bool:
    """Return whether ``n`` tokens of a sequence are one token after others."""
    return n == 1 and sequence.n_cached > 0


def _nothing() -> None:
    """Do nothing."""


def _must_wait(sequence: TokenSequence) -> bool:
    """Return whether the sequence that took this one's slots still needs them."""
    other = sequence.evicted_by
    return other is not None and not other.finished and not other.paused
