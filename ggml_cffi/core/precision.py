"""Precision of matrix products: the names of defaults, and the products in which a device keeps F32 operands."""

from __future__ import annotations

from ggml_cffi.core.device import Device
from ggml_cffi.enums import Prec

_NAMES = {"default": Prec.DEFAULT, "f32": Prec.F32}
_EXACT = frozenset({"CPU", "BLAS"})

#: Most rows of a matrix that ggml's Vulkan kernels multiply without rounding; kernels for more use tiles of F16.
FEW_ROWS = 8


def as_prec(precision: str) -> Prec:
    """Return the precision of products that ``precision`` names: ``"default"`` or ``"f32"``.

    Raises
    ------
    ValueError
        For anything else.
    """
    if not isinstance(precision, str) or precision not in _NAMES:
        raise ValueError(f'precision must be "default" or "f32", not {precision!r}')
    return _NAMES[precision]


def keeps_f32(device: Device, rows: int, matrices: int) -> bool:
    """Return whether ``device`` multiplies F32 operands without rounding them.

    ggml has no query for this: the answer is that of its kernels, and False for a backend that is not known here, such
    as a remote device's.

    Parameters
    ----------
    rows
        Rows of each matrix of ``b`` in ``b @ a.T``.
    matrices
        Number of matrices of ``b``.
    """
    if device.backend_name == "Vulkan":
        return rows == 1 or (rows <= FEW_ROWS and matrices == 1)
    return device.backend_name in _EXACT
