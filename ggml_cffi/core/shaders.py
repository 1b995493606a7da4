"""Notice of the shaders that a driver compiles when a device uses a kernel for the first time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from ggml_cffi.core.device import Device
from ggml_cffi.core.progress import notice

#: Seconds before the notice: shaders from the driver's cache take less.
DELAY = 1.0

_COMPILES = ("Vulkan", "Metal", "WebGPU")  # backends that compile kernels in the driver, by their names
_used: dict[Device, set[Any]] = {}  # kinds of nodes that a device has computed


@contextmanager
def first_run(devices: Iterable[Device], nodes: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Show a notice if the first run of a graph takes long and has kernels that are new to a device.

    ggml does not tell that a driver compiles. A long first run with kernels from the driver's cache has the notice too.

    Parameters
    ----------
    devices
        Devices that compute the graph, or parts of it.
    nodes
        Returns the nodes of the graph (C pointers). It is called if a device compiles shaders.
    """
    compiling = [d for d in devices if d.backend_name in _COMPILES]
    kinds = {_kind(p) for p in nodes()} if compiling else set()
    compiling = [d for d in compiling if kinds - _used.get(d, set())]
    if not compiling:
        yield
        return
    done = threading.Event()
    text = f"compiling shaders for {', '.join(d.name for d in compiling)}, once"
    thread = threading.Thread(target=_tell, args=(text, done), name="ggml_cffi notice", daemon=True)
    thread.start()
    try:
        yield
        for d in compiling:
            _used.setdefault(d, set()).update(kinds)
    finally:
        done.set()
        thread.join()


def _tell(text: str, done: threading.Event) -> None:
    if not done.wait(DELAY):
        with notice(text):
            done.wait()


def _kind(p: Any) -> tuple[int, ...]:
    """Return the operation, the operands' types, and whether it has one row: a backend has a kernel for each."""
    types = [src.type for src in (p.src[0], p.src[1]) if src]
    return (p.op, p.type, int(p.ne[1] == 1), *types)
