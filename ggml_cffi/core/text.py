"""Plain text for terminals and drawings."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence

# Marks that turn the direction of writing: one in a name would turn the rest of the line.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: str) -> str:
    """``text`` with what a terminal would obey and XML forbids replaced by U+FFFD: names come from files."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd" if ch in _TURNS or ch in "\ufffe\uffff" or unicodedata.category(ch) in ("Cc", "Cs") else ch
        for ch in text
    )


def columns(text: str) -> int:
    """Columns that ``text`` takes in a terminal or in a monospaced font."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(ch) in "WF" for ch in text)
    return len(text) + wide - sum(unicodedata.combining(ch) > 0 for ch in text)


def shorten(text: str, most: int) -> str:
    """``text`` in at most ``most`` columns."""
    if columns(text) <= most:
        return text
    while columns(text) >= most:
        text = text[:-1]
    return text + "…"


def count(n: int, what: str) -> str:
    """``n`` of something that forms its plural with an s."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows in columns, the first a heading; ``right`` names the columns that are aligned right."""
    widths = [max(columns(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - columns(cell))
            cells.append(space + cell if i in right else cell + space)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, neighbours as ranges: ``0-3, 7``."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1][1:] = [n]
        else:
            found.append([n])
    return ", ".join("-".join(map(str, pair)) for pair in found)


def size(n: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n / 2**10:.1f} KiB"
