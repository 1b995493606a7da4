"""Conversions from C's arguments to those of the checked operations, for :mod:`ggml_cffi.flat._ops`.

Tensors in C always have four axes, and C counts axes from the contiguous one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

from ggml_cffi.core import dtypes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import ScaleMode


def tensor(t: Tensor) -> Tensor:
    """Return ``t`` if it is a tensor, else raise ``TypeError``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"a Tensor is needed, not {type(t).__name__}")
    return t


def axes(t: Tensor, n: int) -> Tensor:
    """Return ``t`` with ``n`` axes if all further axes have size 1, else ``t`` itself, which the operation refuses."""
    tensor(t)
    if t.ndim == n or any(size != 1 for size in t.ne[n:]):
        return t
    return Tensor(t.context, t.ptr, n, t.head)


def optional_axes(t: Tensor | None, n: int) -> Tensor | None:
    """Return ``t`` as :func:`axes` does, None for None."""
    return None if t is None else axes(t, n)


def at_least(t: Tensor, n: int) -> Tensor:
    """Return ``t`` with at least ``n`` axes."""
    return axes(t, max(tensor(t).ndim, n))


def at_most(t: Tensor, n: int) -> Tensor:
    """Return ``t`` with at most ``n`` axes if all further axes have size 1, else ``t`` itself."""
    return axes(t, min(tensor(t).ndim, n))


def same_rank(t: Tensor, *others: Tensor) -> Tensor:
    """Return ``t`` with at least as many axes as each of ``others``."""
    return at_least(t, max(tensor(other).ndim for other in others))


def shape_of(t: Tensor, other: Tensor | None = None) -> tuple[int, ...]:
    """Return the shape of ``t`` with at least as many axes as ``other`` has."""
    return at_least(t, tensor(other).ndim if other is not None else 0).shape


def unit(t: Tensor) -> int:
    """Return the bytes of an element, or of a block of a quantized type."""
    return dtypes.type_size(tensor(t).dtype)


def strides(t: Tensor, nb1: int, nb2: int, nb3: int) -> tuple[int, ...]:
    """Return the strides in numpy's order, one for each axis of ``t``."""
    return (nb3, nb2, nb1, unit(t))[4 - tensor(t).ndim :]


def all_strides(t: Tensor) -> tuple[int, ...]:
    """Return the strides of ``t`` in numpy's order."""
    return tensor(t).nb[: t.ndim][::-1]


def permute_axes(a: Tensor, to: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the two arguments of :func:`ggml_cffi.ops.permute` for C's ``to``, which moves axis ``i`` to ``to[i]``."""
    places = [index(i) for i in to]
    if sorted(places) != [0, 1, 2, 3]:
        raise ValueError(f"ggml_permute: {tuple(to)} is not a permutation of the axes 0 to 3")
    n = max([tensor(a).ndim, *(max(i, place) + 1 for i, place in enumerate(places) if i != place)])
    order = [0] * n
    for i in range(n):
        order[n - 1 - places[i]] = n - 1 - i
    return axes(a, n), tuple(order)


def n_axes_to_concat(a: Tensor, b: Tensor, dim: int) -> int:
    """Return the number of axes that ``a`` and ``b`` need for concatenation along ``dim``."""
    if not 0 <= index(dim) <= 3:
        raise ValueError(f"ggml_concat: dim must be 0 to 3, not {dim}")
    return max(tensor(a).ndim, tensor(b).ndim, dim + 1)


def window(is_2d: bool, along_0: int, along_1: int) -> int | tuple[int, int]:
    """Return a parameter of a window in numpy's order: one number for each axis of the window."""
    return (along_1, along_0) if is_2d else along_0


def scaling(mode: int) -> tuple[ScaleMode, int]:
    """Return the mode and the flags of an interpolation, which C packs into one number."""
    number = index(mode)
    return ScaleMode(number & 0xFF), number & ~0xFF


def tasks(n_tasks: int) -> int | None:
    """Return the number of tasks, None (one task per thread) for ``GGML_N_TASKS_MAX``."""
    return None if n_tasks == -1 else n_tasks


def n_rows(op: str, grad: Tensor, table: Tensor) -> int:
    """Return the number of rows of ``table``. ``grad`` is the gradient of rows that were read from the table."""
    if tensor(table).ne[2:] != (1, 1) or table.ne[0] != tensor(grad).ne[0]:
        raise ValueError(f"{op}: c must be a matrix with rows as long as those of a: {grad!r} · {table!r}")
    return table.ne[1]


def check_scalar(op: str, t: Tensor) -> None:
    """Raise ``ValueError`` unless ``t`` has one element."""
    if tensor(t).size != 1:
        raise ValueError(f"{op}: b must have one element: {t!r}")


def check_volumes(kernel: Tensor, x: Tensor, channels: int, batch: int, out: int) -> None:
    """Raise ``ValueError`` unless ``ne[3]`` of both is the channels times the batch, or times the output channels."""
    if tensor(x).ne[3] != channels * batch or tensor(kernel).ne[3] != channels * out:
        raise ValueError(
            f"ggml_conv_3d_direct: ne[3] must be n_channels * n_channels_out of a, {channels} * {out}, and n_channels "
            f"* n_batch of b, {channels} * {batch}: {kernel!r} · {x!r}"
        )


def check_fixed(op: str, **given: tuple[Any, Any]) -> None:
    """Raise ``ValueError`` if a parameter differs from the only value that C supports.

    ``given`` has pairs ``(value, supported value)`` by the parameter's name.
    """
    for name, (value, known) in given.items():
        if value is not known and value != known:
            raise ValueError(f"{op}: {name} must be {known}, not {value!r}")


def choose(op: str, table: Mapping[int, Callable[..., Tensor]], which: int) -> Callable[..., Tensor]:
    """Return the operation with the number ``which``."""
    if which not in table:
        raise ValueError(f"{op}: there is no operation {which!r} that takes operands only")
    return table[which]
