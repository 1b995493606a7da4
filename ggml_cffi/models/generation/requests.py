"""Requests: one or several prompts to continue, on one batcher or on those of several replicas."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Literal

from ggml_cffi.models.generation.batcher import Batcher
from ggml_cffi.models.generation.logprobs import TokenLogprob
from ggml_cffi.models.generation.sampling import Sampler
from ggml_cffi.models.generation.sequence import TokenSequence
from ggml_cffi.models.generation.timings import Timings

#: Tokens of one request.
TokenStream = Generator[int, None, None]
#: Tokens of several requests: pairs of a request's number and a token, or None at the end of that request.
NumberedTokenStream = Generator[tuple[int, int | None], None, None]
#: Reasons for the end of an answer.
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass
class Request:
    """A prompt to continue, and its answer so far."""

    ids: list[int]
    """Token ids of the prompt, at least one."""
    sampler: Sampler
    max_tokens: int
    """Largest number of tokens to generate."""
    end_tokens: frozenset[int]
    """Tokens that end the answer."""
    reuse: bool = True
    """True to take over slots of a kept sequence with the same beginning."""
    cancelled: bool = field(default=False, init=False)
    """True after :meth:`cancel`."""
    token_ids: list[int] = field(default_factory=list, init=False)
    """The generated tokens that the caller has, without the end token."""
    chunks: list[str] = field(default_factory=list, init=False)
    """The answer's text, in the chunks in which the caller got it; empty if the caller wants tokens only."""
    finish_reason: FinishReason | None = field(default=None, init=False)
    """The reason for the end; None before it, and after an error."""
    stopped_at: int | None = field(default=None, init=False)
    """Number of tokens up to the end of a stop string, after :meth:`stop`. A replica's thread may generate more."""
    _begun: tuple[Batcher, TokenSequence] | None = field(default=None, init=False, repr=False)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """The tokens that were yielded with their log probabilities, if the sampler's parameters ask for them."""
        return self.sampler.logprobs[: len(self.token_ids)]  # an end token has one too

    def cancel(self) -> None:
        """End the answer now, from any thread, also while the prompt or the next token is computed."""
        self.cancelled = True
        self.finish("cancelled")
        if self._begun is not None:
            batcher, sequence = self._begun
            batcher.cancel(sequence)

    def stop(self, n_tokens: int) -> None:
        """End the answer at a stop string, which the text of its first ``n_tokens`` tokens has."""
        self.stopped_at = n_tokens
        self.cancel()

    def begin(self, batcher: Batcher, timings: Timings) -> TokenSequence:
        """Return a new sequence of ``batcher`` for this request."""
        sequence = batcher.add(self.ids, self.sampler, reuse=self.reuse, timings=timings)
        self._begun = batcher, sequence
        if self.cancelled:  # by a thread that found ``_begun`` empty
            sequence.cancelled = True
        return sequence

    def finish(self, reason: FinishReason) -> None:
        """Note the reason for the end, unless there is one already."""
        if self.finish_reason is None:
            self.finish_reason = reason

    def accept(self, token: int, timings: Timings) -> bool:
        """Add a token to the answer. Return False if it is an end token, which ends the answer instead."""
        if token in self.end_tokens:
            self.finish("stop")
            return False
        self.token_ids.append(token)
        timings.add_token()
        return True

    def is_complete(self, n_ctx: int) -> bool:
        """Return whether no token may follow, and note the reason."""
        if self.sampler.complete:
            self.finish("stop")
        if len(self.token_ids) >= self.max_tokens or len(self.ids) + len(self.token_ids) > n_ctx:
            self.finish("length")
        return self.finish_reason is not None


