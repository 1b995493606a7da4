"""Number of CPU threads: the default, and the check of a number that a caller gives."""

from __future__ import annotations

import os

from ggml_cffi import c


def default_threads() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(n: int) -> int:
    """Return ``n`` if it is a number of threads that a CPU backend can have.

    Raises
    ------
    ValueError
        If ``n`` is out of range.
    """
    if not isinstance(n, int) or not 1 <= n <= c.GGML_MAX_N_THREADS:
        raise ValueError(f"n_threads must be 1 to {c.GGML_MAX_N_THREADS}, not {n}")
    return n
