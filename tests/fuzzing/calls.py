"""Random calls of operations: calls made up from signatures, and valid cases with a few changes."""

from __future__ import annotations

import enum
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi import Tensor, Type, enums
from ggml_cffi.core import dtypes
from tests import cases

LAYOUTS = ("contiguous", "gaps", "permuted", "transposed", "offset", "overlapping")
#: States of an operand besides an input without memory. Those of the first group have values; the second are refused.
USABLE = ("fresh", "allocated", "computed", "view", "foreign", "older", "held", "done", "same")
UNUSABLE = ("closed", "released", "numpy")
CONTEXTS = ("ours", "other", "closed", "wrong")


@dataclass(frozen=True)
class T:
    """Tensor operand: a :class:`cases.In` with more layouts and the state of its memory."""

    shape: tuple[int, ...]
    dtype: Type = Type.F32
    layout: str | tuple[int, ...] = "contiguous"
    state: str = "fresh"
    values: Any = field(default=None, compare=False)

    @property
    def spec(self) -> cases.In:
        layout = "contiguous" if self.layout in LAYOUTS[4:] else self.layout
        return cases.In(self.shape, self.dtype, layout, self.values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        shown = [str(self.shape)]
        if self.dtype is not Type.F32:
            shown.append(self.dtype.name)
        for name, usual in (("layout", "contiguous"), ("state", "fresh"), ("values", None)):
            value = getattr(self, name)
            if value is not usual and not (isinstance(value, str) and value == usual):
                shown.append(f"{name}={show(value)}")
        return f"T({', '.join(shown)})"


@dataclass(frozen=True)
class Call:
    """Call to try: arguments by name, :class:`T` for tensors, and the context of the result."""

    op: str
    arguments: Mapping[str, Any]
    ctx: str = ""

    def operands(self) -> dict[str, T]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, T)}

    def __str__(self) -> str:
        shown = [f"{name}={show(value)}" for name, value in self.arguments.items()]
        return f"{self.op}({', '.join([*shown, *([f'ctx={self.ctx!r}'] if self.ctx else [])])})"


def show(value: Any) -> str:
    """Return Python source of ``value`` that :func:`parse` reads."""
    if isinstance(value, Type):
        return value.name
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, np.ndarray):
        return f"np.array({value.tolist()!r}, np.{value.dtype})"
    if isinstance(value, np.generic):
        return f"np.{value.dtype}({value.item()!r})"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(show, value)) + ("," if isinstance(value, tuple) and len(value) == 1 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if inspect.isfunction(value):
        return f"function({value.__module__!r}, {value.__name__!r})"
    return str(value) if isinstance(value, T) else repr(value)


def parse(text: str) -> Call:
    """Return the call that was printed as ``text``."""
    op, _, arguments = text.strip().partition("(")
    known: dict[str, Any] = {t.name: t for t in Type}
    known |= {
        name: value for module in (enums, ggml) for name, value in vars(module).items() if isinstance(value, type)
    }
    known |= {"T": T, "np": np, "nan": math.nan, "inf": math.inf}
    known["function"] = lambda module, name: getattr(importlib.import_module(module), name)
    given: dict[str, Any] = eval(f"dict({arguments}", known)
    ctx = given.pop("ctx", "")
    return Call(op, given, ctx)


# ---------------------------------------------------------------------- functions, for operations that take one


def first(*arrays: Any) -> Any:
    """Return the first operand; a function for custom operations."""
    return arrays[0] if arrays else None


def fails(*arrays: Any) -> Any:
    """Raise an exception; a function for custom operations."""
    raise RuntimeError(FAILED)


FAILED = "a custom operation failed"


# ---------------------------------------------------------------------- strategies

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 33, 64, 96, 128, 255, 256, 257, 512)
FEW = (1, 2, 3, 4, 5, 8, 32, 33, 0)
HUGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**59)
INTS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 32, 33, 64, -1, -2)
FLOATS = (0.0, 1.0, 0.5, 2.0, 1e-5, 1e-12, 3.25, 100.0, -1.0, -0.5)
WILD: tuple[Any, ...] = (
    None,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**400,
    1e39,
    -1e300,
    1e300,
    0.5,
    True,
    "x",
    "",
    b"x",
    (),
    (1,),
    (1, 2**63),
    (1, -1, None),
    [0, 1, 2, 3, 4],
    1j,
    np.float32(0.5),
    np.int64(2),
    np.array([1, 2]),
    Type.F32,
    T((3,)),
    first,
)

