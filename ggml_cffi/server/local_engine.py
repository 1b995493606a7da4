"""The engine of a model in this process.

Each replica has one thread, which computes a step for all of its answers at once. A thread for each client would cost a
third more processor time, and fragment the batches.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ggml_cffi.models import Timings
from ggml_cffi.models.generation import Request, Sampler, generate_many
from ggml_cffi.server.engine import Deliver, EmbedJob, Ended, Engine, Event, Facts, Failed, Job, Token, Vectors
from ggml_cffi.server.errors import QueueFullError, StoppingError
from ggml_cffi.server.mailbox import together

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ggml_cffi.models import Model
    from ggml_cffi.models.generation import Batcher

_logger = logging.getLogger("ggml_cffi.server")

#: Tokens of texts that an encoder embeds in one call, which nothing interrupts: several runs of most devices.
_EMBED_TOKENS = 8192
#: Seconds between two looks for the end of a step.
_POLL_SECONDS = 0.001


class LocalEngine(Engine):
    """An engine in this process.

    Parameters
    ----------
    model
        The model. The engine closes it.
    parallel
        Largest number of answers in generation at once, on all replicas together.
    max_waiting
        Largest number of jobs that wait for that.
    """

    def __init__(self, model: Model, *, parallel: int = 16, max_waiting: int = 256) -> None:
        self.model, self.facts = model, facts_of(model)
        self._max_waiting = max_waiting
        self._stopped = False
        each = 1 if model.deterministic else -(-parallel // len(model.batchers))
        self._replicas = [_Replica(batcher, each) for batcher in model.batchers] if self.facts.generates else []
        self._embeds = _EmbedQueue(model, self._replicas)

    @property
    def n_generated(self) -> int:
        return sum(replica.n_generated for replica in self._replicas)

    def submit(self, job: Job | EmbedJob, deliver: Deliver) -> Callable[[], None]:
        if self._stopped:
            raise StoppingError("the server is stopping")
        if self.n_waiting >= self._max_waiting:
            raise QueueFullError(f"{self.n_waiting} requests are waiting for this model already: try again later")
        if isinstance(job, EmbedJob):
            return self._embeds.add(job, deliver)
        self.model.architecture.check_decoder()
        running = _Running(self._request(job), deliver, logprobs=job.params.logprobs is not None)
        replica = min(self._replicas, key=lambda replica: replica.load)
        replica.add(running)
        return lambda: replica.cancel(running)

    def _request(self, job: Job) -> Request:
        model = self.model
        if not 0 < len(job.ids) <= model.n_ctx:
            raise ValueError(f"a prompt has 1 to {model.n_ctx} tokens, not {len(job.ids)}")
        limit = model.n_ctx + 1 if job.max_tokens is None else job.max_tokens
        ends = frozenset[int]() if job.params.ignore_eos else model.tokenizer.end_tokens
        sampler = _GuardedSampler.for_model(job.params, model.architecture.n_vocab, lambda: model.tokenizer)
        return Request(job.ids, sampler, limit, ends)

    @property
    def n_waiting(self) -> int:
        return sum(len(replica.waiting) for replica in self._replicas) + self._embeds.n_waiting

    @property
    def n_running(self) -> int:
        return sum(len(replica.active) for replica in self._replicas)

    def stop(self) -> None:
        self._stopped = True
        for replica in self._replicas:
            replica.stop()
        self._embeds.stop()

    def close(self) -> None:
        """Stop, wait for the threads, and close the model."""
        self.stop()
        for replica in self._replicas:
            replica.thread.join()
        self._embeds.thread.join()
        self.model.close()


class _GuardedSampler(Sampler):
    """A sampler whose exception ends its own answer only: the step serves other clients too."""

    error: Exception | None = None

    def __call__(self, logits: npt.NDArray[np.float32], previous: Sequence[int] = ()) -> int:
        try:
            return super().__call__(logits, previous)
        except Exception as error:
            self.error = error
            return 0  # not delivered

    @property
    def complete(self) -> bool:
        return self.error is not None or super().complete


@dataclass(eq=False)
class _Running:
    """An answer that waits or is in generation."""

    request: Request
    deliver: Deliver
    logprobs: bool
    done: bool = field(default=False, init=False)

    def token(self, token: int, place: int) -> Token:
        """Return the event of a token with its log probability, which may have to be computed."""
        return Token(token, self.request.sampler.logprobs[place])

    def end(self, event: Event) -> None:
        """Deliver the last event, once."""
        if not self.done:
            self.done = True
            self.deliver(event)


class _Replica:
    """The answers of one batcher, and the thread that computes them. It iterates over the requests to begin now."""

    def __init__(self, batcher: Batcher, parallel: int) -> None:
        self.batcher = batcher
        self.waiting: deque[_Running] = deque()
        self.active: dict[int, _Running] = {}
        self.n_generated = 0
        self._parallel = parallel
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards the two collections
        self._stopped = False
        self._timings = Timings()
        self._events: list[tuple[_Running, Event | Callable[[], Event]]] = []  # of the current step
        self.thread = threading.Thread(target=self._serve, name="ggml_cffi server", daemon=True)
        self.thread.start()

    @property
    def load(self) -> int:
        """Number of answers that wait or are in generation."""
        return len(self.waiting) + len(self.active)

    def wait_for_step(self) -> None:
        """Wait until a step has been computed, or there is none to compute."""
        before = self._run_seconds
        while self.load and not self._stopped and self._run_seconds == before:
            time.sleep(_POLL_SECONDS)

    @property
    def _run_seconds(self) -> float:
        """Seconds of all steps so far, which each step changes."""
        return self._timings.prompt_seconds + self._timings.decode_seconds

    def add(self, running: _Running) -> None:
        """Append an answer to those that wait."""
        with self._changed:
            if self._stopped:
                raise StoppingError("the server is stopping")
            self.waiting.append(running)
            self._changed.notify()

    def cancel(self, running: _Running) -> None:
        """End an answer: at once if it waits, else with the current step."""
        running.request.cancel()
        with self._changed:
            if running not in self.waiting:
                return
            self.waiting.remove(running)
        running.end(Ended("cancelled"))

    def stop(self) -> None:
        """End all answers, and then the thread."""
        with self._changed:
            self._stopped = True
            found = [*self.active.values(), *self.waiting]
            self.waiting.clear()
            self._changed.notify()
        for running in found:
            running.request.cancel()
            running.end(Failed(StoppingError("the server is stopping")))

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        while self._wait():
            try:
                with closing(generate_many(self.batcher, self, self._parallel, self._timings, self._deliver)) as tokens:
                    for number, token in tokens:
                        self._collect(number, token)
            except Exception as error:
                self._fail(error)
            self._deliver()

    def _wait(self) -> bool:
        """Wait for a job. Return False if there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._stopped)
            return not self._stopped

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        return self

    def __next__(self) -> tuple[int, Request]:
        """Return the request that waits longest, if the KV cache has room for its prompt."""
        with self._changed:
            if not self.waiting or not self._has_room(self.waiting[0]):
                raise StopIteration
            running = self.waiting.popleft()
            number = next(self._numbers)
            self.active[number] = running
        return number, running.request

    def _has_room(self, running: _Running) -> bool:
        """Return whether the prompt fits beside the answers in generation, so that none of them is evicted for it."""
        if not self.active:
            return True
        used = sum(len(other.request.ids) + len(other.request.token_ids) for other in self.active.values())
        return used + len(running.request.ids) <= self.batcher.runner.n_slots

    def _collect(self, number: int, token: int | None) -> None:
        """Note the event of a token, or of the end of an answer."""
        running = self.active[number]
        request, sampler = running.request, running.request.sampler
        failed = isinstance(sampler, _GuardedSampler) and sampler.error
        if token is not None and not failed:
            self.n_generated += 1
            place = len(request.token_ids) - 1
            self._events.append((running, partial(running.token, token, place) if running.logprobs else Token(token)))
        elif token is None:
            with self._changed:
                del self.active[number]
            self._events.append((running, Failed(failed) if failed else Ended(request.finish_reason or "stop")))

    def _deliver(self) -> None:
        """Deliver the events of a step together, so that they wake each loop once.

        The devices compute the next step meanwhile: the loop has the time in which this thread waits for them.
        """
        events, self._events = self._events, []
        with together():
            for running, event in events:
                try:
                    if callable(event):
                        running.deliver(event())
                    elif isinstance(event, Token):
                        running.deliver(event)
                    else:
                        running.end(event)
                except Exception:  # in the step of other answers
                    _logger.exception("an answer's events cannot be delivered: it ends")
                    running.request.cancel()

    def _fail(self, error: Exception) -> None:
        """End the answers in generation: their step failed."""
        with self._changed:
            found = [*self.active.values()]
            self.active.clear()
        self._events += [(running, Failed(error)) for running in found]