def generate_one(batcher: Batcher, request: Request, timings: Timings) -> TokenStream:
    """Yield the tokens that continue a prompt. The sequence ends when the iterator does."""
    if request.is_complete(batcher.n_ctx):
        return
    sequence = request.begin(batcher, timings)
    try:
        while True:
            token = batcher.next(sequence)
            if token is None or not request.accept(token, timings):
                return
            yield token
            if request.is_complete(batcher.n_ctx):
                return
    finally:
        batcher.finish(sequence)


def generate_many(
    batcher: Batcher,
    waiting: Iterator[tuple[int, Request]],
    max_sequences: int,
    timings: Timings,
    meanwhile: Callable[[], object] | None = None,
) -> NumberedTokenStream:
    """Continue several prompts, at most ``max_sequences`` of them in each run. The next begins as soon as one ends.

    Parameters
    ----------
    batcher
        The batcher.
    waiting
        Numbered requests; each is taken when there is room for it.
    max_sequences
        Largest number of sequences in generation.
    timings
        Counter of all requests.
    meanwhile
        Called in each step, while devices compute if they leave the host time then. The tokens of the step before have
        been yielded. See :meth:`Batcher.step <ggml_cffi.models.generation.batcher.Batcher.step>`.

    Yields
    ------
    tuple
        A request's number and its next token; None instead of a token where the request ends.
    """
    active: dict[int, tuple[TokenSequence, Request]] = {}
    try:
        while True:
            for number, request in islice(waiting, max_sequences - len(active)):
                if request.is_complete(batcher.n_ctx):
                    yield number, None
                else:
                    active[number] = request.begin(batcher, timings), request
            if not active:
                return
            for sequence, _ in active.values():
                sequence.ask()
            batcher.step(next(iter(active.values()))[0], meanwhile)
            for number, (sequence, request) in list(active.items()):
                ended = request.cancelled
                if sequence.ready and not ended:
                    token = sequence.take()
                    ended = not request.accept(token, timings)
                    if not ended:
                        yield number, token
                        ended = request.is_complete(batcher.n_ctx)
                if ended:
                    del active[number]
                    batcher.finish(sequence)
                    yield number, None
    finally:
        for sequence, _ in active.values():
            batcher.finish(sequence)


def generate_on_replicas(
    batchers: Sequence[Batcher], requests: Sequence[Request], max_sequences: int, timings: Timings
) -> NumberedTokenStream:
    """Continue several prompts on all replicas of a model: as :func:`generate_many`, with a thread for each replica.

    A replica takes the next request when it has room for it.
    """
    waiting = iter([*enumerate(requests)])
    each = -(-max_sequences // len(batchers))
    if len(batchers) == 1:
        yield from generate_many(batchers[0], waiting, each, timings)
        return
    queue: SimpleQueue[tuple[int, int | None] | BaseException | None] = SimpleQueue()

    def work(batcher: Batcher) -> None:
        end: BaseException | None = None
        try:
            with closing(generate_many(batcher, waiting, each, timings)) as tokens:
                for token in tokens:
                    queue.put(token)
        except BaseException as error:
            end = error
        queue.put(end)

    threads = [Thread(target=work, args=(batcher,), name="ggml_cffi replica") for batcher in batchers]
    try:
        for thread in threads:
            thread.start()
        n_running = len(threads)
        while n_running:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                n_running -= 1
            else:
                yield item
    finally:
        cancelled = all(request.cancelled for request in requests)
        for request in requests:
            request.cancel()
        for thread in threads:
            if thread.ident is not None and not cancelled:  # a caller that cancels does not wait
                thread.join()


def choose_batcher(batchers: Sequence[Batcher], ids: list[int] | None = None) -> Batcher:
    """Return the batcher with the least work; among equals, the one whose cache has the longest prefix of ``ids``."""
    if len(batchers) == 1:
        return batchers[0]
    least = min(batcher.workload for batcher in batchers)
    idle = [batcher for batcher in batchers if batcher.workload <= least] or list(batchers)
    return idle[0] if ids is None else max(idle, key=lambda batcher: batcher.common_prefix(ids))
