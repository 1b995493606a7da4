"""Sources of tensors: files, encoded bytes, arrays, and functions that are called when the tensor is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi.core import dtypes
from ggml_cffi.core.shapes import check_shape
from ggml_cffi.enums import Type


class StoredTensor(ABC):
    """Tensor in a file or in encoded bytes. Its values are read on demand.

    ``Session.weight``, :func:`write_gguf` and numpy accept it.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the tensor in the file."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Sizes in numpy's order."""

    @property
    @abstractmethod
    def dtype(self) -> Type:
        """Type in which the tensor is stored."""

    @abstractmethod
    def raw(self) -> npt.NDArray[np.uint8]:
        """Return the stored bytes, read-only (shape ``(nbytes,)``)."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def numpy(self) -> npt.NDArray[Any]:
        """Return an array of the tensor's shape: a read-only view of the file, or decoded to ``float32`` if numpy lacks
        the type.

        Raises
        ------
        TypeError
            If neither numpy nor ggml can decode the type.
        """
        raw = self.raw()
        if dtypes.has_numpy(self.dtype):
            return raw.view(dtypes.numpy_dtype(self.dtype)).reshape(self.shape)
        return dtypes.from_bytes(raw, self.dtype, self.size).reshape(self.shape)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            if not dtypes.has_numpy(self.dtype):
                raise ValueError(f"{self!r} is decoded into a copy: numpy has no {self.dtype.name}")
            return dtypes.as_viewed(self.numpy(), dtype)
        array = np.asarray(self.numpy(), dtype)
        return array.copy() if copy else array

    def __repr__(self) -> str:
        return " ".join(filter(None, (f"<{type(self).__name__}", self.name, self.dtype.name, f"{self.shape}>")))


class RawTensor(StoredTensor):
    """Encoded bytes as a tensor, such as the result of :func:`quantize`.

    Parameters
    ----------
    data
        Encoded rows, ``(..., row_size)``, not copied.
    dtype
        Type of the bytes.
    shape
        Shape of the tensor. Default: ``(..., n)`` from the shape of ``data``.

    Raises
    ------
    TypeError, ValueError
        If the bytes are not whole rows of the type.

    Examples
    --------
    >>> import ggml_cffi as ggml
    >>> RawTensor(ggml.quantize(np.ones((4, 64)), "q4_0"), "q4_0")
    <RawTensor Q4_0 (4, 64)>
    """

    def __init__(
        self, data: npt.NDArray[Any] | bytes, dtype: Type | str, shape: Sequence[int] | None = None, name: str = ""
    ) -> None:
        element_type = dtypes.as_type(dtype)
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        if not array.dtype.isnative:
            raise ValueError(f"the bytes of {array.dtype.str} are in another order: use astype({array.dtype.name!r})")
        raw = array.reshape(-1).view(np.uint8)
        last = array.shape[-1] * array.itemsize if array.ndim else raw.size
        unit, block = dtypes.type_size(element_type), dtypes.block_size(element_type)
        if shape is None and last % unit:
            raise ValueError(f"rows of {last} bytes do not fill whole {element_type.name} blocks of {unit} bytes")
        self._shape = (*array.shape[:-1], last // unit * block) if shape is None else check_shape(shape)
        row = dtypes.row_size(element_type, self._shape[-1] if self._shape else 1)
        if row * prod(self._shape[:-1]) != raw.size:
            raise ValueError(f"{raw.size} bytes are not a {element_type.name} tensor of shape {self._shape}")
        self._raw = raw
        self._raw.flags.writeable = False
        self._dtype, self._name = element_type, name

    @property
    def name(self) -> str:
        """Name of the tensor; empty if it has none."""
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in numpy's order."""
        return self._shape

    @property
    def dtype(self) -> Type:
        """Type of the bytes."""
        return self._dtype

    def raw(self) -> npt.NDArray[np.uint8]:
        """Return the bytes, read-only (shape ``(nbytes,)``)."""
        return self._raw


class LazyTensor:
    """Tensor with values from a function that is called when the tensor is written, and not kept after that.

    Parameters
    ----------
    shape
        Sizes in numpy's order.
    dtype
        Type in the file.
    values
        Function without arguments that returns the array. It is called once.

    Examples
    --------
    >>> zeros = LazyTensor((4, 32), "q8_0", lambda: np.zeros((4, 32)))
    """

    def __init__(
        self, shape: Sequence[int], dtype: Type | str | npt.DTypeLike, values: Callable[[], npt.ArrayLike]
    ) -> None:
        if not callable(values):
            raise TypeError(f"LazyTensor takes a function that returns the values, not {type(values).__name__}")
        self.shape = check_shape(shape)
        self.dtype = dtypes.as_type(dtype)
        self.values = values


def as_source(values: Any) -> StoredTensor | npt.NDArray[Any]:
    """Return ``values`` in a form that can be stored: a :class:`StoredTensor` itself, anything else as an array.

    PyTorch tensors may be on any device. ``bfloat16`` values, which numpy lacks, become a :class:`RawTensor`.

    Raises
    ------
    TypeError
        If the values are not numbers.
    """
    if isinstance(values, StoredTensor):
        return values
    if hasattr(values, "detach") and hasattr(values, "cpu"):
        values = values.detach().cpu()
    array, is_bfloat16 = dtypes.read_array(values)
    return RawTensor(array, Type.BF16, array.shape) if is_bfloat16 else array


def default_dtype(source: StoredTensor | npt.NDArray[Any]) -> Type:
    """Return the type in which ``source`` is stored by default: its own; F32 for ``float64``."""
    if isinstance(source, StoredTensor):
        return source.dtype
    return Type.F32 if source.dtype.newbyteorder("=") == np.float64 else dtypes.as_type(source.dtype)
