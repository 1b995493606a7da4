"""Checks of numbers that a caller gives."""

from __future__ import annotations

from operator import index
from typing import Any


def as_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` as an integer of at least ``low``, and at most ``high``.

    Parameters
    ----------
    name
        Name of the parameter, for the message.

    Raises
    ------
    TypeError, ValueError
        If the value is of another type, a truth value included, or out of range.
    """
    try:
        n = index(value)
    except TypeError:
        n = None
    if n is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r:.80}")
    if n < low or (high is not None and n > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} must be {allowed}, not {n}")
    return n


def as_real(name: str, value: Any) -> float:
    """Return ``value`` as a Python float, perhaps infinite or not a number.

    Raises
    ------
    TypeError
        If the value is no real number: a truth value, a text, or an array of several elements.
    """
    try:
        if not isinstance(value, bool | str | bytes):
            return float(value)
    except (TypeError, ValueError):
        pass
    except OverflowError:  # an integer
        return float("inf") if value > 0 else -float("inf")
    raise TypeError(f"{name} must be a number, not {value!r:.80}")