_rank = st.sampled_from((2, 1, 3, 4, 0, 2, 3, 4, 2, 1))
_size = st.sampled_from(FEW)
_sizes = st.sampled_from((*SIZES, *SIZES, *HUGE))
_wild = st.sampled_from(WILD)
_dtype = st.sampled_from((*(Type.F32,) * 4, Type.F16, Type.I32, *[t for t in Type if t not in dtypes.INTERNAL]))
_layout = st.sampled_from(("contiguous", *LAYOUTS))
_state = st.sampled_from((*("fresh",) * 3, *USABLE, *UNUSABLE))
_percent = st.integers(0, 99)


def operations() -> list[str]:
    """Return the names of all operations."""
    return [name for name in ggml.ops.__all__ if inspect.isfunction(getattr(ggml, name))]


@cache
def parameters(op: str) -> dict[str, tuple[Any, bool]]:
    """Return the parameters of an operation, each with its annotation and whether it is optional."""
    function = getattr(ggml, op)
    hints = typing.get_type_hints(function)
    return {
        name: (hints.get(name, Any), p.default is not p.empty or p.kind is p.VAR_POSITIONAL)
        for name, p in inspect.signature(function).parameters.items()
        if name != "ctx"
    }


@cache
def cases_of(op: str) -> list[cases.Case]:
    return [case for case in cases.CASES if case.op == op]


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(option for arg in typing.get_args(hint) for option in options_of(arg))
    return (hint,)


def takes_tensor(hint: Any) -> bool:
    return Tensor in options_of(hint)


@st.composite
def scratch(draw: Any, op: str) -> Call:
    """Draw a call from the signature of an operation."""
    rank = draw(_rank)
    theme = tuple(draw(st.lists(_size, min_size=rank, max_size=rank)))
    dtype = draw(_dtype)
    given: dict[str, Any] = {}
    wild = draw(_percent) < 15
    for name, (hint, optional) in parameters(op).items():
        if optional and draw(st.booleans()):
            continue
        if wild and draw(_percent) < 30:
            given[name] = draw(_wild)
        elif takes_tensor(hint):
            given[name] = draw(operand(theme, dtype))
        else:
            given[name] = draw(value(hint, theme, dtype))
    return Call(op, given, draw(_context))


_context = st.sampled_from((*("",) * 12, *CONTEXTS))


@st.composite
def operand(draw: Any, theme: tuple[int, ...], dtype: Type) -> T:
    """Draw an operand that is often related to the others: with their shape, or with one size changed."""
    kind = draw(_percent)
    shape = list(theme)
    if kind >= 45 and shape:
        i = draw(st.integers(0, len(shape) - 1))
        if kind < 60:
            shape[i] = draw(_sizes)
        elif kind < 70:
            del shape[: i + 1]
        elif kind < 80:
            shape = shape[-1:] if i else [shape[0], *shape[:3]]
        elif kind < 90:
            shape[i], shape[0] = shape[0], shape[i]
    if kind >= 90:
        shape = draw(st.lists(_sizes, max_size=4 if kind < 99 else 5))
    if draw(_percent) < 25:
        dtype = draw(_dtype)
    elif draw(_percent) < 15:
        dtype = Type.I32
    layout = draw(_layout) if draw(_percent) < 35 else "contiguous"
    state = draw(_state) if draw(_percent) < 35 else "fresh"
    return feasible(T(whole(shape, dtype), dtype, layout, state))


