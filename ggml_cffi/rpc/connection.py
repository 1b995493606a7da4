"""Connections to RPC servers: the lock of a server's devices, and the RPC proxy between ggml and the server.

ggml's RPC client has one socket for each server and no lock. It ends the process when the server is lost, or when a
signal interrupts it, and it does not wait for work that the server still computes. A :class:`Connection` is the missing
lock, blocks signals, and raises if the server is lost. All calls into ggml that concern the server are made within
``with connection:``.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import weakref
from _signal import pthread_sigmask  # type: ignore[import-not-found]  # signal.pthread_sigmask takes ten times as long
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ggml_cffi.core.child_process import ChildProcess
from ggml_cffi.core.locks import RemoteLock
from ggml_cffi.errors import BackendCrashedError, ClosedError, GgmlError
from ggml_cffi.rpc.protocol import DISCONNECT, STATE_SIZE, Version, version_text

# Signals from outside for which a program may have a handler. Any of them would make a call in C fail.
_NAMES = "ALRM", "CHLD", "CONT", "HUP", "INT", "IO", "PROF", "TERM", "URG", "USR1", "USR2", "VTALRM", "WINCH"
_SIGNALS = frozenset(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))

_CLOSE_TIME = 5.0  # seconds that the proxy may take to disconnect

# The proxy imports its two modules but not the package around them, whose __init__ would load ggml and numpy.
_START = """
import sys, types
for name, folder in {packages!r}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from ggml_cffi.rpc.proxy import main
main()
"""


class Connection(RemoteLock):
    """One server, reached through an RPC proxy of its own (:mod:`ggml_cffi.rpc.proxy`).

    A connection is a reentrant lock. ``with`` raises if the server is lost; ``acquire`` and ``release`` do not.

    Parameters
    ----------
    name
        The server in messages.
    server
        The connected socket after the handshake. The proxy inherits it, and this process closes its own copy.
    protocol
        The version of the protocol that ggml's client and the server speak.
    patience
        Seconds that the server may be silent while an answer is due.
    """

    def __init__(self, name: str, server: socket.socket, protocol: Version, patience: float) -> None:
        if not hasattr(os, "splice"):
            raise GgmlError("remote devices need Linux: this system has no splice")
        self.name = name
        self.ping: Callable[[], object] = lambda: None
        """A request that the server answers once it has done all earlier work."""
        self._lock = threading.RLock()
        self._depth = 0
        self._mask: set[int] = set()
        self._deferred: deque[Callable[[], None]] = deque()
        self._closed = False
        self._pid = os.getpid()
        with server, socket.socket() as listener, tempfile.TemporaryFile() as file:
            file.truncate(STATE_SIZE)
            self._state = mmap.mmap(file.fileno(), STATE_SIZE)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.proxy_endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
            """The proxy's address, to which ggml's client connects instead of the server's."""
            fds = [source.fileno() for source in (listener, server, file)]
            self.proxy = ChildProcess(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-c",
                    _proxy_program(),
                    *map(str, fds),
                    version_text(protocol),
                    str(patience),
                ],
                name=f"the proxy of {name}",
                lifeline=True,
                pass_fds=fds,
            )
        weakref.finalize(self, _end_proxy, self.proxy, self._lock, self._pid)

    # ------------------------------------------------------------------ as a lock

    def acquire(self, blocking: bool = True) -> bool:
        """Lock, and block signals in this thread. Return False if not ``blocking`` and another thread has the lock."""
        if not self._lock.acquire(blocking):
            return False
        self._depth += 1
        if self._depth == 1:
            self._mask = pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        return True

    def release(self) -> None:
        """Make the deferred calls, unlock, and unblock signals. A signal's handler may raise then."""
        mask = self._mask
        if self._depth == 1:
            self._make_deferred_calls()
        self._depth -= 1
        outermost = not self._depth
        self._lock.release()
        if outermost:
            pthread_sigmask(signal.SIG_SETMASK, mask)
            self._make_deferred_calls_if_unlocked()

    def __enter__(self) -> None:
        self.acquire()
        try:
            self.check()
        except BaseException:
            self.release()
            raise

    def __exit__(self, *_error: object) -> None:
        try:
            self.check()
        finally:
            self.release()

    # ------------------------------------------------------------------ the state of the server

    @property
    def usable(self) -> bool:
        """True if the server is connected, as far as is known without a request to it."""
        return not (self._state[0] or self._closed or self._pid != os.getpid() or self.broken)

    @property
    def broken(self) -> bool:
        """True if the proxy was killed: any call into ggml about this server would end this process."""
        return self.proxy.exit_code not in (None, 0)

    def check(self) -> None:
        """Raise if the server cannot be used.

        Raises
        ------
        BackendCrashedError
            If the server is lost.
        ClosedError
            If the server was disconnected.
        GgmlError
            If this process was forked from the one that connected.
        """
        if self._pid != os.getpid():
            raise GgmlError(f"{self.name} was connected before this process was forked: connect again in this process")
        if self._closed:
            raise ClosedError(f"{self.name} was disconnected")
        if self._state[0] or self.broken:
            reason = self._state[1:].split(b"\0", 1)[0].decode("utf-8", "replace") or "lost its proxy, which was killed"
            raise BackendCrashedError(
                f"{self.name}: the server {reason}. Its data is lost: close the objects that used it, start it again "
                f"(its output may show the reason), and open ggml_cffi.device({self.name!r}) anew"
            )

    def wait(self) -> None:
        """Wait until the server has finished all its work."""
        self.ping()

    def close(self) -> None:
        """Disconnect from the server. Objects that use it raise from now on, and can be closed."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        self.proxy.send(DISCONNECT)
        deadline = time.monotonic() + _CLOSE_TIME
        while not self._state[0] and self.proxy.running and time.monotonic() < deadline:
            time.sleep(0.001)
        # The proxy ends when ggml has closed its last connection, which objects of this server may keep open.
        threading.Thread(target=self.proxy.wait, daemon=True).start()

    # ------------------------------------------------------------------ freeing

    def free_later(self, call: Callable[[], None]) -> None:
        """Make a call once the lock is free: now, or when the thread that holds the lock releases it."""
        self._deferred.append(call)
        self._make_deferred_calls_if_unlocked()

    def _make_deferred_calls(self) -> None:
        while self._deferred:
            self._deferred.popleft()()

    def _make_deferred_calls_if_unlocked(self) -> None:
        # If another thread holds the lock, that thread makes the call: it checks the list after releasing the lock.
        while self._deferred and self.acquire(blocking=False):
            self.release()


def _proxy_program() -> str:
    folder = Path(__file__).resolve().parent
    return _START.format(packages=[("ggml_cffi", str(folder.parent)), ("ggml_cffi.rpc", str(folder))])


def _end_proxy(proxy: ChildProcess, lock: Any, pid: int) -> None:
    """End the proxy of a connection that nothing refers to, unless a thread still uses it at exit."""
    if pid == os.getpid() and lock.acquire(blocking=False):
        proxy.close_lifeline()
        proxy.kill()
        proxy.wait()
        lock.release()
