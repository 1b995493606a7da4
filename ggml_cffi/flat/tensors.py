"""Contexts and tensors, by C's names."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.flat._checks import close, require
from ggml_cffi.flat._objects import FlatContext

__all__ = [
    "ggml_dup_tensor",
    "ggml_free",
    "ggml_get_name",
    "ggml_init",
    "ggml_n_dims",
    "ggml_nbytes",
    "ggml_nelements",
    "ggml_new_f32",
    "ggml_new_i32",
    "ggml_new_tensor",
    "ggml_new_tensor_1d",
    "ggml_new_tensor_2d",
    "ggml_new_tensor_3d",
    "ggml_new_tensor_4d",
    "ggml_set_input",
    "ggml_set_name",
    "ggml_set_output",
    "ggml_tensor_shape",
]


def ggml_init(mem_size: int = 16 * 1024 * 1024, no_alloc: bool = False) -> Context:  # noqa: ARG001
    """Return a new context.

    A context grows by itself, and its data is in buffers. ``mem_size`` is therefore only checked to be at least 0, and
    ``no_alloc`` has no effect.
    """
    if isinstance(mem_size, bool) or index(mem_size) < 0:
        raise ValueError(f"mem_size must be a number of bytes, not {mem_size!r}")
    return FlatContext()


def ggml_free(ctx: Context | None) -> None:
    """Close a context, with its tensors, their memory and its graphs."""
    close(ctx, Context)


def ggml_new_tensor(ctx: Context, type: Type, n_dims: int, ne: Sequence[int]) -> Tensor:  # noqa: A002
    """Return a new tensor of ``n_dims`` sizes, the contiguous axis first. Its values are 0 until they are set."""
    sizes = tuple(ne)[: index(n_dims)]
    if not 1 <= n_dims <= 4 or len(sizes) < n_dims:
        raise ValueError(f"ggml_new_tensor: n_dims must be 1 to 4 and ne as long, not {n_dims} and {tuple(ne)}")
    return require(ctx, Context).new_tensor(type, sizes[::-1])


def ggml_new_tensor_1d(ctx: Context, type: Type, ne0: int) -> Tensor:  # noqa: A002
    """Return a new vector; see :func:`ggml_new_tensor`."""
    return require(ctx, Context).new_tensor(type, (ne0,))


def ggml_new_tensor_2d(ctx: Context, type: Type, ne0: int, ne1: int) -> Tensor:  # noqa: A002
    """Return a new matrix of ``ne1`` rows of ``ne0`` elements; see :func:`ggml_new_tensor`."""
    return require(ctx, Context).new_tensor(type, (ne1, ne0))


def ggml_new_tensor_3d(ctx: Context, type: Type, ne0: int, ne1: int, ne2: int) -> Tensor:  # noqa: A002
    """Return a new tensor of three axes; see :func:`ggml_new_tensor`."""
    return require(ctx, Context).new_tensor(type, (ne2, ne1, ne0))


def ggml_new_tensor_4d(ctx: Context, type: Type, ne0: int, ne1: int, ne2: int, ne3: int) -> Tensor:  # noqa: A002
    """Return a new tensor of four axes; see :func:`ggml_new_tensor`."""
    return require(ctx, Context).new_tensor(type, (ne3, ne2, ne1, ne0))


def ggml_dup_tensor(ctx: Context, src: Tensor) -> Tensor:
    """Return a new tensor of the type and the sizes of ``src``."""
    return require(ctx, Context).new_tensor(require(src, Tensor).dtype, src.shape)


def ggml_new_f32(ctx: Context, value: float) -> Tensor:
    """Return a tensor of one F32."""
    return require(ctx, Context).constant([value], Type.F32)


def ggml_new_i32(ctx: Context, value: int) -> Tensor:
    """Return a tensor of one I32."""
    return require(ctx, Context).constant([value], Type.I32)


def ggml_set_name(tensor: Tensor, name: str) -> Tensor:
    """Set the name of a tensor, and return the tensor. At most 63 bytes of the name are kept."""
    require(tensor, Tensor).name = name
    return tensor


def ggml_get_name(tensor: Tensor) -> str:
    """Return the name of a tensor."""
    return require(tensor, Tensor).name


def ggml_set_input(tensor: Tensor) -> None:
    """Do nothing: inputs stay valid without C's mark, which would move their nodes off the GPUs."""
    require(tensor, Tensor)


def ggml_set_output(tensor: Tensor) -> None:
    """Mark a tensor as an output: it keeps its memory during a run, so that its values can be read.

    Raises
    ------
    ValueError
        If the tensor is already allocated.
    """
    for ctx in require(tensor, Tensor).context.reachable():
        if any(tensor.ptr in nodes for nodes in ctx.held.copy().values()):
            raise ValueError(
                f"{tensor!r} is already allocated: mark outputs before allocation, or reset the scheduler first"
            )
    c.ggml_set_output(tensor.ptr)


def ggml_tensor_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the four sizes in ggml's order, ``(ne0, ne1, ne2, ne3)``."""
    return require(tensor, Tensor).ne


def ggml_n_dims(tensor: Tensor) -> int:
    """Return the number of axes, at least 1. Axes of size 1 at the end of :func:`ggml_tensor_shape` do not count."""
    return c.ggml_n_dims(require(tensor, Tensor).ptr)


def ggml_nelements(tensor: Tensor) -> int:
    """Return the number of elements."""
    return require(tensor, Tensor).size


def ggml_nbytes(tensor: Tensor) -> int:
    """Return the bytes from the first to the last element."""
    return require(tensor, Tensor).nbytes
