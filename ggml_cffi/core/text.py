"""Plain text for terminals and drawings."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

# Marks that reverse the direction of writing: one in a name would reverse the rest of the line.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: str) -> str:
    """Replace characters that control a terminal, or that XML forbids, by U+FFFD: names in files may contain them."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd" if ch in _TURNS or ch in "\ufffe\uffff" or unicodedata.category(ch) in ("Cc", "Cs") else ch
        for ch in text
    )


def columns(text: str) -> int:
    """Return the columns that ``text`` takes in a terminal or in a monospaced font."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(ch) in "WF" for ch in text)
    return len(text) + wide - sum(unicodedata.combining(ch) > 0 for ch in text)


def shorten(text: str, width: int) -> str:
    """Return ``text``, cut to at most ``width`` columns."""
    if columns(text) <= width:
        return text
    while columns(text) >= width:
        text = text[:-1]
    return text + "…"


def count(n: int, noun: str) -> str:
    """Return ``n`` with a noun that forms its plural with an s."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the part of an error's text with the known names that are most like ``name``; empty if none is."""
    from difflib import get_close_matches  # only errors need it

    by_key = {each.lower(): each for each in known}
    found = [by_key[key] for key in get_close_matches(name.lower(), by_key)]
    return f"; nearest: {', '.join(found)}" if found else ""


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return rows as aligned columns. The first row is the heading; ``right`` has the right-aligned columns."""
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
    """Return rising numbers as text, with neighbours as ranges: ``0-3, 7``."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1][1:] = [n]
        else:
            found.append([n])
    return ", ".join("-".join(map(str, pair)) for pair in found)


def size(n: int) -> str:
    """Return a number of bytes in KiB, MiB or GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n / 2**10:.1f} KiB"


_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([KMGT])(?:i?B)?)?", re.IGNORECASE)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(given: int | str) -> int:
    """Return the bytes of a size: a number of bytes, or a text such as ``"24G"`` (24 GiB), ``"512M"`` or ``"1.5GiB"``.

    Raises
    ------
    ValueError
        If it is none of these, or negative.
    """
    found = _SIZE.fullmatch(str(given).strip())
    if found is None:
        raise ValueError(f"{given!r} is no size: use a number of bytes, or a text such as 512M or 24G (GiB)")
    number, unit = found.groups()
    return round(float(number) * _UNITS[unit.upper()]) if unit else round(float(number))


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """Return ``value`` as JSON, which has no NaN and no infinity: they become null."""
    encode = _json_encoder(indent, ascii_only)
    try:
        return encode(value)
    except (TypeError, ValueError):  # a number that is not finite, or a mapping that is no dict
        return encode(_finite(value))


@cache
def _json_encoder(indent: int | None, ascii_only: bool) -> Callable[[Any], str]:
    import json  # most programs need none, and the package imports this module

    return json.JSONEncoder(indent=indent, ensure_ascii=ascii_only, allow_nan=False).encode


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
