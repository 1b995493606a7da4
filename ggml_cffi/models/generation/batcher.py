"""Continuous batching: several texts grow at once in one KV cache.

There is no thread of its own. Whoever wants a token runs a step, for everybody who wants one at that moment: one caller
gets the speed of a loop, several callers in several threads share each run.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from threading import Lock, get_ident

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import ClosedError
from ggml_cffi.models.generation.kv_slots import Cells
from ggml_cffi.models.generation.sampling import Sampler
from ggml_cffi.models.runners.base import Batch, Runner

Logits = npt.NDArray[np.float32]

_PAUSE = 1.0  # seconds without a request after which a text may lose its place in the cache to a later one
_FEW_TOKENS = 8  # ggml's Vulkan backend has products of their own for each number of columns up to this


@dataclass
class Timings:
    """Counts and seconds of what one call of ``generate`` made.

    A run that several texts share counts whole for each of them.
    """

    prompt_tokens: int = 0
    """Tokens of the prompt, those taken from the cache included."""
    reused_tokens: int = 0
    """Tokens of the prompt whose keys and values an earlier text had left in the cache."""
    prompt_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def add(self, n: int, seconds: float, *, decoded: bool) -> None:
        """Count a run of ``n`` tokens."""
        with self._lock:
            if decoded:
                self.decode_seconds += seconds
                self.decoded_tokens += n
            else:
                self.prompt_seconds += seconds

    def begin(self, n: int, reused: int) -> None:
        """Count a prompt of ``n`` tokens, of which ``reused`` were in the cache."""
        with self._lock:
            self.prompt_tokens += n
            self.reused_tokens += reused

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed per second."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(eq=False)
class Growing:
    """A text that grows: what is known of it, and how far the cache has it."""

    ids: list[int]
    """The prompt's tokens, and those made since."""
    sampler: Sampler
    n_prompt: int
    sequence: int = -1
    """Its number in the cache, -1 while it has no place there."""
    n_cached: int = 0
    """Tokens whose keys and values are in the cache."""
    n_taken: int = 0
    """Tokens that the caller has got, the prompt's included."""
    wanting: bool = False
    """Whether a caller waits for the next token."""
    asked: tuple[int, float] = (0, 0.0)
    """The thread that asked for a token last, and when."""
    behind: Growing | None = None
    """The text that pushed it out of the cache: it comes back when that one pauses or is done."""
    done: bool = False
    timings: Timings = field(default_factory=Timings)

    @property
    def ready(self) -> bool:
        """Whether a token is there that the caller has not got."""
        return self.n_taken < len(self.ids)

    def ask(self) -> None:
        """Say that the caller waits for the next token."""
        self.asked = get_ident(), time.monotonic()
        self.wanting = True

    def take(self) -> int:
        """The next token, which is ready."""
        self.wanting = False
        self.n_taken += 1
        return self.ids[self.n_taken - 1]

    @property
    def pauses(self) -> bool:
        """Whether the caller does something else: asks for another text's token, or has not asked for a while."""
        if self.wanting:
            return False
        thread, when = self.asked
        return thread == get_ident() or time.monotonic() - when > _PAUSE

    @property
    def stands_aside(self) -> bool:
        """Whether it needs no more room for now."""
        return self.done or self.pauses

    @property
    def pending(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.ids) - self.n_cached


