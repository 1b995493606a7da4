"""Numpy's operators and methods of tensors.

The operations are in :mod:`ggml_cffi.ops`, above this package. They are imported when an operator is first used.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ggml_cffi.core.known_names import hint


class TensorOperators:
    """Numpy's operators, for :class:`Tensor <ggml_cffi.Tensor>` to inherit. Each adds nodes to the tensor's context."""

    __slots__ = ()
    ndim: int

    __iter__ = None  # a loop over rows would build one node per row, which is almost always a mistake

    def __add__(self, other: Any) -> Self:
        """Return ``a + b`` by numpy's rules; ``b`` may be a number or an array."""
        out: Self = _operators().add(self, other)
        return out

    __radd__ = __add__

    def __sub__(self, other: Any) -> Self:
        """Return ``a - b``."""
        out: Self = _operators().sub(self, other)
        return out

    def __rsub__(self, other: Any) -> Self:
        out: Self = _operators().sub(other, self)
        return out

    def __mul__(self, other: Any) -> Self:
        """Return ``a * b``, element by element."""
        out: Self = _operators().mul(self, other)
        return out

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Self:
        """Return ``a / b``, element by element."""
        out: Self = _operators().div(self, other)
        return out

    def __rtruediv__(self, other: Any) -> Self:
        out: Self = _operators().div(other, self)
        return out

    def __matmul__(self, other: Any) -> Self:
        """Return ``a @ b`` of vectors, matrices or stacks of matrices; ``x @ w.T`` makes no copy."""
        out: Self = _operators().matmul(self, other)
        return out

    def __rmatmul__(self, other: Any) -> Self:
        out: Self = _operators().matmul(other, self)
        return out

    def __pow__(self, other: Any) -> Self:
        """Return ``a ** b``; integers are computed by products, other exponents by ``exp(b * log(a))``."""
        out: Self = _operators().power(self, other)
        return out

    def __rpow__(self, other: Any) -> Self:
        out: Self = _operators().power(other, self)
        return out

    def __neg__(self) -> Self:
        """Return ``-a``."""
        out: Self = _operators().neg(self)
        return out

    def __pos__(self) -> Self:
        """Return the tensor itself."""
        return self

    def __abs__(self) -> Self:
        """Return the absolute values."""
        out: Self = _operators().absolute(self)
        return out

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Return the result of one of numpy's functions: ``array + tensor``, ``numpy.exp(tensor)``.

        Raises
        ------
        TypeError
            If there is no such operation.
        """
        return _operators().universal(ufunc, method, inputs, options)

    def __lt__(self, other: Any) -> NoReturn:
        refuse_comparison()

    __le__ = __gt__ = __ge__ = __lt__

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"a tensor has no attribute {name!r}{hint(name)}")

    def __getitem__(self, key: Any) -> Self:
        """Return a view of a part of the tensor, by integers, slices, ``...`` and ``None`` for a new axis of size 1.

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
        out: Self = _operators().permuted(self, ())
        return out

    def reshape(self, *shape: int | Sequence[int]) -> Self:
        """Return the same elements in the same order with another shape; see :func:`ggml_cffi.ops.reshape`."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        out: Self = _operators().reshaped(self, sizes)
        return out

    def permute(self, *axes: int) -> Self:
        """Return a view with the axes in another order; see :func:`ggml_cffi.ops.permute`."""
        out: Self = _operators().permuted(self, axes)
        return out

    def transpose(self, *axes: int | Sequence[int] | None) -> Self:
        """Return a view with the axes in reverse or in the given order, as ``numpy.ndarray.transpose``."""
        order = axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes
        out: Self = _operators().permuted(self, order or ())
        return out

    def swapaxes(self, axis1: int, axis2: int) -> Self:
        """Return a view with two axes interchanged, as ``numpy.swapaxes``, and ``torch.transpose`` of two axes."""
        out: Self = _operators().swapped(self, axis1, axis2)
        return out

    def sum(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        """Return the sum over all elements or along one axis, as F32."""
        out: Self = _operators().total("sum", self, axis, keepdims)
        return out

    def mean(self, axis: int | None = None, *, keepdims: bool = False) -> Self:
        """Return the mean over all elements or along one axis, as F32."""
        out: Self = _operators().total("mean", self, axis, keepdims)
        return out


def refuse_comparison() -> NoReturn:
    """Raise ``TypeError``: a comparison would be decided before the tensors have values.

    Raises
    ------
    TypeError
        Always.
    """
    raise TypeError(
        "tensors are not compared before they are computed: step(b - a) is 1 where a < b, else 0; compare the arrays "
        "of numpy() after the run"
    )


def _operators() -> ModuleType:
    from ggml_cffi.ops import operators

    return operators
