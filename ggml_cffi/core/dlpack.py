"""Arrays of other libraries by DLPack, also those of bfloat16, a type that numpy does not have.

Source: https://dmlc.github.io/dlpack/latest/c_api.html.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

_UINT, _BFLOAT = 1, 4  # kinds of numbers: DLDataTypeCode


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


# Bytes before the DLTensor in each kind of capsule: nothing, or a version, two pointers and flags.
_CAPSULES = {b"dltensor": 0, b"dltensor_versioned": 32}


class _AsIntegers:
    """An array of another library whose bfloat16 numbers are given as integers of 16 bits."""

    def __init__(self, values: Any) -> None:
        self._values = values
        self.is_bfloat16 = False

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._values.__dlpack__(**options)
        tensor = _tensor_in(capsule)
        if tensor is not None and (tensor.code, tensor.bits, tensor.lanes) == (_BFLOAT, 16, 1):
            self.is_bfloat16 = True
            tensor.code = _UINT  # the capsule is ours: each call of __dlpack__ makes a new one
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._values.__dlpack_device__()


def _tensor_in(capsule: Any) -> _DLTensor | None:
    """Return the description of an array in a capsule, None if the capsule is of an unknown kind."""
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.argtypes, name_of.restype = [ctypes.py_object], ctypes.c_char_p
    pointer_of.argtypes, pointer_of.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    name = name_of(capsule)
    if name not in _CAPSULES:
        return None
    return _DLTensor.from_address(pointer_of(capsule, name) + _CAPSULES[name])


def read(values: Any) -> tuple[npt.NDArray[Any], bool]:
    """Return the array that ``values`` offers by DLPack, if possible without a copy.

    Returns
    -------
    tuple
        The array, and whether its ``uint16`` integers are the bits of bfloat16 numbers.

    Raises
    ------
    BufferError, RuntimeError
        If the values are not in host memory, or numpy cannot read them.
    """
    source = _AsIntegers(values)
    return np.from_dlpack(source), source.is_bfloat16
