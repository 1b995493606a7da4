"""What the operations have in common: where a result lives, and checks that ggml would answer with ``abort()``."""

from __future__ import annotations

from collections.abc import Sequence

from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import block_size, type_size
from ggml_cffi.core.shapes import check_bytes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type

FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})


def home(op: str, *operands: Tensor, optional: Sequence[Tensor | None] = (), ctx: Context | None = None) -> Context:
    """The context of a result: ``ctx`` if given, else the youngest of the operands' contexts.

    Weights and caches are in contexts that live long; what is computed from them lives in a younger one.

    Raises
    ------
    TypeError
        If an operand is not a tensor; the ``optional`` ones may be None.
    ValueError
        If ``op`` is an operation in place, and the elements of the first operand share memory.
    """
    if ctx is not None and not isinstance(ctx, Context):
        raise TypeError(f"{op}: ctx must be a Context, not {type(ctx).__name__}")
    if optional:
        operands = (*operands, *(t for t in optional if t is not None))
    found = ctx
    several = False
    for t in operands:
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: a Tensor is needed, not {type(t).__name__}")
        if t.context is not found:
            several = found is not None
            if found is None or (ctx is None and t.context.serial > found.serial):
                found = t.context
    if found is None:
        raise TypeError(f"{op}: without operands, say in which ctx the result is to be")
    if several:
        for t in operands:
            found.use(t.context)
    if op.endswith("_inplace") and not operands[0].head.dense:
        check_separate(op, operands[0])
    return found


def check_separate(op: str, a: Tensor) -> None:
    """Raise ``ValueError`` if elements of ``a``, which is to be written, share memory, as those of a view may."""
    dtype, (n, *sizes), nb, _ = a.head
    reach = type_size(dtype)
    for stride, size in sorted(zip(nb, (n // block_size(dtype), *sizes), strict=True)):
        if size > 1:
            if stride < reach:
                raise fail(op, "elements of a share memory: they cannot be written in place", a=a)
            reach += stride * (size - 1)


def fail(op: str, rule: str, **operands: Tensor | None) -> ValueError:
    """The exception for a broken rule, with the operands' shapes and types."""
    shown = " · ".join(f"{name} {t.shape} {t.dtype.name}" for name, t in operands.items() if t is not None)
    return ValueError(f"{op}: {rule}: {shown}")


def check_result(op: str, ne: tuple[int, ...], dtype: Type = Type.F32) -> None:
    """Raise ``ValueError`` if a result of these sizes (ggml's order) would have more bytes than C can count."""
    if max(ne) < 2**14:  # as nearly always
        return
    try:
        check_bytes(dtype, ne)
    except ValueError as error:
        raise ValueError(f"{op}: the result is too large: {error}") from None


def broadcasts(big: tuple[int, ...], small: tuple[int, ...]) -> bool:
    """ggml's rule: every size of the larger is a multiple of the smaller's."""
    if big == small:
        return True
    return all(b == s or (s and b % s == 0) for b, s in zip(big, small, strict=True))


def contiguous_rows(t: Tensor) -> bool:
    """Whether the elements of each row lie one after another, as the CPU's kernels insist, even for rows of one."""
    head = t.head
    return head.dense or head.nb[0] == type_size(head.dtype)
