"""One answer as the clients of the server see it: tokens of an engine in, text out, for ``asyncio``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ggml_cffi.models import TokenLogprob
from ggml_cffi.models.generation import IncrementalDetokenizer
from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.engine import EmbedJob, Ended, Event, Failed, Job, Token, Vectors
from ggml_cffi.server.mailbox import Mailbox


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """The tokens since the last piece, if the job asks for them. Their text may be held back for a later piece."""


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
            end: Event | None = None
            while end is None:
                for event in await mailbox.take():
                    if not isinstance(event, Token):
                        end = event
                        break
                    piece = self._piece(event)
                    if piece.text or piece.logprobs:
                        yield piece
                    if self._detokenizer.stopped:
                        self.reason = "stop"
                        return
            if isinstance(end, Failed):
                raise end.error
            if rest := self._detokenizer.finish():
                yield Piece(rest)
            if isinstance(end, Ended):
                self.reason = "stop" if self._detokenizer.stopped else end.reason
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

    def _piece(self, token: Token) -> Piece:
        """Return the part of the answer that a token completes."""
        self.n_tokens += 1
        return Piece(self._detokenizer.push(token.id), [] if token.logprob is None else [token.logprob])


async def embed(loaded: Loaded, job: EmbedJob) -> npt.NDArray[np.float32]:
    """Return the vectors of a job. Its texts share runs with those of other clients."""
    mailbox = Mailbox()
    cancel = loaded.engine.submit(job, mailbox.put)
    try:
        (event,) = await mailbox.take()
    finally:
        cancel()
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Vectors)
    return event.values
