"""Checks that many operations share: numbers that C takes as ``int`` or ``float``, element types, layouts."""

from __future__ import annotations

from operator import index
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.dtypes import INTERNAL, is_quantized
from ggml_cffi.enums import Type

INT_MAX = 2**31 - 1

#: Workgroups that every Vulkan device takes along one axis. ggml ends the process where a device takes fewer than it
#: asks for, and some take no more than this.
GROUPS = 65535

_FLOAT_MAX = 3.4028234663852886e38


def integer(op: str, name: str, value: Any, low: int, high: int = INT_MAX) -> int:
    """``value`` as an integer from ``low`` to ``high``.

    Raises
    ------
    TypeError, ValueError
        If it is none.
    """
    try:
        n = index(value)
    except TypeError:
        n = None
    if n is None or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an integer, not {value!r}")
    if not low <= n <= high:
        raise ValueError(f"{op}: {name} must be {low} to {high}, not {n}")
    return n


def real(op: str, name: str, value: Any, *, infinite: bool = False, lowest: float | None = None) -> float:
    """``value`` as a number that single precision can hold; plus or minus infinity if ``infinite``.

    Raises
    ------
    TypeError, ValueError
        If it is none.
    """
    try:
        x = float(value) if not isinstance(value, bool | str | bytes) else None
    except (TypeError, ValueError):
        x = None
    except OverflowError:
        x = float("inf") if value > 0 else -float("inf")
    if x is None:
        raise TypeError(f"{op}: {name} must be a number, not {value!r}")
    if x != x or (abs(x) > _FLOAT_MAX and not infinite):
        raise ValueError(f"{op}: {name} must be a finite number of single precision, not {value!r}")
    if lowest is not None and x < lowest:
        raise ValueError(f"{op}: {name} must be at least {lowest:g}, not {value!r}")
    return x


def encodes(dtype: Type) -> bool:
    """Whether the CPU's kernels can write ``dtype``, a quantized type, from floats."""
    return is_quantized(dtype) and dtype not in INTERNAL and bool(c.ggml_get_type_traits_cpu(dtype).from_float)
