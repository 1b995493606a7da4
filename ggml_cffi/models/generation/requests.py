"""What callers ask of generators: texts to continue, one or many, by one generator or several."""

from __future__ import annotations

from collections.abc import Generator as IteratorGenerator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from threading import Event, Thread
from typing import TypeVar

from ggml_cffi.models.generation.batcher import Generator, Growing, Timings
from ggml_cffi.models.generation.sampling import Sampler

_T = TypeVar("_T")
Stream = IteratorGenerator[_T, None, None]


@dataclass
class Request:
    """A text to continue."""

    ids: list[int]
    """Its tokens, at least one."""
    sampler: Sampler
    most: int
    """Most tokens to add."""
    ends: frozenset[int]
    """Tokens that end it."""
    reuse: bool = True
    """Whether to take what the cache has of its beginning."""

    def end(self) -> None:
        """Have no more tokens made."""
        self.most = 0


def follow(generator: Generator, request: Request, timings: Timings) -> Stream[int]:
    """The tokens that continue one text, as they come. The text ends when the iterator does."""
    if not request.most:
        return
    text = generator.grow(request.ids, request.sampler, reuse=request.reuse, timings=timings)
    try:
        while True:
            token = generator.next(text)
            if token in request.ends:
                return
            yield token
            if is_full(generator, text, request):
                return
    finally:
        generator.finish(text)


def follow_many(
    generator: Generator, waiting: Iterator[tuple[int, Request]], max_sequences: int, timings: Timings
) -> Stream[tuple[int, int | None]]:
    """Continue several texts, ``max_sequences`` of them in each run: a later one begins as soon as one ends.

    Yields pairs of a text's number and its next token, None where it has ended.
    """
    growing: dict[int, tuple[Growing, Request]] = {}
    try:
        while True:
            for number, request in islice(waiting, max_sequences - len(growing)):
                if request.most:
                    text = generator.grow(request.ids, request.sampler, reuse=request.reuse, timings=timings)
                    growing[number] = text, request
                else:
                    yield number, None
            if not growing:
                return
            for text, _ in growing.values():
                text.ask()
            generator.step(next(iter(growing.values()))[0])
            for number, (text, request) in list(growing.items()):
                if not text.ready:
                    continue
                token = text.take()
                ended = token in request.ends
                if not ended:
                    yield number, token
                if ended or is_full(generator, text, request):
                    del growing[number]
                    generator.finish(text)
                    yield number, None
    finally:
        for text, _ in growing.values():
            generator.finish(text)


def follow_everywhere(
    generators: Sequence[Generator], requests: Iterable[Request], max_sequences: int, timings: Timings
) -> Stream[tuple[int, int | None]]:
    """As :func:`follow_many`, by several generators at the same time; each takes the next text when it has room."""
    waiting = iter([*enumerate(requests)])
    each = -(-max_sequences // len(generators))
    if len(generators) == 1:
        yield from follow_many(generators[0], waiting, each, timings)
        return
    found: SimpleQueue[tuple[int, int | None] | BaseException | None] = SimpleQueue()
    stopped = Event()

    def work(generator: Generator) -> None:
        end: BaseException | None = None
        try:
            with closing(follow_many(generator, waiting, each, timings)) as tokens:
                for token in tokens:
                    found.put(token)
                    if stopped.is_set():
                        break
        except BaseException as error:
            end = error
        found.put(end)

    threads = [Thread(target=work, args=(g,), name="ggml_cffi replica") for g in generators]
    try:
        for thread in threads:
            thread.start()
        going = len(threads)
        while going:
            item = found.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                going -= 1
            else:
                yield item
    finally:
        stopped.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def is_full(generator: Generator, text: Growing, request: Request) -> bool:
    """Whether no token may follow."""
    return text.n_taken - text.n_prompt >= request.most or len(text.ids) > generator.n_ctx
