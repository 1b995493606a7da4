"""The engine of a model in a process of its own: a crash in C ends the model's answers, and not the server."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import GgmlError
from ggml_cffi.isolate import Worker
from ggml_cffi.isolate.child import portable
from ggml_cffi.models import TokenLogprob
from ggml_cffi.server.engine import (
    Deliver,
    EmbedJob,
    Ended,
    Engine,
    Event,
    Facts,
    Failed,
    Job,
    Token,
)
from ggml_cffi.server.errors import LoadingError, QueueFullError, StoppingError
from ggml_cffi.server.local_engine import LocalEngine
from ggml_cffi.server.mailbox import call_once, together

#: A job to begin, or None to cancel the one with this number.
Command = tuple[int, Job | EmbedJob | None]

#: Seconds for which the process waits for events before it takes new commands.
_POLL_SECONDS = 0.02
#: Seconds between two attempts to start a process again, which double from the first to the last.
_RETRY_SECONDS = 1.0, 60.0

_logger = logging.getLogger("ggml_cffi.server")


@dataclass
class Events:
    """The events of one or more steps, in a form that is quickly sent to another process."""

    numbers: list[int] = field(default_factory=list)
    """The jobs of the tokens."""
    ids: list[int] = field(default_factory=list)
    """The tokens."""
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    others: list[tuple[int, Event]] = field(default_factory=list)
    """Other events, which come after the tokens of their jobs."""

    def add(self, number: int, event: Event) -> None:
        """Append the event of a job."""
        if isinstance(event, Token):
            self.numbers.append(number)
            self.ids.append(event.id)
            self.logprobs.append(event.logprob)
        else:
            self.others.append((number, event))

    def __iter__(self) -> Iterator[tuple[int, Event]]:
        """Iterate over jobs and events."""
        yield from zip(self.numbers, map(Token, self.ids, self.logprobs), strict=True)
        yield from self.others


class EngineHost(Closing):
    """The other process's side: an engine, whose events are collected for the parent."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._events = Events()
        self._arrived = threading.Condition()  # guards the events
        self._has_events = False  # those of a whole step
        self._cancel: dict[int, Callable[[], None]] = {}

    def facts(self) -> Facts:
        """Return the facts of the model."""
        return self._engine.facts

    def exchange(self, commands: list[Command], seconds: float) -> Events:
        """Begin and cancel jobs, and return all events, after at most ``seconds`` if there are none."""
        for number, job in commands:
            if job is None:
                cancel = self._cancel.get(number)
                if cancel is not None:
                    cancel()
            else:
                self._begin(number, job)
        with self._arrived:
            self._arrived.wait_for(lambda: self._has_events, seconds)
            events, self._events, self._has_events = self._events, Events(), False
        for number, _ in events.others:
            self._cancel.pop(number, None)
        return events

    def _begin(self, number: int, job: Job | EmbedJob) -> None:
        def deliver(event: Event) -> None:
            if isinstance(event, Failed):
                error = portable(event.error)
                event = Failed(error if isinstance(error, Exception) else GgmlError(str(error)))
            with self._arrived:
                self._events.add(number, event)
            call_once(self._wake)

        try:
            self._cancel[number] = self._engine.submit(job, deliver)
        except Exception as error:
            deliver(Failed(error))

    def _wake(self) -> None:
        with self._arrived:
            self._has_events = True
            self._arrived.notify()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def open_host(load: Callable[..., LocalEngine], path: str, options: Mapping[str, Any]) -> EngineHost:
    """Return the engine of a model, in the process that calls this."""
    return EngineHost(load(path, **options))


