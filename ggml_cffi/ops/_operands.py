"""Checks of operands: context of the result, types, layouts and limits. ggml would end the process instead."""

from __future__ import annotations

from collections.abc import Sequence

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import INTERNAL, block_size, is_quantized, type_size
from ggml_cffi.core.shapes import check_bytes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._parameters import INT_MAX, MAX_GROUPS

FLOATS = frozenset({Type.F32, Type.F16, Type.BF16})
F32_F16 = (Type.F32, Type.F16)
#: Functions that came with a version, for what older functions can from that version on.
GGML_0_25, GGML_0_27 = "ggml_prec_set_acc", "ggml_backend_sched_set_realloc_callback"
_START = 256  # largest alignment that a Vulkan device may require for the start of an operand


def result_context(
    op: str, *operands: Tensor, optional: Sequence[Tensor | None] = (), ctx: Context | None = None
) -> Context:
    """Return the context of a result: ``ctx`` if given, else the youngest context of the operands.

    Weights and caches are in long-lived contexts; results computed from them belong to a younger context.

    Raises
    ------
    TypeError
        If an operand is not a tensor, or there is neither an operand nor ``ctx``. ``optional`` operands may be None.
    ValueError
        If ``op`` works in place, and elements of the first operand share memory.
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
        raise TypeError(f"{op}: without operands, ctx is required")
    if several:
        for t in operands:
            found.use(t.context)
    if op.endswith("_inplace") and not operands[0].head.dense:
        check_separate(op, operands[0])
    return found


def op_error(op: str, rule: str, **operands: Tensor | None) -> ValueError:
    """Return the exception for a broken rule, with the shapes and types of the operands."""
    shown = " · ".join(f"{name} {t.shape} {t.dtype.name}" for name, t in operands.items() if t is not None)
    return ValueError(f"{op}: {rule}: {shown}")


def check_result(op: str, ne: tuple[int, ...], dtype: Type = Type.F32) -> None:
    """Raise ``ValueError`` if a result of these sizes (ggml's order) has more bytes than C can count."""
    if max(ne) < 2**14:  # almost always
        return
    try:
        check_bytes(dtype, ne)
    except ValueError as error:
        raise ValueError(f"{op}: the result is too large: {error}") from None


def check_bf16(op: str, a: Tensor) -> None:
    """Raise :class:`LibraryMismatchError` if ``a`` is BF16, for operations that have it from ggml 0.25.3 on."""
    if a.dtype is Type.BF16:
        library.require(GGML_0_25, f"{op} of BF16")


def check_separate(op: str, a: Tensor) -> None:
    """Raise ``ValueError`` if elements of ``a``, the target of a write, share memory, as those of a view may."""
    dtype, (n, *sizes), nb, _ = a.head
    reach = type_size(dtype)
    for stride, size in sorted(zip(nb, (n // block_size(dtype), *sizes), strict=True)):
        if size > 1:
            if stride < reach:
                raise op_error(op, "elements of a share memory: they cannot be written in place", a=a)
            reach += stride * (size - 1)


def broadcasts(big: tuple[int, ...], small: tuple[int, ...]) -> bool:
    """Return whether ``small`` broadcasts to ``big`` by ggml's rule: every size divides that of ``big``."""
    if big == small:
        return True
    return all(b == s or (s and b % s == 0) for b, s in zip(big, small, strict=True))


def contiguous_rows(t: Tensor) -> bool:
    """Return whether the elements of each row are adjacent, by the stride even in rows of one element."""
    head = t.head
    return head.dense or head.nb[0] == type_size(head.dtype)


def is_contiguous(t: Tensor) -> bool:
    """Return whether a tensor is contiguous, also for kernels that use the stride of a single element."""
    return contiguous_rows(t) and t.is_contiguous


def encodes(dtype: Type) -> bool:
    """Return whether the CPU's kernels can encode floats as ``dtype``, a quantized type."""
    return is_quantized(dtype) and dtype not in INTERNAL and bool(c.ggml_get_type_traits_cpu(dtype).from_float)


def need_dense(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` unless all operands are F32 with the strides of a new tensor.

    ggml also counts a tensor as contiguous if an axis of size 1 has any stride, although some of its kernels use it.
    """
    for name, t in operands.items():
        if t.dtype is not Type.F32 or not t.head.dense:
            raise op_error(op, f"{name} must be contiguous F32 (use cont)", **operands)


def need_rows(op: str, *dtypes: Type, **operands: Tensor) -> None:
    """Raise ``ValueError`` unless all operands have one of the types, by default F32, and contiguous rows."""
    for name, t in operands.items():
        if t.dtype not in (dtypes or (Type.F32,)) or t.nb[0] != type_size(t.dtype):
            kinds = " or ".join(kind.name for kind in dtypes) or "F32"
            raise op_error(op, f"{name} must be {kinds} with contiguous rows (use cont)", **operands)


def need_axes(op: str, n: int, **operands: Tensor) -> None:
    """Raise ``ValueError`` unless all operands have ``n`` axes. ggml ignores leading axes of size 1."""
    for name, t in operands.items():
        if t.ndim != n:
            raise op_error(op, f"{name} must have {n} {'axis' if n == 1 else 'axes'}", **operands)


def need_elements(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` if an operand is empty, although the result is not."""
    for name, t in operands.items():
        if not t.size:
            raise op_error(op, f"{name} has no elements", **operands)


def need_int(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` if an operand has more elements than a kernel counts in 32 bits."""
    for name, t in operands.items():
        if t.size > INT_MAX:
            raise op_error(op, f"{name} has more than 2**31 - 1 elements", **operands)


def need_int_rows(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` if an operand has more rows, or elements in one, than a kernel counts in 32 bits."""
    for name, t in operands.items():
        if t.ne[0] > INT_MAX or t.ne[1] * t.ne[2] * t.ne[3] > INT_MAX:
            raise op_error(op, f"{name} has more than 2**31 - 1 rows, or elements in a row", **operands)


def check_sizes(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` for operands without elements, or with more than the kernels can count."""
    for name, t in operands.items():
        if not t.size:
            raise op_error(op, f"{name} has no elements", **operands)
        if t.size > INT_MAX:
            raise op_error(op, f"{name} has 2**31 elements or more", **operands)


def check_groups(op: str, items: str, n: int, each: int = 1) -> None:
    """Raise ``ValueError`` if a GPU cannot start work for ``n`` items, ``each`` of them per workgroup."""
    if n > MAX_GROUPS * each:
        raise ValueError(f"{op}: {items}: at most {MAX_GROUPS * each}, not {n}")


def check_start(op: str, **operands: Tensor) -> None:
    """Raise ``ValueError`` for a view at an offset for which ggml's Vulkan backend would end the process."""
    for name, t in operands.items():
        pointer = t.ptr
        if pointer.view_src and pointer.view_offs % _START:
            raise op_error(
                op, f"{name} starts inside another tensor, not at a multiple of {_START} bytes (use cont)", **operands
            )
