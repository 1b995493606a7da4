"""Text that arrives in pieces, read by parsers that are written as if it were all there.

A parser is a generator of :data:`Steps`. It yields where it needs more text: :class:`Source` has the functions that
wait for it. The result does not depend on the pieces in which the text arrives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from ggml_cffi.models.generation.detokenize import overlap

T = TypeVar("T")
#: A part of a parser: a generator that yields where it needs more text, and returns its result.
Steps = Generator[None, None, T]
#: A function that takes over text, such as ``list.append``.
Take = Callable[[str], object]

_SPACE = re.compile(r"\s*")


def ignore(_: str) -> None:
    """Leave out text."""


class Source:
    """The text of an answer that a parser has not read yet."""

    def __init__(self) -> None:
        self.ended = False
        """True if no more text arrives."""
        self._text, self._at = "", 0  # the characters before ``_at`` are read
        self._read: list[str] | None = None

    def push(self, text: str) -> None:
        """Add text at the end."""
        self._text, self._at = self._text[self._at :] + text, 0

    # ------------------------------------------------------------------ a record, for texts that are no calls after all

    def record(self, read: str = "") -> None:
        """Begin a record of the text read, with the text ``read`` before."""
        self._read = [read]

    def recorded(self) -> str:
        """End the record, and return it."""
        text, self._read = "".join(self._read or ()), None
        return text

    # ------------------------------------------------------------------ reading

    def take(self, n: int) -> str:
        """Read the next ``n`` characters, which must be there."""
        text = self._text[self._at : self._at + n]
        self._at += n
        if self._read is not None:
            self._read.append(text)
        return text

    @property
    def _n_waiting(self) -> int:
        """Number of characters that are there and not read."""
        return len(self._text) - self._at

    def peek(self, n: int = 1) -> Steps[str]:
        """Return the next ``n`` characters without reading them, fewer at the end of the text."""
        while self._n_waiting < n and not self.ended:
            yield
        return self._text[self._at : self._at + n]

    def starts(self, marker: str) -> Steps[bool]:
        """Return whether ``marker`` comes next. Text that rules it out is not waited for."""
        while self._n_waiting < len(marker) and marker.startswith(self._text[self._at :]) and not self.ended:
            yield
        return self._text.startswith(marker, self._at)

    def take_marker(self, *markers: str) -> Steps[str]:
        """Read the first of ``markers`` that comes next, and return it; return no text if none does."""
        for marker in markers:
            if (yield from self.starts(marker)):
                return self.take(len(marker))
        return ""

    def pass_run(self, pattern: re.Pattern[str], take: Take) -> Steps[None]:
        """Give the characters that ``pattern``, a repeated class of characters, matches to ``take`` as they arrive."""
        while True:
            match = pattern.match(self._text, self._at)
            take(self.take(match.end() - self._at if match else 0))
            if self._n_waiting or self.ended:
                return
            yield

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read as many characters as ``pattern``, a repeated class of characters, matches."""
        pieces: list[str] = []
        yield from self.pass_run(pattern, pieces.append)
        return "".join(pieces)

    def skip_space(self) -> Steps[None]:
        """Read white space."""
        yield from self.run(_SPACE)

    def until(self, markers: Sequence[str], take: Take) -> Steps[str]:
        """Give the text before the first of ``markers`` to ``take`` as it arrives; read the marker and return it.

        Without a marker in the rest of the text, all of it goes to ``take``, and no text is returned.
        """
        while True:
            found = [(at, marker) for marker in markers if (at := self._text.find(marker, self._at)) >= 0]
            if found:
                at, marker = min(found)
                take(self.take(at - self._at))
                return self.take(len(marker))
            end = self._text[self._at :]
            n_held = 0 if self.ended else max((overlap(end, marker) for marker in markers), default=0)
            take(self.take(len(end) - n_held))
            if self.ended:
                return ""
            yield
