"""`AsyncStream`: the iterator of one call of `Model.agenerate`, for ``asyncio``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Generic, Self, TypeVar

from ggml_cffi.core.async_items import AsyncItems
from ggml_cffi.models.generation.completion import Answers, Completion
from ggml_cffi.models.generation.logprobs import TokenLogprob
from ggml_cffi.models.generation.requests import FinishReason
from ggml_cffi.models.generation.stream import Stream

T = TypeVar("T")


class AsyncStream(Answers, AsyncIterator[T], Generic[T]):
    """The chunks of one call of :meth:`Model.agenerate`, for ``async for``.

    The first ``await`` begins the call. It ends early by :meth:`cancel`, with the block of ``async with``, when the
    task that awaits the next item is cancelled, and when the stream is deleted. The attributes have the answer up to
    the last item that was awaited. Those of a single answer raise ValueError for a list of prompts.

    Parameters
    ----------
    stream
        The stream of the call.
    """

    def __init__(self, stream: Stream[T]) -> None:
        super().__init__(stream._requests, stream.timings)
        self._stream = stream
        self._items = AsyncItems(_numbered(stream), stream.cancel)
        self._n_tokens: int | None = 0  # of a single answer, up to the last item; None after the end

    @property
    def cancelled(self) -> bool:
        """True after the call was ended early."""
        return self._stream.cancelled

    @property
    def token_ids(self) -> list[int]:
        return super().token_ids[: self._n_tokens]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return super().logprobs[: self._n_tokens]

    @property
    def finish_reason(self) -> FinishReason | None:
        return super().finish_reason if self._n_tokens is None or self.cancelled else None

    async def __anext__(self) -> T:
        try:
            item, self._n_tokens = await anext(self._items)
        except StopAsyncIteration:
            self._n_tokens = None
            raise
        return item

    async def completion(self) -> Completion:
        """Await the rest of the stream, and return the whole answer; see :meth:`Stream.completion`."""
        request = self._request
        async for _ in self:
            pass
        return self._complete(request)

    async def completions(self) -> list[Completion]:
        """Await the rest of the stream, and return the answer to each prompt; see :meth:`Stream.completions`."""
        async for _ in self:
            pass
        return [self._complete(request) for request in self._requests]

    def cancel(self) -> None:
        """End the call now, from any thread; see :meth:`Stream.cancel`. A task that awaits an item gets the end."""
        self._items.cancel()

    async def aclose(self) -> None:
        """End the call; the same as :meth:`cancel`."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


def _numbered(stream: Stream[T]) -> Iterator[tuple[T, int]]:
    """Yield each item with the number of generated tokens up to it, those of all prompts together."""
    for item in stream:
        yield item, sum(len(request.token_ids) for request in stream._requests)
