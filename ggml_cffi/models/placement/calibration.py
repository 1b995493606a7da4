"""Speed of matrix products on a device: measured once for each type of weight, then stored in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, NamedTuple

import numpy as np

from ggml_cffi import ops
from ggml_cffi.c import library
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.context import Context
from ggml_cffi.core.progress import notice
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import Type
from ggml_cffi.files.atomic_write import write_files
from ggml_cffi.models.fetch import cache_folder
from ggml_cffi.models.placement.hypothetical import is_hypothetical
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

_SIZE, _SMALL = 4096, 256  # rows and columns of the weight; the small one for software devices
_TOKENS = (1, 512)  # of decode, and of prefill
_PRODUCTS = 8  # in one run
_PRODUCTS_ON_CPU = 64  # in one run of decode, with smaller weights
_RUNS = 5


class Speed(NamedTuple):
    """Seconds for each element of a weight and each token."""

    decode: float
    prefill: float


def seconds(backend: Backend, dtype: Type) -> float:
    """Return the seconds for each element of a weight and each token: the geometric mean of decode and prefill."""
    return float(np.sqrt(np.prod(speed(backend, dtype))))


def speed(backend: Backend, dtype: Type) -> Speed:
    """Return the speed of products with weights of a type.

    The first call measures. Later calls read ``calibration.json`` in the cache folder (``~/.cache/ggml_cffi``, or
    ``$GGML_CFFI_CACHE``), which has the results by the device's description, its backend and number of threads, the
    type and the version of ggml.
    """
    found = known_speed(backend, dtype)
    if found is None:
        with notice(f"measuring the speed of {backend.name} with {dtype.name}, once"):
            found = Speed(*(measure(backend, dtype, tokens) for tokens in _TOKENS))
        _remember(_known() | {key(backend, dtype): list(found)})
    return found


def known_speed(backend: Backend, dtype: Type) -> Speed | None:
    """Return the stored speed; None if it was not measured.

    A hypothetical device has the speed of a device with its description, by the backend that decodes fastest.
    """
    known, names = _known(), [key(backend, dtype)]
    if is_hypothetical(backend):
        start, end = f"{backend.device.description}, ", _ending(dtype)
        names = [name for name in known if name.startswith(start) and name.endswith(end)]
    stored = [_numbers(known.get(name)) for name in names]
    return min((Speed(*found) for found in stored if len(found) == len(_TOKENS) and all(found)), default=None)


def remembered(name: str, measure: Callable[[], list[float]]) -> list[float]:
    """Return the numbers stored as ``name``. If there are none, measure and store them."""
    name = f"{name}, ggml {library.version()}"
    found = _numbers(_known().get(name))
    if not found:
        with notice("timing the model for the fastest split, once"):
            found = measure()
        _remember(_known() | {name: found})
    return found


def key(backend: Backend, dtype: Type) -> str:
    """Return the name of a measurement: the device, its backend and threads, the type and the version of ggml."""
    threads = f", {backend.n_threads} threads" if backend.device.is_cpu else ""
    return f"{backend.device.description}, {backend.device.backend_name}{threads}{_ending(dtype)}"


def _ending(dtype: Type) -> str:
    return f", {dtype.name}, ggml {library.version()}"


def measure(backend: Backend, dtype: Type, tokens: int) -> float:
    """Return the seconds of a product, for each element of the weight and each token, in the fastest of a few runs.

    A run has several products, so that the time for submitting it counts little, and few caches hold all weights.
    """
    on_cpu = backend.device.is_cpu
    n = _SMALL if "llvmpipe" in backend.device.description else _SIZE if not on_cpu else _SIZE // 4
    n_products = _PRODUCTS_ON_CPU if on_cpu and tokens == 1 else _PRODUCTS
    with Context() as context:
        weights = [context.new_tensor(dtype, (n, n), name=f"weight {i}") for i in range(n_products)]
        context.alloc(backend.buffer_type, weights, usage=Usage.WEIGHTS)  # zeros take as long as other values
        x = context.new_tensor(Type.F32, (tokens, n), name="x")
        context.alloc(backend.buffer_type, [x])
        with Graph(*(ops.mul_mat(w, x) for w in weights)) as graph, Scheduler([backend]) as scheduler:
            scheduler.alloc(graph)
            scheduler.compute(graph)  # the first run compiles shaders
            times = []
            for _ in range(_RUNS):
                began = perf_counter()
                scheduler.compute(graph)
                times.append(perf_counter() - began)
    return max(min(times), 1e-9) / (n_products * n * n * tokens)


def path() -> Path:
    """Return the path of the file with the measurements."""
    return cache_folder().parent / "calibration.json"


def _known() -> dict[str, object]:
    """Return the file's contents; nothing if it is missing or malformed."""
    with suppress(OSError, ValueError):
        found = json.loads(path().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _numbers(stored: object) -> list[float]:
    """Return a list of finite numbers of 0 or more as it is, an empty one for anything else."""
    valid = isinstance(stored, list) and all(isinstance(x, float) and 0 <= x < np.inf for x in stored)
    return stored if isinstance(stored, list) and valid else []


def _remember(known: dict[str, object]) -> None:
    """Write the file, whole or not at all. If it cannot be written, the next call measures again."""

    def write(_: int, file: BinaryIO) -> None:
        file.write(json.dumps(known, indent=1).encode())

    with suppress(OSError):
        path().parent.mkdir(parents=True, exist_ok=True)
        write_files([str(path())], write)
