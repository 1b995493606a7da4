"""Peer access among CUDA devices: turned on before the CUDA plug-in loads, if all devices can reach one another.

With ``GGML_CUDA_P2P`` in the environment, ggml lets each device read and write the memory of the others, so that copies
between them need no memory of the host. ggml reads the variable when the plug-in is loaded and when it allocates.
"""

from __future__ import annotations

import os
import sys
from itertools import permutations
from typing import Any

#: ggml's environment variable: peer access is on if it is set, whatever its value.
VARIABLE = "GGML_CUDA_P2P"
#: Environment variable of this package: with the value 0, it leaves :data:`VARIABLE` as it is.
SWITCH = "GGML_CFFI_CUDA_P2P"

_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_all_reach = False
_state = ""


def turn_on() -> None:
    """Set the variable if there are several CUDA devices that all reach one another, unless the user has set it."""
    global _all_reach, _state
    given = VARIABLE in os.environ
    if not given and os.environ.get(SWITCH) == "0":
        _state = f"off: ${SWITCH} is 0"
        return
    _all_reach, found = _reachability()
    if _all_reach and found:
        os.environ.setdefault(VARIABLE, "1")
    if found:
        _state = f"{'on' if given or _all_reach else 'off'}: {found}{f' (${VARIABLE} is set)' if given else ''}"


def all_reach() -> bool:
    """Return whether each CUDA device reads and writes the memory of all others, as ggml has set it up."""
    return _all_reach


def state() -> str:
    """Return in words whether peer access is on, and why; empty if no CUDA plug-in was loaded, or for one device."""
    return _state


def _reachability() -> tuple[bool, str]:
    """Return whether all devices reach one another, and why; no reason for one device, which may be several of ggml's.

    The driver makes no context for this.
    """
    import ctypes  # only CUDA needs it

    try:
        driver = ctypes.CDLL(_DRIVER)
        n = ctypes.c_int()
        _check(driver.cuInit(0))
        _check(driver.cuDeviceGetCount(ctypes.byref(n)))
        if n.value < 2:
            return n.value == 1, ""
        devices = [ctypes.c_int() for _ in range(n.value)]
        for i, device in enumerate(devices):
            _check(driver.cuDeviceGet(ctypes.byref(device), i))
        for i, j in permutations(range(n.value), 2):
            if not _reaches(driver, devices[i], devices[j]):
                return False, f"CUDA device {i} cannot reach device {j}"
    except (OSError, AttributeError) as error:  # no driver, or not a complete one
        return False, f"the driver does not tell whether devices reach one another ({error})"
    return True, f"all {n.value} devices reach one another"


def _reaches(driver: Any, device: Any, peer: Any) -> bool:
    import ctypes

    can = ctypes.c_int()
    _check(driver.cuDeviceCanAccessPeer(ctypes.byref(can), device, peer))
    return bool(can.value)


def _check(code: int) -> None:
    if code:
        raise OSError(f"CUDA error {code}")
