"""The engine of a model in a process of its own: a crash in C ends the model's answers, and not the server."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ggml_cffi.core.handle import Closing
from ggml_cffi.errors import GgmlError
from ggml_cffi.isolate import Worker
from ggml_cffi.isolate.child import portable
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
from ggml_cffi.server.errors import QueueFullError, StoppingError
from ggml_cffi.server.local_engine import LocalEngine
from ggml_cffi.server.mailbox import together

#: A job to begin, or None to cancel the one with this number.
Command = tuple[int, Job | EmbedJob | None]

#: Seconds for which the process waits for events before it takes new commands.
_POLL_SECONDS = 0.02

_logger = logging.getLogger("ggml_cffi.server")


class EngineHost(Closing):
    """The other process's side: an engine, whose events are collected for the parent."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._events: list[tuple[int, Event]] = []
        self._arrived = threading.Condition()
        self._cancel: dict[int, Callable[[], None]] = {}

    def facts(self) -> Facts:
        """Return the facts of the model."""
        return self._engine.facts

    def exchange(self, commands: list[Command], seconds: float) -> list[tuple[int, Event]]:
        """Begin and cancel jobs, and return all events, after at most ``seconds`` if there are none."""
        for number, job in commands:
            if job is None:
                cancel = self._cancel.get(number)
                if cancel is not None:
                    cancel()
            else:
                self._begin(number, job)
        with self._arrived:
            self._arrived.wait_for(lambda: self._events, seconds)
            events, self._events = self._events, []
        for number, event in events:
            if not isinstance(event, Token):
                self._cancel.pop(number, None)
        return events

    def _begin(self, number: int, job: Job | EmbedJob) -> None:
        def deliver(event: Event) -> None:
            if isinstance(event, Failed):
                error = portable(event.error)
                event = Failed(error if isinstance(error, Exception) else GgmlError(str(error)))
            with self._arrived:
                self._events.append((number, event))
                self._arrived.notify()

        try:
            self._cancel[number] = self._engine.submit(job, deliver)
        except Exception as error:
            deliver(Failed(error))

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
    """

    def __init__(
        self, load: Callable[..., LocalEngine], path: str, options: Mapping[str, Any], *, max_waiting: int = 256
    ) -> None:
        self._max_jobs = max_waiting + int(options.get("parallel", 16))
        self._jobs: dict[int, tuple[Job | EmbedJob, Deliver]] = {}
        self._commands: list[Command] = []
        self._begun: set[int] = set()  # numbers of the jobs that have a token
        self._changed = threading.Condition()  # guards all of these
        self._numbers = itertools.count()
        self._stopped = False
        self._n_generated = 0
        self.worker = Worker(open_host, load, path, options)
        self.facts: Facts = self.worker.call("facts")
        self._thread = threading.Thread(target=self._serve, name="ggml_cffi isolated engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job | EmbedJob, deliver: Deliver) -> Callable[[], None]:
        with self._changed:
            if self._stopped:
                raise StoppingError("the server is stopping")
            if len(self._jobs) >= self._max_jobs:
                raise QueueFullError(f"{len(self._jobs)} requests are waiting for this model already: try again later")
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
        self._thread.join()
        self.worker.close()

    # ------------------------------------------------------------------ the thread

    def _serve(self) -> None:
        crashed = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    return
                commands, self._commands = self._commands, []
                begun = self._jobs.keys() - {number for number, job in commands if job is not None}
            try:
                # A process that ended between two calls may have had jobs, which must fail first.
                if crashed or not (begun or self.worker.alive):
                    self.worker.restart()
                    crashed = False
                events = self.worker.call("exchange", commands, _POLL_SECONDS)
            except Exception as error:
                _logger.error("%s", error)
                crashed = not self.worker.alive
                self._fail(error)
                continue
            with together():
                for number, event in events:
                    self._deliver(number, event)

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
