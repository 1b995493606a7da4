"""`Stream`: the iterator that the functions for generation return. Any thread may end it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from threading import Lock
from types import TracebackType
from typing import Generic, Self, TypeVar

from ggml_cffi.models.generation.completion import Answers, Completion
from ggml_cffi.models.generation.requests import Request
from ggml_cffi.models.generation.timings import Timings

T = TypeVar("T")


class Stream(Answers, Iterator[T], Generic[T]):
    """The chunks or tokens of one call, in the order in which they are generated.

    One thread iterates, and any other may call :meth:`cancel`. As a context manager, a stream ends with its block; it
    also ends when it is deleted. :meth:`completion` reads it to its end, :meth:`completions` for a list of prompts.
    The attributes have the answer so far. Those of a single answer raise ValueError for a list of prompts.

    Parameters
    ----------
    items
        The generator of the items.
    requests
        The requests that the generator serves.
    timings
        Their counter.
    """

    def __init__(self, items: Generator[T, None, None], requests: Sequence[Request], timings: Timings) -> None:
        super().__init__(requests, timings)
        self.cancelled = False
        """True after :meth:`cancel`."""
        self._items = items
        self._lock = Lock()  # held while a thread waits for the next item

    def __next__(self) -> T:
        with self._lock:
            if not self.cancelled:
                item = next(self._items)
        if self.cancelled:
            self._close_if_idle()
            raise StopIteration
        return item

    # ------------------------------------------------------------------ the answer

    def completion(self) -> Completion:
        """Read the rest of the stream, and return the whole answer, the items read before included.

        Raises
        ------
        ValueError
            If the call has several prompts.
        ClosedError
            If the model is closed before the end.
        """
        request = self._request
        for _ in self:
            pass
        return self._complete(request)

    def completions(self) -> list[Completion]:
        """Read the rest of the stream, and return the whole answer to each prompt, in the order of the prompts.

        Raises
        ------
        ClosedError
            If the model is closed before the end.
        """
        for _ in self:
            pass
        return [self._complete(request) for request in self._requests]

    # ------------------------------------------------------------------ the end

    def cancel(self) -> None:
        """End the call now. The iterator yields nothing more, and the KV slots of its sequences may be used again.

        Any thread may call this, also during the computation of the prompt: the thread that iterates then leaves its
        loop. A run of the CPU that computes for this call only stops after its current operation; other runs are
        finished first. The method does not wait for that.
        """
        self.cancelled = True
        for request in self._requests:
            request.cancel()
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        """Close the generator, unless a thread waits for its next item: that thread closes it afterwards."""
        if self._lock.acquire(blocking=False):
            try:
                self._items.close()
            finally:
                self._lock.release()

    def close(self) -> None:
        """End the call; the same as :meth:`cancel`."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
