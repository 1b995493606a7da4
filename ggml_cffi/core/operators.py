"""Numpy's operators and methods of tensors.

The operations are in :mod:`ggml_cffi.ops`, above this package. They are imported when an operator is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Self


class TensorOperators:
    """Numpy's operators, for :class:`Tensor <ggml_cffi.Tensor>` to inherit. Each adds nodes to the tensor's context."""

    __slots__ = ()
    ndim: int

    __array_ufunc__ = None  # numpy then leaves array + tensor to __radd__, and so on
    __iter__ = None  # a loop over rows would build one node per row, which is almost always a mistake

    def __add__(self, other: Any) -> Any:
        """Return ``a + b`` by numpy's rules; ``b`` may be a number or an array."""
        return _operators().add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        """Return ``a - b``."""
        return _operators().sub(self, other)

    def __rsub__(self, other: Any) -> Any:
        return _operators().sub(other, self)

    def __mul__(self, other: Any) -> Any:
        """Return ``a * b``, element by element."""
        return _operators().mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        """Return ``a / b``, element by element."""
        return _operators().div(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _operators().div(other, self)

    def __matmul__(self, other: Any) -> Any:
        """Return ``a @ b`` of vectors, matrices or stacks of matrices; ``x @ w.T`` makes no copy."""
        return _operators().matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return _operators().matmul(other, self)

    def __neg__(self) -> Self:
        """Return ``-a``."""
        out: Self = _operators().neg(self)
        return out

    def __getitem__(self, key: Any) -> Self:
        """Return a view of a part of the tensor, by integers, slices and ``...``.

        Raises
        ------
        IndexError
            If an index is out of range, or a step is negative, or a step of the last axis is not 1.
        TypeError
            If ``key`` has an index of another type.
        """
        out: Self = _operators().item(self, key)
        return out

    def __bool__(self) -> bool:
        raise TypeError("a tensor has no truth value before it is computed: use numpy()")

    @property
    def T(self) -> Self:  # noqa: N802 - numpy's name
        """View with all axes in reverse order, as ``numpy.ndarray.T``."""
        out: Self = _shapes().transpose(self) if self.ndim == 2 else _operators().permuted(self, ())
        return out

    def reshape(self, *shape: int | Sequence[int]) -> Self:
        """Return the same elements in the same order with another shape; see :func:`ggml_cffi.ops.reshape`."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        out: Self = _shapes().reshape(self, sizes)
        return out

    def permute(self, *axes: int) -> Self:
        """Return a view with the axes in another order; see :func:`ggml_cffi.ops.permute`."""
        out: Self = _operators().permuted(self, axes)
        return out

    def sum(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        """Return the sum over all elements or along one axis, as F32."""
        out: Self = _operators().total("sum", self, axis, keepdims)
        return out

    def mean(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        """Return the mean over all elements or along one axis, as F32."""
        out: Self = _operators().total("mean", self, axis, keepdims)
        return out


def _operators() -> ModuleType:
    from ggml_cffi.ops import operators

    return operators


def _shapes() -> ModuleType:
    from ggml_cffi.ops import shape

    return shape