def feasible(t: T) -> T:
    """Return ``t``, contiguous if its layout is impossible."""
    if isinstance(t.layout, tuple):
        fits = len(t.layout) == len(t.shape) and not dtypes.is_quantized(t.dtype)
        return t if fits else replace(t, layout="contiguous")
    ndim = {"gaps": 1, "permuted": 3, "transposed": 2, "overlapping": 2}.get(t.layout, 0)
    turned = t.layout == "transposed" and dtypes.is_quantized(t.dtype)
    return replace(t, layout="contiguous") if len(t.shape) < ndim or turned else t


def whole(shape: Sequence[int], dtype: Type) -> tuple[int, ...]:
    """Round the last size of ``shape`` up to whole blocks, without which no operation gets the operand."""
    block = dtypes.block_size(dtype)
    if not shape:
        return () if block == 1 else (block,)
    return (*shape[:-1], -(-shape[-1] // block) * block)


def value(hint: Any, theme: tuple[int, ...] = (2, 3), dtype: Type = Type.F32) -> st.SearchStrategy[Any]:
    """Draw a value that usually fits an annotation."""
    options = [o for o in options_of(hint) if o is not type(None)]
    kinds = [_value(o, theme) for o in options] or [_wild]
    if len(options) < len(options_of(hint)):
        kinds.append(st.none())
    return st.one_of(kinds)


def _value(hint: Any, theme: tuple[int, ...]) -> st.SearchStrategy[Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Tensor:
        return operand(theme, Type.F32)
    if hint is bool:
        return st.booleans()
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from([*hint, *hint, 0, 1, 99, -1])
    if hint is int:
        return st.sampled_from((*INTS, *[n for n in theme if n]))
    if hint is float:
        return st.sampled_from(FLOATS)
    if hint is str:
        return st.sampled_from(("f32", "f16", "q8_0", "i32", "nearest", "bilinear", "bicubic", "nope"))
    if origin is tuple and inner:
        parts = inner[:1] * 2 if inner[-1] is Ellipsis else inner
        return st.tuples(*[value(part, theme) for part in parts])
    if isinstance(origin, type) and issubclass(origin, Sequence) and inner and not takes_tensor(inner[0]):
        exact = st.sampled_from([theme, theme[::-1], (prod(theme),), (-1,)])
        return st.one_of(exact, st.lists(value(inner[0], theme), max_size=5).map(tuple))
    if isinstance(origin, type) and issubclass(origin, Sequence) and inner:
        return st.lists(operand(theme, Type.F32), max_size=3).map(tuple)
    if origin is typing.Literal:
        return st.sampled_from([*inner, "nope"])
    if origin is Callable or hint is Callable:
        return st.sampled_from([first, first, fails])
    return _wild


@st.composite
def mutated(draw: Any, op: str) -> Call:
    """Draw a valid case of the operation with up to three changes."""
    case = draw(st.sampled_from(cases_of(op)))
    call = Call(op, {name: lift(value) for name, value in case.arguments.items()})
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 2, 3)))):
        call = draw(_change(call))
    return call


def lift(given: Any) -> Any:
    """Convert an argument of a case to an argument of a call."""
    if isinstance(given, cases.In):
        return T(given.shape, given.dtype, given.layout, "fresh", given.values)
    if isinstance(given, list | tuple) and any(isinstance(v, cases.In) for v in given):
        return tuple(lift(v) for v in given)
    if inspect.isfunction(given) and "<" in given.__qualname__:  # a local function cannot be pickled
        return first
    return given


