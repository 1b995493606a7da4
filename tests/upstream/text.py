"""Parser of parameters as upstream prints them: ``type=f32,ne=[10,5,4,3],eps=0.000001,split``."""

from __future__ import annotations

import re
from typing import Any

_PART = re.compile(r"(\w+)(?:=(\[[^\]]*\]|[^,]*))?(?:,|$)")


class Params:
    """Parameters of a case as attributes: integers, floats, tuples of integers, or words."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.named = named
        self._asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name == "named" or name not in self.named:  # "named" is absent while a copy is made
            raise AttributeError(f"the case has no parameter {name}")
        self._asked.add(name)
        return self.named[name]

    def unread(self) -> set[str]:
        """Return the names that nothing has asked for."""
        return set(self.named) - self._asked


def parse(text: str) -> Params:
    """Return the parameters by name. A single word, such as ``split``, is True."""
    found: dict[str, Any] = {}
    for name, value in _PART.findall(text):
        found[name] = _value(value) if value else True
    return Params(found)


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
    for name, value in parse(text).named.items():
        for n in value if isinstance(value, tuple) else (value,):
            if name not in _OTHER and not isinstance(n, bool | float | str):
                total *= max(n, 1)
    return total
