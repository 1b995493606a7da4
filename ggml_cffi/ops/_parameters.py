"""Checks of parameters: numbers that C takes as ``int`` or ``float``, and members of enumerations."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

from ggml_cffi.core.numbers import as_integer, as_real

INT_MAX = 2**31 - 1

#: Number of workgroups along one axis that every Vulkan device accepts. ggml ends the process if it needs more than the
#: device accepts.
MAX_GROUPS = 65535

_FLOAT_MAX = 3.4028234663852886e38
_E = TypeVar("_E", bound=IntEnum)


def check_integer(op: str, name: str, value: Any, low: int, high: int = INT_MAX) -> int:
    """Return ``value`` as an integer from ``low`` to ``high``.

    Raises
    ------
    TypeError, ValueError
        If the value is of another type, or out of range.
    """
    return as_integer(f"{op}: {name}", value, low, high)


def check_integers(op: str, name: str, value: Any, n: int, low: int = 0, high: int = INT_MAX) -> tuple[int, ...]:
    """Return one integer per axis, in ggml's order, from one for all axes or ``n`` in numpy's order."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return (check_integer(op, name, value, low, high),) * n
    if len(value) != n:
        raise ValueError(f"{op}: {name} must be one integer or {n} integers, not {value!r}")
    return tuple(check_integer(op, name, v, low, high) for v in reversed(value))


def check_real(op: str, name: str, value: Any, *, infinite: bool = False, lowest: float | None = None) -> float:
    """Return ``value`` as a number that single precision can hold; infinities are allowed if ``infinite``.

    Raises
    ------
    TypeError, ValueError
        If the value is of another type, or out of range.
    """
    x = as_real(f"{op}: {name}", value)
    if x != x or (abs(x) > _FLOAT_MAX and not infinite):
        raise ValueError(f"{op}: {name} must be a finite number of single precision, not {value!r}")
    if lowest is not None and x < lowest:
        raise ValueError(f"{op}: {name} must be at least {lowest:g}, not {value!r}")
    return x


def check_member(op: str, kind: type[_E], value: Any) -> _E:
    """Return ``value`` as a member of an enumeration."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: a member of {kind.__name__} is needed, not {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{op}: {kind.__name__} has no member {value}") from None