@st.composite
def _change(draw: Any, call: Call) -> Call:
    arguments = dict(call.arguments)
    tensors = call.operands()
    name = draw(st.sampled_from(list(tensors))) if tensors else ""
    kind = draw(_percent)
    if kind < 20 and name:
        arguments[name] = draw(_reshaped(tensors[name]))
    elif kind < 35 and name:
        arguments = draw(_consistent(arguments))
    elif kind < 50 and name:
        arguments = draw(_retyped(arguments, name))
    elif kind < 60 and name:
        arguments[name] = feasible(replace(tensors[name], layout=draw(_layout)))
    elif kind < 70 and name:
        arguments[name] = replace(tensors[name], state=draw(_state))
    elif kind < 92:
        arguments = draw(_reset(call.op, arguments))
    elif kind < 96 and arguments:
        del arguments[draw(st.sampled_from(list(arguments)))]
    else:
        return replace(call, ctx=draw(_context))
    return replace(call, arguments=arguments)


@st.composite
def _reshaped(draw: Any, t: T) -> T:
    shape = list(t.shape)
    kind = draw(_percent)
    if kind < 10 or not shape:
        shape.insert(0, draw(_size))
    elif kind < 20:
        del shape[draw(st.integers(0, len(shape) - 1))]
    elif kind < 30:
        shape.reverse()
    else:
        i = draw(st.integers(0, len(shape) - 1))
        shape[i] = draw(st.one_of(_size, _sizes, st.sampled_from((shape[i] + 1, shape[i] * 2, shape[i] * 32))))
    return _sized(t, whole(shape, t.dtype))


def _sized(t: T, shape: tuple[int, ...]) -> T:
    values = t.values
    if isinstance(values, np.ndarray) and values.shape != shape:
        values = int(values.max()) + 1 if values.size and values.dtype.kind in "iu" else None
    return feasible(replace(t, shape=shape, values=values))


@st.composite
def _consistent(draw: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Draw another size for every occurrence of one size, in shapes and parameters: often valid again."""
    found = sorted({n for t in arguments.values() if isinstance(t, T) for n in t.shape})
    if not found:
        return arguments
    old, new = draw(st.sampled_from(found)), draw(_sizes)

    def changed(given: Any) -> Any:
        if isinstance(given, T):
            return _sized(given, tuple(new if n == old else n for n in given.shape))
        if isinstance(given, tuple | list):
            return type(given)(changed(v) for v in given)
        return new if type(given) is int and given == old and old > 1 else given

    return {key: changed(v) for key, v in arguments.items()}


@st.composite
def _retyped(draw: Any, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """Draw another element type for one operand, or for all operands with the same type."""
    old, new = arguments[name].dtype, draw(_dtype)
    every = draw(st.booleans())
    return {
        key: feasible(replace(t, dtype=new, shape=whole(t.shape, new), values=_plain(t)))
        if isinstance(t, T) and (key == name or (every and t.dtype is old))
        else t
        for key, t in arguments.items()
    }


def _plain(t: T) -> Any:
    return None if isinstance(t.values, np.ndarray) else t.values


@st.composite
def _reset(draw: Any, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Draw another value of a parameter, or add or remove an operand."""
    known = parameters(op)
    if not known:
        return arguments
    name = draw(st.sampled_from([*[n for n in known if n not in arguments], *known]))
    hint, _ = known[name]
    shapes = [t.shape for t in arguments.values() if isinstance(t, T)] or [(3,)]
    if draw(_percent) < 25:
        new = draw(_wild)
    elif takes_tensor(hint):
        new = draw(operand(shapes[0], Type.F32)) if name not in arguments else draw(st.sampled_from((None, T((1,)))))
    else:
        new = draw(value(hint, shapes[0]))
    return {**arguments, name: new}


def calls(op: str) -> st.SearchStrategy[Call]:
    """Draw calls of one operation, from both sources."""
    return st.one_of(mutated(op), mutated(op), mutated(op), scratch(op)) if cases_of(op) else scratch(op)


def any_call(ops: Sequence[str] = ()) -> st.SearchStrategy[Call]:
    """Draw calls of every operation, or of those in ``ops``."""
    return st.sampled_from(ops or operations()).flatmap(calls)
