"""What the operations have in common: where a result lives, and checks that ggml would answer with ``abort()``."""

from __future__ import annotations

from ggml_cffi.context import Context
from ggml_cffi.dtypes import type_size
from ggml_cffi.enums import Type
from ggml_cffi.tensor import Tensor, check_bytes

FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})


def home(op: str, *operands: Tensor | None, ctx: Context | None = None) -> Context:
    """The context of a result: ``ctx`` if given, else the youngest of the operands' contexts.

    Weights and caches are in contexts that live long; what is computed from them lives in a younger one.
    """
    if ctx is not None and not isinstance(ctx, Context):
        raise TypeError(f"{op}: ctx must be a Context, not {type(ctx).__name__}")
    found = ctx
    for t in operands:
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: a Tensor is needed, not {type(t).__name__}")
        if ctx is None and (found is None or t.context.serial > found.serial):
            found = t.context
    assert found is not None
    for t in operands:
        if t is not None and t.context is not found:
            found.use(t.context)
    return found


def fail(op: str, rule: str, **operands: Tensor | None) -> ValueError:
    """The exception for a broken rule, with the operands' shapes and types."""
    shown = " · ".join(f"{name} {t.shape} {t.dtype.name}" for name, t in operands.items() if t is not None)
    return ValueError(f"{op}: {rule}: {shown}")


def check_result(op: str, ne: tuple[int, ...], dtype: Type = Type.F32) -> None:
    """Raise ``ValueError`` if a result of these sizes (ggml's order) would have more bytes than C can count."""
    try:
        check_bytes(dtype, ne)
    except ValueError as error:
        raise ValueError(f"{op}: the result is too large: {error}") from None


def broadcasts(big: tuple[int, ...], small: tuple[int, ...]) -> bool:
    """ggml's rule: every size of the larger is a multiple of the smaller's."""
    return all(s and b % s == 0 for b, s in zip(big, small, strict=True)) or 0 in big


def contiguous_rows(t: Tensor) -> bool:
    """Whether the elements of each row lie one after another, as the CPU's kernels insist, even for rows of one."""
    return t.nb[0] == type_size(t.dtype)