class Generator(Closing):
    """All texts that grow in one model's cache.

    Parameters
    ----------
    runner
        The model.
    n_ctx
        Most tokens of one text.
    one_by_one
        Compute a prompt of a few tokens one by one: software devices compile shaders for each small number of tokens,
        for minutes.
    """

    def __init__(self, runner: Runner, n_ctx: int, *, one_by_one: bool = False) -> None:
        self.runner, self.n_ctx = runner, n_ctx
        self._few = _FEW_TOKENS if one_by_one else 0
        self.cells = Cells(runner.n_rows)
        """Who holds which rows of the cache."""
        self.kept: OrderedDict[int, list[int]] = OrderedDict()
        """Texts that are done and still in the cache, by sequence, the latest last: their tokens."""
        self.lock = Lock()
        """Held during a step, and by whoever else uses the runner."""
        self._growing: list[Growing] = []
        self._finished: deque[Growing] = deque()
        self._last_sequence = 0

    @property
    def load(self) -> int:
        """Texts that grow, and one more while a run is under way: for choosing among several generators."""
        return len(self._growing) + self.lock.locked()

    def in_common(self, ids: list[int]) -> int:
        """Tokens at the beginning of ``ids`` that a kept text has too."""
        with self.lock:
            return max((common_length(kept, ids) for kept in self.kept.values()), default=0)

    # ------------------------------------------------------------------ one text

    def grow(self, ids: list[int], sampler: Sampler, *, reuse: bool = True, timings: Timings | None = None) -> Growing:
        """Begin a text. ``reuse`` takes what an earlier text with the same beginning has left in the cache."""
        text = Growing(list(ids), sampler, len(ids), n_taken=len(ids), timings=timings or Timings())
        with self.lock:
            self.runner.check_open()
            self.settle()
            if reuse:
                self._take_over(text)
            self._growing.append(text)
            text.timings.begin(len(ids), text.n_cached)
        return text

    def next(self, text: Growing) -> int:
        """The next token of ``text``.

        Raises
        ------
        ClosedError
            If the model or the text was closed.
        """
        text.ask()  # before the lock: a step under way in another thread may still take it along
        try:
            while not text.ready:
                self.step(text)
        finally:
            text.wanting = False
        return text.take()

    def finish(self, text: Growing) -> None:
        """End ``text``. What the cache has of it stays there until the room is needed."""
        # The garbage collector may call this in any thread, also in the middle of a step: no waiting for locks.
        if not text.done:
            text.done = True
            self._finished.append(text)
        if self.lock.acquire(blocking=False):
            try:
                self.settle()
            finally:
                self.lock.release()

    def settle(self) -> None:
        """Do what :meth:`finish` could not do at once; the caller holds :attr:`lock`."""
        while self._finished:
            text = self._finished.popleft()
            if text in self._growing:
                self._growing.remove(text)
                if text.n_cached:
                    self.kept[text.sequence] = text.ids[: text.n_cached]

    def logits(self, ids: list[int], n_out: int, progress: Callable[[int], None] | None = None) -> Logits:
        """Logits of the last ``n_out`` of ``ids``, as a text of their own: ``(n_out, n_vocab)``.

        ``progress`` is called with the tokens computed after each run.
        """
        found: list[Logits] = []
        with self.lock:
            sequence = self.free_rows(len(ids))
            ranges = self._ranges(0, len(ids))
            batches = (self._part(sequence, ids, start, end, len(ids) - n_out) for start, end in ranges)
            try:
                # Closed before anybody else may run: batches can be in flight when ``progress`` raises.
                with closing(self.runner.run_all(batches)) as results:
                    for (start, end), logits in zip(ranges, results, strict=True):
                        wanted = end - max(start, len(ids) - n_out)
                        if wanted > 0:
                            found.append(logits.copy())
                        if progress is not None:
                            progress(end)
            finally:
                self.cells.drop(sequence)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _part(self, sequence: int, ids: list[int], start: int, end: int, first: int) -> Batch:
        """A batch of some of a text's tokens, of which the results from number ``first`` on are wanted; at least one
        is, since a graph needs a result.
        """
        rows = self.cells.take(sequence, start, end - start)
        positions = np.arange(start, end, dtype=np.int32)
        wanted = np.arange(min(max(first - start, 0), end - start - 1), end - start, dtype=np.int32)
        return self.batch(ids[start:end], np.full(end - start, sequence, np.int32), positions, rows, wanted)

    def _ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Tokens of a text as batches."""
        if end - start <= self._few:
            return [(i, i + 1) for i in range(start, end)]
        return self.runner.ranges(start, end)

    # ------------------------------------------------------------------ steps

    def step(self, caller: Growing) -> None:
        """One run for ``caller`` and everybody else who wants a token. Errors as :meth:`next`."""
        with self.lock:
            if caller.done:
                raise ClosedError("this text is closed, or the model is")
            if caller.ready:  # another thread's step took it along
                return
            self.settle()
            start = time.perf_counter()
            parts = self._plan()
            if parts:
                logits = self._run(parts)
                seconds = time.perf_counter() - start
                for (text, n), row in zip(parts, logits, strict=True):
                    text.timings.add(n, seconds, decoded=text.n_cached >= text.n_prompt)
                    text.n_cached += n
                    if not text.pending:
                        text.ids.append(text.sampler(row, text.ids))
                return
        time.sleep(_PAUSE / 100)  # behind a text whose caller is about to ask again

    def _plan(self) -> list[tuple[Growing, int]]:
        """Who takes part in the next run, and with how many tokens."""
        parts: list[tuple[Growing, int]] = []
        chosen = [t for t in self._growing if t.wanting and not t.ready and (t.behind is None or t.behind.stands_aside)]
        # A text alone has several batches at once computed, if that is quicker.
        room = self.runner.n_batch * (self.runner.n_together if len(chosen) == 1 else 1)
        for text in sorted(chosen, key=lambda t: t.pending):  # those that need one token first: they are many and quick
            n = self._portion(text, room)
            if n and self._make_room(text, n, parts):
                text.behind = None
                parts.append((text, n))
                room -= n
        return parts

    def _portion(self, text: Growing, room: int) -> int:
        """How many of its pending tokens are computed now: equal parts of a long prompt."""
        pending, n_batch = text.pending, max(room, self.runner.n_batch)
        if pending <= self._few:
            return min(1, room)
        parts = -(-pending // n_batch)
        n = -(-pending // parts)
        return n if n <= room else 0 if room < n_batch else room

    def _run(self, parts: list[tuple[Growing, int]]) -> Logits:
        """The logits of the last token of each part."""
        try:
            if all(n == 1 for _, n in parts):
                return self.runner.run(self._next_tokens([text for text, _ in parts]))
            if len(parts) == 1:
                ((text, n),) = parts
                ranges, end = self._ranges(text.n_cached, text.n_cached + n), text.n_cached + n
                if len(ranges) > 1:
                    batches = (self._part(text.sequence, text.ids, *part, end - 1) for part in ranges)
                    with closing(self.runner.run_all(batches)) as results:
                        return deque(results, maxlen=1).pop()
            return self.runner.run(self._joined(parts))
        except BaseException:  # stopped or failed: what the rows hold is not known
            for text, _ in parts:
                self.cells.drop(text.sequence, text.n_cached)
            raise

    def _next_tokens(self, texts: list[Growing]) -> Batch:
        """A batch of one token of each text. Between two runs the devices wait: this is to be quick."""
        rows = [self.cells.take_one(text.sequence, text.n_cached) for text in texts]
        n_kv = self.runner.n_kv(self.cells.end)
        masks = [self.cells.seen(text.sequence, n_kv) for text in texts]
        positions = np.array([text.n_cached for text in texts], np.int32)
        window, near = self.runner.architecture.window, None
        if window:
            sequences = np.array([text.sequence for text in texts], np.int32)
            near = self.cells.mask(sequences, positions, n_kv, window)
        return Batch(
            np.array([text.ids[text.n_cached] for text in texts], np.int32),
            positions,
            np.array(rows, np.int64),
            masks[0][None] if len(masks) == 1 else np.stack(masks),
            np.arange(len(texts), dtype=np.int32),
            near,
        )

    def _joined(self, parts: list[tuple[Growing, int]]) -> Batch:
        """A batch of the next tokens of several texts."""
        tokens: list[int] = []
        sizes = [n for _, n in parts]
        rows = []
        for text, n in parts:
            tokens += text.ids[text.n_cached : text.n_cached + n]
            rows.append(self.cells.take(text.sequence, text.n_cached, n))
        positions = np.concatenate([np.arange(t.n_cached, t.n_cached + n, dtype=np.int32) for t, n in parts])
        sequences = np.repeat(np.array([t.sequence for t, _ in parts], np.int32), sizes)
        ends = np.cumsum(sizes, dtype=np.int32)
        return self.batch(tokens, sequences, positions, np.concatenate(rows), ends - 1)

    def batch(
        self,
        tokens: list[int],
        sequences: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int64],
        wanted: npt.NDArray[np.int32],
    ) -> Batch:
        """A batch with its masks."""
        n_kv = self.runner.n_kv(self.cells.end)
        window = self.runner.architecture.window
        return Batch(
            np.asarray(tokens, np.int32),
            positions,
            rows,
            self.cells.mask(sequences, positions, n_kv),
            wanted,
            self.cells.mask(sequences, positions, n_kv, window) if window else None,
        )

    # ------------------------------------------------------------------ room in the cache

    def new_sequence(self) -> int:
        """A number that no sequence has had."""
        self._last_sequence += 1
        return self._last_sequence

    def _take_over(self, text: Growing) -> None:
        """Begin with what the longest common beginning of a kept text has left in the cache."""
        best, common = -1, 0
        for sequence, ids in self.kept.items():
            n = common_length(ids, text.ids[:-1])  # the last token's logits are needed: it is computed in any case
            if n > common:
                best, common = sequence, n
        if best >= 0:
            del self.kept[best]
            self.cells.drop(best, common)
            text.sequence, text.n_cached = best, common

    def _make_room(self, text: Growing, n: int, parts: list[tuple[Growing, int]]) -> bool:
        """Free rows for ``n`` more tokens of ``text``, by taking them from texts that are done, pause, or came later.

        False if the room is others': those with ``parts`` in the run, and earlier ones.
        """
        if text.sequence < 0:
            text.sequence = self.new_sequence()
        needed = n + sum(m for _, m in parts)  # theirs are taken when the run is put together
        while self.cells.n_free < needed:
            if self.kept:
                sequence, _ = self.kept.popitem(last=False)
                self.cells.drop(sequence)
                continue
            running = [t for t, _ in parts]
            age = self._growing.index(text) if text in self._growing else -1
            movable = [
                t
                for i, t in enumerate(self._growing)
                if t is not text and t.n_cached and t not in running and (t.pauses or i > age)
            ]
            if not movable:
                return False
            self._push_out(max(movable, key=lambda t: (t.pauses, self._growing.index(t))), text)
        return True

    def _push_out(self, text: Growing, by: Growing) -> None:
        """Take ``text`` from the cache: it is computed anew when there is room again."""
        self.cells.drop(text.sequence)
        text.sequence, text.n_cached, text.behind = -1, 0, by

    def free_rows(self, n: int) -> int:
        """Make ``n`` rows free for something else than a growing text; a number for its sequence.

        The caller holds :attr:`lock`, until it has dropped the sequence.
        """
        self.settle()
        stranger = Growing([], Sampler(), 0)
        self._make_room(stranger, n, [])
        return stranger.sequence

    def drop_all(self) -> None:
        """Take everything from the cache; the caller holds :attr:`lock`."""
        for sequence in self.kept:
            self.cells.drop(sequence)
        self.kept.clear()

    def close(self) -> None:
        """End all texts, and close the runner."""
        with self.lock:
            for text in self._growing:
                text.done = True
            self._growing.clear()
            self.kept.clear()
            self.runner.close()


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    x, y = np.asarray(a[:n]), np.asarray(b[:n])
    return int(np.argmax(x != y))
