"""Parser of parameters as upstream prints them: ``type=f32,ne=[10,5,4,3],eps=0.000001,split``."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

_PART = re.compile(r"(\w+)(?:=(\[[^\]]*\]|[^,]*))?(?:,|$)")


def parse(text: str) -> SimpleNamespace:
    """Return the parameters by name: integers, floats, tuples of integers, or words. A single word, such as ``split``,
    is True.
    """
    found: dict[str, Any] = {}
    for name, value in _PART.findall(text):
        found[name] = _value(value) if value else True
    return SimpleNamespace(**found)


def _value(text: str) -> Any:
    if text.startswith("["):
        return tuple(int(n) for n in text[1:-1].split(","))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


#: Integer parameters that are not sizes.
_OTHER = {"dim", "max_period", "mode", "n_ctx", "v"}


def size(text: str) -> int:
    """Return a number that grows with the work of a case, to rank the cases of one operation."""
    total = 1
    for name, value in vars(parse(text)).items():
        for n in value if isinstance(value, tuple) else (value,):
            if name not in _OTHER and not isinstance(n, bool | float | str):
                total *= max(n, 1)
    return total
