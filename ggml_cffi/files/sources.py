"""What tensors are made from: those of files, bytes, arrays, and what is made when its turn comes."""

from __future__ import annotations

import sys
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
    """A tensor in a file. Nothing of it is read before it is asked for.

    ``Session.weight`` and :func:`write_gguf` take it, and so does numpy.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in the file."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Sizes in numpy's order."""

    @property
    @abstractmethod
    def dtype(self) -> Type:
        """Type in which it is stored."""

    @abstractmethod
    def raw(self) -> npt.NDArray[np.uint8]:
        """The stored bytes, read-only (shape ``(nbytes,)``)."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def numpy(self) -> npt.NDArray[Any]:
        """An array of its shape: a read-only view of the file, or decoded to ``float32`` where numpy has no such type.

        Raises
        ------
        TypeError
            If neither numpy nor ggml can read the type.
        """
        raw = self.raw()
        if dtypes.has_numpy(self.dtype):
            return raw.view(dtypes.numpy_dtype(self.dtype)).reshape(self.shape)
        return dtypes.from_bytes(raw, self.dtype, self.size).reshape(self.shape)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = np.asarray(self.numpy(), dtype)
        return array.copy() if copy else array

    def __repr__(self) -> str:
        return " ".join(filter(None, (f"<{type(self).__name__}", self.name, self.dtype.name, f"{self.shape}>")))


class RawTensor(StoredTensor):
    """Bytes that are a tensor already, such as :func:`quantize` returns.

    Parameters
    ----------
    data
        The bytes, ``(..., row_size)``, not copied.
    dtype
        What they are.
    shape
        The tensor's shape; default ``(..., n)`` by that of ``data``.

    Raises
    ------
    TypeError, ValueError
        If the bytes are not whole rows of that type.

    Examples
    --------
    >>> import ggml_cffi as ggml
    >>> RawTensor(ggml.quantize(np.ones((4, 64)), "q4_0"), "q4_0")
    <RawTensor Q4_0 (4, 64)>
    """

    def __init__(
        self, data: npt.NDArray[Any] | bytes, dtype: Type | str, shape: Sequence[int] | None = None, name: str = ""
    ) -> None:
        kind = dtypes.as_type(dtype)
        array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.ascontiguousarray(data)
        raw = array.reshape(-1).view(np.uint8)
        last = array.shape[-1] * array.itemsize if array.ndim else raw.size
        unit, block = dtypes.type_size(kind), dtypes.block_size(kind)
        if shape is None and last % unit:
            raise ValueError(f"rows of {last} bytes are no whole {kind.name} blocks of {unit} bytes")
        self._shape = (*array.shape[:-1], last // unit * block) if shape is None else check_shape(shape)
        row = dtypes.row_size(kind, self._shape[-1] if self._shape else 1)
        if row * prod(self._shape[:-1]) != raw.size:
            raise ValueError(f"{raw.size} bytes are not a {kind.name} tensor of shape {self._shape}")
        self._raw = raw
        self._raw.flags.writeable = False
        self._dtype, self._name = kind, name

    @property
    def name(self) -> str:
        """Its name, if it was given one."""
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
        """The bytes, read-only (shape ``(nbytes,)``)."""
        return self._raw


class LazyTensor:
    """A tensor whose values are made when it is written, and forgotten then.

    Parameters
    ----------
    shape
        Its sizes, in numpy's order.
    dtype
        Type to store it in.
    values
        Called once, without arguments; returns the array.

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


def readable(values: Any) -> StoredTensor | npt.NDArray[Any]:
    """``values`` as they can be stored: a :class:`StoredTensor` itself, anything else as an array.

    PyTorch's tensors are taken from wherever they are. Where numbers are ``bfloat16``, which numpy lacks, they become a
    :class:`RawTensor`.

    Raises
    ------
    TypeError
        If they are not numbers.
    """
    if isinstance(values, StoredTensor):
        return values
    if hasattr(values, "detach") and hasattr(values, "cpu"):
        values = values.detach().cpu()
    if str(getattr(values, "dtype", "")).endswith("bfloat16"):
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(values, torch.Tensor):
            return RawTensor(values.view(torch.int16).numpy(), Type.BF16, values.shape)
        return RawTensor(np.asarray(values).view(np.uint16), Type.BF16, values.shape)
    return dtypes.as_array(values)


def stored_type(source: StoredTensor | npt.NDArray[Any]) -> Type:
    """The type that ``source`` is stored in if none is said: its own; F32 for ``float64``."""
    if isinstance(source, StoredTensor):
        return source.dtype
    return Type.F32 if source.dtype == np.float64 else dtypes.as_type(source.dtype)