class IsolatedEngine(Engine):
    """An engine in a process of its own. If that process ends, the next job starts another one.

    Parameters
    ----------
    load
        A function that returns the engine, called in the process.
    path, options
        Its arguments.
    max_waiting
        Largest number of jobs that wait, besides those in generation.
    restarts_at_once
        True to start another process as soon as one ends, without waiting for a job.
    name
        Name of the process in messages and in the log.
    """

    def __init__(
        self,
        load: Callable[..., LocalEngine],
        path: str,
        options: Mapping[str, Any],
        *,
        max_waiting: int = 256,
        restarts_at_once: bool = False,
        name: str | None = None,
    ) -> None:
        self._max_jobs = max_waiting + int(options.get("parallel", 16))
        self._jobs: dict[int, tuple[Job | EmbedJob, Deliver]] = {}
        self._commands: list[Command] = []
        self._begun: set[int] = set()  # numbers of the jobs that have a token
        self._changed = threading.Condition()  # guards all of these
        self._numbers = itertools.count()
        self._stopped = False
        self._n_generated = 0
        self._is_ready = True
        self._delay: float | None = None  # seconds until the next start; None until the next job
        self._first_delay = 0.0 if restarts_at_once else None
        self._look = _RETRY_SECONDS[0] if restarts_at_once else None  # seconds between two looks at an idle process
        self.worker = Worker(open_host, load, path, options, name=name)
        self.facts: Facts = self.worker.call("facts")
        self._thread = threading.Thread(target=self._serve, name="ggml_cffi isolated engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job | EmbedJob, deliver: Deliver) -> Callable[[], None]:
        with self._changed:
            if self._stopped:
                raise StoppingError("the server is stopping")
            if self.n_jobs >= self._max_jobs:
                raise QueueFullError(f"{self.n_jobs} requests are waiting for this model already: try again later")
            number = next(self._numbers)
            self._jobs[number] = job, deliver
            self._commands.append((number, job))
            self._changed.notify()
        return lambda: self._cancel(number)

    def _cancel(self, number: int) -> None:
        with self._changed:
            if number not in self._jobs:
                return
            before = len(self._commands)
            self._commands = [command for command in self._commands if command[0] != number]
            sent = len(self._commands) == before
            if sent:
                self._commands.append((number, None))
        if not sent:
            self._deliver(number, Ended("cancelled"))

    @property
    def is_ready(self) -> bool:
        """False from the end of a process until another one has loaded the model."""
        return self._is_ready

    @property
    def n_jobs(self) -> int:
        """Number of jobs that wait or are in generation."""
        return len(self._jobs)

    @property
    def n_waiting(self) -> int:
        return len(self._jobs) - len(self._begun)

    @property
    def n_running(self) -> int:
        return len(self._begun)

    @property
    def n_generated(self) -> int:
        return self._n_generated

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._fail(StoppingError("the server is stopping"))

    def close(self) -> None:
        """Stop, and end the process."""
        self.stop()
        self.worker.close()  # the thread may wait for a process that loads the model
        self._thread.join()

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        while self._wait():
            try:
                if self._ended_idle():
                    self._lose()
                if not self._is_ready:
                    self._restart()
                if not self._jobs:
                    continue
                events: Events = self.worker.call("exchange", self._take_commands(), _POLL_SECONDS)
            except Exception as error:
                if self._is_ready and not self.worker.alive:
                    self._lose()
                if not self._stopped:
                    _logger.error("%s", error)
                self._fail(error)
                continue
            with together():
                for number, event in events:
                    self._deliver(number, event)

    def _wait(self) -> bool:
        """Wait for a job, or until it is time to look at the process, or to start another. Return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopped, self._look if self._is_ready else self._delay)
            return not self._stopped

    def _take_commands(self) -> list[Command]:
        with self._changed:
            commands, self._commands = self._commands, []
        return commands

    def _ended_idle(self) -> bool:
        """Return whether the process has ended without a job, so that none has to fail."""
        with self._changed:
            is_idle = len(self._jobs) == sum(job is not None for _, job in self._commands)
        return self._is_ready and is_idle and not self.worker.alive

    def _lose(self) -> None:
        """Note that the process has ended."""
        self._is_ready, self._delay = False, self._first_delay

    def _restart(self) -> None:
        """Start another process. If that fails, the next attempt has to wait longer, or for a job."""
        first, last = _RETRY_SECONDS
        if self._delay is not None:
            self._delay = min(max(2 * self._delay, first), last)
        try:
            self.worker.restart()
        except (ValueError, TypeError) as error:  # they would be the client's
            raise LoadingError(f"the model cannot be loaded again: {error}") from error
        self._is_ready = True

    def _deliver(self, number: int, event: Event) -> None:
        with self._changed:
            if number not in self._jobs:  # it was ended here
                return
            _, deliver = self._jobs[number]
            if isinstance(event, Token):
                self._n_generated += 1
                self._begun.add(number)
            else:
                del self._jobs[number]
                self._begun.discard(number)
        deliver(event)

    def _fail(self, error: Exception) -> None:
        """End all jobs with an error."""
        with self._changed:
            found = list(self._jobs)
            self._commands.clear()
        for number in found:
            self._deliver(number, Failed(error))
