"""From C's arguments to those of the checked operations, for :mod:`ggml_cffi.flat._ops`.

C's tensors always have four axes, and its axes count from the contiguous one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

from ggml_cffi.core import dtypes
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import ScaleMode


def tensor(t: Tensor) -> Tensor:
    """``t``, if it is a tensor; else ``TypeError``."""
    if not isinstance(t, Tensor):
        raise TypeError(f"a Tensor is needed, not {type(t).__name__}")
    return t


def axes(t: Tensor, n: int) -> Tensor:
    """``t`` with ``n`` axes, if the others are of size 1; else as it is, for the operation to refuse."""
    tensor(t)
    if t.ndim == n or any(size != 1 for size in t.ne[n:]):
        return t
    return Tensor(t.context, t.ptr, n, t.head)


def at_least(t: Tensor, n: int) -> Tensor:
    """``t`` with no fewer than ``n`` axes."""
    return axes(t, max(tensor(t).ndim, n))


def at_most(t: Tensor, n: int) -> Tensor:
    """``t`` with no more than ``n`` axes, if the others are of size 1."""
    return axes(t, min(tensor(t).ndim, n))


def level(t: Tensor, *others: Tensor) -> Tensor:
    """``t`` with as many axes as any of ``others``."""
    return at_least(t, max(tensor(other).ndim for other in others))


def shape_of(t: Tensor, other: Tensor | None = None) -> tuple[int, ...]:
    """The shape of ``t``, of at least as many axes as ``other`` has."""
    return at_least(t, tensor(other).ndim if other is not None else 0).shape


def unit(t: Tensor) -> int:
    """Bytes of an element, or of a block of them."""
    return dtypes.type_size(tensor(t).dtype)


def strides(t: Tensor, nb1: int, nb2: int, nb3: int) -> tuple[int, ...]:
    """Strides in numpy's order, for as many axes as ``t`` has."""
    return (nb3, nb2, nb1, unit(t))[4 - tensor(t).ndim :]


def all_strides(t: Tensor) -> tuple[int, ...]:
    """The strides that ``t`` has, in numpy's order."""
    return tensor(t).nb[: t.ndim][::-1]


def permuted(a: Tensor, to: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and the ``axes`` of :func:`ggml_cffi.ops.permute`, where C moves axis ``i`` to ``to[i]``."""
    places = [index(i) for i in to]
    if sorted(places) != [0, 1, 2, 3]:
        raise ValueError(f"ggml_permute: {tuple(to)} is no permutation of the axes 0 to 3")
    n = max([tensor(a).ndim, *(max(i, place) + 1 for i, place in enumerate(places) if i != place)])
    order = [0] * n
    for i in range(n):
        order[n - 1 - places[i]] = n - 1 - i
    return axes(a, n), tuple(order)


def joined(a: Tensor, b: Tensor, dim: int) -> int:
    """How many axes ``a`` and ``b`` need to be joined along ``dim``."""
    if not 0 <= index(dim) <= 3:
        raise ValueError(f"ggml_concat: dim must be 0 to 3, not {dim}")
    return max(tensor(a).ndim, tensor(b).ndim, dim + 1)


def window(is_2d: bool, along_0: int, along_1: int) -> int | tuple[int, int]:
    """A number for each axis of a window, in numpy's order."""
    return (along_1, along_0) if is_2d else along_0


def scaling(mode: int) -> tuple[ScaleMode, int]:
    """The mode of an interpolation, and its flags, which C has in one number."""
    number = index(mode)
    return ScaleMode(number & 0xFF), number & ~0xFF


def tasks(n_tasks: int) -> int | None:
    """None for ``GGML_N_TASKS_MAX``, one for each thread."""
    return None if n_tasks == -1 else n_tasks


def n_rows(op: str, grad: Tensor, table: Tensor) -> int:
    """The rows of ``table``, which ``grad`` is a gradient of rows of."""
    if tensor(table).ne[2:] != (1, 1) or table.ne[0] != tensor(grad).ne[0]:
        raise ValueError(f"{op}: c must be a matrix with rows as long as those of a: {grad!r} · {table!r}")
    return table.ne[1]


def scalar(op: str, t: Tensor) -> None:
    """Raise ``ValueError`` unless ``t`` has one element."""
    if tensor(t).size != 1:
        raise ValueError(f"{op}: b must have one element: {t!r}")


def volumes(kernel: Tensor, x: Tensor, channels: int, batch: int, out: int) -> None:
    """Raise ``ValueError`` unless the first sizes are channels times their numbers."""
    if tensor(x).ne[3] != channels * batch or tensor(kernel).ne[3] != channels * out:
        raise ValueError(
            f"ggml_conv_3d_direct: ne[3] must be n_channels * n_channels_out of a, {channels} * {out}, and n_channels "
            f"* n_batch of b, {channels} * {batch}: {kernel!r} · {x!r}"
        )


def only(op: str, **given: tuple[Any, Any]) -> None:
    """Raise ``ValueError`` for what C has a parameter for, but one value only."""
    for name, (value, known) in given.items():
        if value is not known and value != known:
            raise ValueError(f"{op}: {name} must be {known}, not {value!r}")


def choose(op: str, table: Mapping[int, Callable[..., Tensor]], which: int) -> Callable[..., Tensor]:
    """The operation of a number."""
    if which not in table:
        raise ValueError(f"{op}: there is no operation {which!r} that takes operands only")
    return table[which]
