"""Ctrl-C during a run on the CPU.

Python handles a signal only when the main thread returns from C, which may take long. Its C-level handler, however,
writes to a file descriptor at once (``signal.set_wakeup_fd``). A thread that waits for the descriptor tells the CPU's
backend to stop. The descriptor is set during a run only, on the main thread only, and never if another is set.
"""

from __future__ import annotations

import _thread
import os
import select
import signal
import threading
from collections.abc import Callable

_MAIN = threading.main_thread()
_stop: list[Callable[[], None]] = []
_pipe: tuple[int, int] | None = None
_pid = 0
_guard = threading.Lock()  # held while a signal is read and acted upon


def begin(stop: Callable[[], None]) -> bool:
    """Call ``stop`` on Ctrl-C until :func:`end`. Return False if that is not possible; then do not call ``end``."""
    if threading.current_thread() is not _MAIN:
        return False
    pipe = _pipe if _pipe is not None and _pid == os.getpid() else _listen()
    before = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
    if before not in (-1, pipe[1]):  # an exception of a signal handler may have left ours
        signal.set_wakeup_fd(before)
        return False
    with _guard:
        _stop.append(stop)
    return True


def end() -> None:
    """Undo the last :func:`begin`, and discard signals that have arrived since, so that they stop no later run."""
    with _guard:
        _stop.pop()
        if not _stop:
            signal.set_wakeup_fd(-1)
        if _pipe is not None:
            _read(_pipe[0])


def _listen() -> tuple[int, int]:
    global _pipe, _pid
    pipe = os.pipe()
    for fd in pipe:
        os.set_blocking(fd, False)
    _thread.start_new_thread(
        _watch, (pipe[0],)
    )  # a threading.Thread can fail if a signal's exception is raised at its start
    _pid, _pipe = os.getpid(), pipe  # last: a signal's exception before leaves no half of it
    return pipe


def _watch(source: int) -> None:
    while True:
        select.select([source], [], [])
        with _guard:
            # If the application has its own handler, Ctrl-C does not stop the run.
            if signal.SIGINT in _read(source) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                for stop in _stop:
                    stop()


def _read(source: int) -> bytes:
    try:
        return os.read(source, 64)
    except BlockingIOError:
        return b""
