"""Server-sent events, and the end of work for clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ggml_cffi.core.text import to_json
from ggml_cffi.server.errors import ApiError, as_api_error
from ggml_cffi.server.mailbox import Lane

T = TypeVar("T")
#: One event: its data, perhaps with a name under ``"type"``.
Data = Mapping[str, Any]

_logger = logging.getLogger("ggml_cffi.server")


class ClientLeftError(Exception):
    """The client closed its connection before it had an answer."""


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, and cancel it when the client closes its connection.

    Raises
    ------
    ClientLeftError
        If it did.
    ApiError
        In place of an exception of ``work``.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        try:
            return working.result()
        except Exception as error:
            raise log_error(error) from None
    finally:
        await cancelled(working, leaving)


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A response of server-sent events. It closes their generator when it ends, also when the client leaves.

    The generator runs at its own speed: events wait in memory for a client that reads slowly. Otherwise that client
    would keep the model in use, and no other model could take its memory.

    Parameters
    ----------
    first, events
        The first event, and the generator of the others.
    named
        True to write the ``type`` of an event as its name.
    done
        Data of a last event; None for no such event.
    """

    def __init__(
        self, first: Data, events: AsyncGenerator[Data, None], *, named: bool = False, done: str | None = "[DONE]"
    ) -> None:
        self._events, self._named, self._done = events, named, done
        self._lines = Lane[str]()  # an empty one after the last event
        self._put(first)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._take(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        running = asyncio.create_task(self._run())
        try:
            await super().__call__(scope, receive, send)
        finally:
            await cancelled(running)
            await self._events.aclose()

    async def _run(self) -> None:
        """Write the events. An error is an event too, since the status has been sent already."""
        try:
            async for event in self._events:
                self._put(event)
        except Exception as error:
            self._put({"type": "error", **log_error(error).body()})
        if self._done is not None:
            self._lines.put(f"data: {self._done}\n\n")
        self._lines.put("")

    def _put(self, event: Data) -> None:
        """Write an event as text at once, since its generator may change its parts later."""
        name = f"event: {event['type']}\n" if self._named else ""
        self._lines.put(f"{name}data: {to_json(event)}\n\n")

    async def _take(self) -> AsyncGenerator[str, None]:
        last = None
        while last != "":
            *_, last = lines = await self._lines.take()
            if text := "".join(lines):
                yield text


async def stream(
    request: Request, events: AsyncGenerator[Data, None], *, named: bool = False, done: str | None = "[DONE]"
) -> Response:
    """Return a response that streams ``events``. It begins with the first one: errors before it have a status."""
    try:
        first = await unless_client_leaves(request, _next(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, named=named, done=done)


async def _next(events: AsyncGenerator[T, None]) -> T:
    return await anext(events)


def log_error(error: Exception) -> ApiError:
    """Return the error for the client, and log those that are the server's."""
    found = as_api_error(error)
    if found.status == 500 and found is not error:  # else it was logged when it was made
        _logger.error("a request failed", exc_info=error)
    return found


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield the items of several generators as they come, each with its generator's number."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as items:
            async for item in items:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=len(sources))

    async def pump(number: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async for item in source:
                await queue.put((number, item))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    try:
        running = len(tasks)
        while running:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                running -= 1
            else:
                yield found
    finally:
        await cancelled(*tasks)
        for source in sources:
            await source.aclose()
