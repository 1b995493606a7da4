"""From tokens to pieces of text, up to a stop string."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from ggml_cffi.models.tokenizers.tokenizer import Tokenizer


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """``stop`` as a tuple.

    Raises
    ------
    TypeError, ValueError
        If it is no string, nor several, or one is empty.
    """
    found = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for s in found:
        if not isinstance(s, str):
            raise TypeError(f"stop is a string, or several, not {s!r:.80}")
        if not s:
            raise ValueError("a stop string cannot be empty")
    return found


class Pieces:
    """Text as it comes, token by token. Bytes wait until their characters are whole, and text that may be the
    beginning of a stop string until that is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._stream = tokenizer.stream()
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string came: the text ends before it."""

    def push(self, token: int) -> str:
        """The text that ``token`` decides, perhaps empty."""
        return self._decided(self._stream.push(token))

    def finish(self) -> str:
        """What was held back, at the end."""
        text = self._decided(self._stream.finish()) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    def _decided(self, piece: str) -> str:
        if not self._stop or self.stopped:
            return "" if self.stopped else piece
        text = self._held + piece
        ends = [at for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - n :]
        return text[: len(text) - n]


def pieces(tokens: Generator[int, None, None], tokenizer: Tokenizer, stop: tuple[str, ...]) -> Iterator[str]:
    """The text of ``tokens``, piece by piece, without empty ones."""
    text = Pieces(tokenizer, stop)
    with closing(tokens):
        for token in tokens:
            piece = text.push(token)
            if piece:
                yield piece
            if text.stopped:
                return
    rest = text.finish()
    if rest:
        yield rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
