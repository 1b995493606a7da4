"""AMX, the matrix unit of some Intel processors: a trial of ggml's kernels in a process of its own.

On some machines the kernels end the process with a general protection fault, although processor and system offer AMX.
So the first model whose weights could be arranged for AMX has a child process multiply with each type of weights. A
file in the cache folder keeps the answer until the machine starts again or the library changes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ggml_cffi import c, ops
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.context import Context
from ggml_cffi.core.repack import repacked_memories
from ggml_cffi.enums import Type
from ggml_cffi.files.atomic_write import write_files
from ggml_cffi.models.fetch import cache_folder
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler

#: Types of weights whose products are faster with AMX. Those of Q6_K are slower (docs/tested.md).
TYPES = (Type.Q4_0, Type.Q4_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.IQ4_XS)

_ANSWERS = "works", "fails"
_SHAPE = 128, 512
_ROWS = 1, 3, 40  # one row has kernels of its own, and 40 rows are more than a block
_TOLERANCE = 1e-2  # of the largest element; both products round their rows to 8 bits
_PATIENCE = 60.0  # seconds
_WRONG = ArithmeticError.__name__
_START = """import sys
sys.path[:] = {path!r}
from ggml_cffi.models.runners.amx import check_products
check_products()
print("works")
"""
#: Set in the environment of the trial. A program other than Python that runs itself again makes no further trial.
_IN_TRIAL = "GGML_CFFI_AMX_TRIAL"
#: Signals by which kernels end a process. Others come from outside, such as that of a system short of memory.
_FAULTS = frozenset({signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGSEGV, getattr(signal, "SIGBUS", None)})

_logger = logging.getLogger("ggml_cffi.models")


@cache
def amx_works() -> bool:
    """Return whether ggml's products with AMX are right on this machine, by the first trial since it was started."""
    if "AMX" not in repacked_memories() or _IN_TRIAL in os.environ:
        return False
    key = _key()
    with suppress(OSError, ValueError, RuntimeError):  # the last one without a home folder
        known, answer = path().read_text(encoding="utf-8").rsplit(" ", 1)
        if known == key and answer in _ANSWERS:
            return answer == "works"
    reason, is_final = _try()
    if reason:
        _logger.warning("weights are not arranged for AMX: %s", reason)
    if key and is_final:
        _remember(f"{key} {_ANSWERS[bool(reason)]}")
    return not reason


def path() -> Path:
    """Return the path of the file with the answer of the last trial."""
    return cache_folder().parent / "amx.txt"


def check_products() -> None:
    """Multiply rows by weights of each type with AMX and without it.

    Raises
    ------
    ArithmeticError
        If a pair of products differs by more than roundings.
    """
    rng = np.random.default_rng(0)
    plain, amx = BufferType.of("CPU"), repacked_memories()["AMX"]
    with Backend("CPU", n_threads=2) as cpu:
        for dtype in TYPES:
            values = rng.standard_normal(_SHAPE, np.float32)
            for n_rows in _ROWS:
                rows = rng.standard_normal((n_rows, _SHAPE[1]), np.float32)
                want, got = (_multiply(cpu, memory, dtype, values, rows) for memory in (plain, amx))
                if not np.abs(got - want).max() <= _TOLERANCE * np.abs(want).max():
                    raise ArithmeticError(f"products of {n_rows} rows by {dtype.name} weights are wrong with AMX")


def _multiply(cpu: Backend, memory: BufferType, dtype: Type, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    with Context() as context:
        weight = context.new_tensor(dtype, values.shape)
        context.alloc(memory, [weight])
        weight.set(values)
        x = context.new_tensor(Type.F32, rows.shape)
        context.alloc(cpu.buffer_type, [x])
        x.set(rows)
        product = ops.mul_mat(weight, x)
        with Graph(product) as graph, Scheduler([cpu]) as scheduler:
            scheduler.alloc(graph)
            scheduler.compute(graph)
            return product.numpy()


def _try() -> tuple[str, bool]:
    """Run :func:`check_products` in a process of its own.

    Returns
    -------
    str
        The reason for which it failed; nothing if it did not.
    bool
        True if the products decided, False if another program or another time may give another answer.
    """
    import subprocess  # slow to import

    if not sys.executable or getattr(sys, "frozen", False):
        return f"the trial needs Python, but this program is {sys.executable or 'unknown'}", False
    code = _START.format(path=[*map(os.fspath, sys.path)])
    folder = c.library.location()
    place = {"GGML_CFFI_LIBRARY_PATH": folder} if folder else {}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PATIENCE,
            env={**os.environ, **place, _IN_TRIAL: "1"},
        )
    except OSError as error:
        return f"the trial could not be made ({error})", False
    except subprocess.TimeoutExpired:
        return f"the trial took more than {_PATIENCE:.0f} seconds", True
    if done.returncode < 0:
        number = -done.returncode
        return f"ggml's products with it end the process (signal {number})", number in _FAULTS
    if done.returncode == 0 and done.stdout.splitlines()[-1:] == ["works"]:
        return "", True
    reason = (done.stderr.strip().splitlines() or ["the trial failed"])[-1]
    return reason, reason.startswith(_WRONG)


def _key() -> str:
    """Return a text that changes with the library and with each start of the machine; nothing if these are unknown."""
    file = c.library.cpu_file()
    with suppress(OSError):
        about = os.stat(file)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{file} {about.st_size} {about.st_mtime_ns} {boot}"
    return ""


def _remember(answer: str) -> None:
    """Write the file, whole or not at all. If it cannot be written, the next process tries again."""

    def write(_: int, file: BinaryIO) -> None:
        file.write(answer.encode())

    with suppress(OSError, RuntimeError):
        path().parent.mkdir(parents=True, exist_ok=True)
        write_files([str(path())], write)
