"""Incremental detokenization: from generated tokens to chunks of text, up to a stop string."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing

from ggml_cffi.models.generation.requests import NumberedTokenStream, Request, TokenStream
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer


def check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop strings as a tuple.

    Raises
    ------
    TypeError, ValueError
        If one is not a string, or is empty.
    """
    if stop is None:
        return ()
    strings = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    for s in strings:
        if not isinstance(s, str):
            raise TypeError(f"stop must be a string or several strings, not {s!r:.80}")
        if not s:
            raise ValueError("a stop string must not be empty: leave it out")
    return strings


class IncrementalDetokenizer:
    """Conversion of tokens to text, one token at a time.

    Bytes are held back until their characters are complete. Text that may be the beginning of a stop string is held
    back until later tokens decide it.

    Parameters
    ----------
    tokenizer
        The tokenizer.
    stop
        Strings before which the text ends.
    special
        True to write control tokens too.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, special: bool = False) -> None:
        self._decoder = tokenizer.incremental_decoder(special=special)
        self._stop = stop
        self._held = ""
        self.stopped = False
        """True after a stop string: the text ends before it."""

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes, perhaps empty."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """Return the text that was held back, at the end of the tokens."""
        text = self._release(self._decoder.finish()) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        """Add ``text`` to the text held back, and return the part that cannot belong to a stop string."""
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        ends = [at for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n = max(overlap(text, s) for s in self._stop)
        self._held = text[len(text) - n :]
        return text[: len(text) - n]


def text_chunks(
    tokens: TokenStream, request: Request, tokenizer: Tokenizer, stop: tuple[str, ...], *, special: bool = False
) -> Generator[str, None, None]:
    """Yield the text of ``tokens`` in chunks, without empty ones; close ``tokens`` at a stop string."""
    text = IncrementalDetokenizer(tokenizer, stop, special=special)
    with closing(tokens):
        for token in tokens:
            chunk = text.push(token)
            if text.stopped:
                request.finish("stop")
            if chunk:
                request.chunks.append(chunk)
                yield chunk
            if text.stopped:
                return
    rest = text.finish()
    if rest:
        request.chunks.append(rest)
        yield rest


def numbered_text_chunks(
    tokens: NumberedTokenStream,
    requests: Sequence[Request],
    tokenizer: Tokenizer,
    stop: tuple[str, ...],
    *,
    special: bool = False,
) -> Generator[tuple[int, str], None, None]:
    """Yield pairs of a request's number and a chunk of its text; cancel a request at a stop string."""
    texts = [IncrementalDetokenizer(tokenizer, stop, special=special) for _ in requests]
    n_tokens = [0] * len(requests)
    with closing(tokens):
        for number, token in tokens:
            text = texts[number]
            if text.stopped:  # tokens that a replica's thread generated meanwhile
                continue
            n_tokens[number] += token is not None
            chunk = text.finish() if token is None else text.push(token)
            if text.stopped:
                requests[number].stop(n_tokens[number])
            if chunk:
                requests[number].chunks.append(chunk)
                yield number, chunk


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a prefix of ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