@dataclass(eq=False)
class _Embedding:
    """Texts that a client wants to embed."""

    job: EmbedJob
    deliver: Deliver
    n_taken: int = 0
    """Number of texts of the calls so far."""
    vectors: list[npt.NDArray[np.float32]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str | None, bool]:
        """The options, which jobs of one call share."""
        return self.job.pooling, self.job.normalize


class _EmbedQueue:
    """The texts that several clients want to embed, and the thread that embeds them, some of each client at once.

    Between two calls each replica computes a step: threads that wait for a lock get it in no order, and a long list of
    texts would hold up the answers in generation.
    """

    def __init__(self, model: Model, replicas: Sequence[_Replica]) -> None:
        self._model, self._replicas = model, replicas
        self._n_tokens = sum(replica.batcher.runner.n_batch for replica in replicas) or _EMBED_TOKENS
        self._jobs: list[_Embedding] = []
        self._changed = threading.Condition()  # guards the jobs
        self._stopped = False
        self.thread = threading.Thread(target=self._serve, name="ggml_cffi embeddings", daemon=True)
        self.thread.start()

    @property
    def n_waiting(self) -> int:
        """Number of jobs that have not begun."""
        with self._changed:
            return sum(not job.n_taken for job in self._jobs)

    def add(self, job: EmbedJob, deliver: Deliver) -> Callable[[], None]:
        """Append a job, and return a function that takes it out again."""
        if not job.texts:
            raise ValueError("there are no texts to embed")
        entry = _Embedding(job, deliver)
        with self._changed:
            if self._stopped:
                raise StoppingError("the server is stopping")
            self._jobs.append(entry)
            self._changed.notify()
        return lambda: self._end(entry, Ended("cancelled"))

    def _end(self, entry: _Embedding, event: Event) -> None:
        """Take a job out, and deliver its last event, once."""
        with self._changed:
            if entry not in self._jobs:
                return
            self._jobs.remove(entry)
        entry.deliver(event)

    def stop(self) -> None:
        """End all jobs, and then the thread."""
        with self._changed:
            self._stopped = True
            found = [*self._jobs]
            self._changed.notify()
        for entry in found:
            self._end(entry, Failed(StoppingError("the server is stopping")))

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    return
                taken = self._take()
            self._embed(taken)
            for replica in self._replicas:
                replica.wait_for_step()

    def _take(self) -> list[tuple[_Embedding, list[int]]]:
        """Return texts for the next call, one of each job in turn. The caller holds the lock."""
        first = self._jobs[0]
        waiting = deque(entry for entry in self._jobs if entry.key == first.key)
        taken: list[tuple[_Embedding, list[int]]] = []
        n_tokens = 0
        while waiting and n_tokens < self._n_tokens:
            entry = waiting.popleft()
            taken.append((entry, entry.job.texts[entry.n_taken]))
            entry.n_taken += 1
            n_tokens += len(taken[-1][1])
            if entry.n_taken < len(entry.job.texts):
                waiting.append(entry)
        done = {entry for entry, _ in taken}
        self._jobs.sort(key=lambda entry: entry in done)  # the others come first in the next call
        return taken

    def _embed(self, taken: list[tuple[_Embedding, list[int]]]) -> None:
        """Embed texts, and deliver the vectors of the jobs that are complete."""
        pooling, normalize = taken[0][0].key
        try:
            vectors = self._model.embed([ids for _, ids in taken], pooling=pooling, normalize=normalize)
        except Exception as error:
            for entry, _ in taken:
                self._end(entry, Failed(error))
            return
        for (entry, _), vector in zip(taken, vectors, strict=True):
            entry.vectors.append(vector)
            if len(entry.vectors) == len(entry.job.texts):
                self._end(entry, Vectors(np.stack(entry.vectors)))


def facts_of(model: Model) -> Facts:
    """Return the facts of a model."""
    architecture = model.architecture
    limit = architecture.max_sequence_length or model.n_ctx
    return Facts(
        n_ctx=model.n_ctx,
        generates=architecture.causal,
        n_embd=architecture.n_embd,
        max_embed_tokens=min(model.n_ctx, limit) if _can_embed(model) else 0,
        n_vocab=architecture.n_vocab,
        devices=tuple(placed.device for placed in model.placement),
        n_bytes=sum(device.total for device in model.plan.devices),
    )


def _can_embed(model: Model) -> bool:
    """Return whether layers are whole on a device, as embeddings need it."""
    try:
        return not model.scheduler.closed
    except ValueError:
        return False
