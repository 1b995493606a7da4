"""One answer as the clients of the server see it: tokens of an engine in, text out, for ``asyncio``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ggml_cffi.models import TokenLogprob
from ggml_cffi.models.generation import IncrementalDetokenizer
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.engine import EmbedJob, Ended, Event, Failed, Job, Token, Vectors


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """The tokens since the last piece, if the job asks for them. Their text may be held back for a later piece."""


class Mailbox:
    """Events that other threads send to one task."""

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def put(self, event: Event) -> None:
        """Append an event, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: no task waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Event:
        """Return the next event, and raise the exception of one that failed."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise event.error
        return event


class Generation:
    """One answer in generation. Iterate :meth:`pieces` once; the end of the iteration frees the slot.

    Parameters
    ----------
    loaded
        The model.
    job
        The prompt and its parameters.
    stop
        Strings before which the answer ends.
    keep_special
        True to keep the text of control tokens.
    """

    def __init__(self, loaded: Loaded, job: Job, stop: tuple[str, ...] = (), *, keep_special: bool = False) -> None:
        self._loaded, self.job = loaded, job
        self._detokenizer = IncrementalDetokenizer(loaded.text.tokenizer, stop, special=keep_special)
        self.n_tokens = 0
        """Number of generated tokens."""
        self.reason: str | None = None
        """``"stop"`` or ``"length"`` at the end."""

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the parts of the answer.

        Raises
        ------
        QueueFullError, StoppingError, ValueError, GgmlError
            See :meth:`Engine.submit <ggml_cffi.server.engine.Engine.submit>`.
        """
        mailbox = Mailbox()
        cancel = await self._submit(mailbox)
        try:
            async for piece in self._read(mailbox):
                yield piece
        finally:
            cancel()

    async def _submit(self, mailbox: Mailbox) -> Callable[[], None]:
        """Begin the job in a thread, since a grammar takes a while to compile, and return its cancel function."""
        submitting = asyncio.ensure_future(asyncio.to_thread(self._loaded.engine.submit, self.job, mailbox.put))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the client has left, and the thread begins the job nevertheless
            submitting.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result()())
            raise

    async def _read(self, mailbox: Mailbox) -> AsyncGenerator[Piece, None]:
        text = self._detokenizer
        while isinstance(event := await mailbox.get(), Token):
            self.n_tokens += 1
            piece = Piece(text.push(event.id), [] if event.logprob is None else [event.logprob])
            if piece.text or piece.logprobs:
                yield piece
            if text.stopped:
                self.reason = "stop"
                return
        if rest := text.finish():
            yield Piece(rest)
        if isinstance(event, Ended):
            self.reason = "stop" if text.stopped else event.reason


async def embed(loaded: Loaded, job: EmbedJob) -> npt.NDArray[np.float32]:
    """Return the vectors of a job. Its texts share runs with those of other clients."""
    mailbox = Mailbox()
    cancel = loaded.engine.submit(job, mailbox.put)
    try:
        event = await mailbox.get()
    finally:
        cancel()
    assert isinstance(event, Vectors)
    return event.values
