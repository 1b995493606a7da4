"""The connection to the server of remote devices, for the layers below :mod:`ggml_cffi.rpc`.

ggml's RPC client has one socket for each server and no lock, ends the process when the server is lost or when a signal
interrupts it, and takes no notice of what a server still computes. A :class:`Link` is the lock, keeps signals away, and
raises what became of the server: whatever talks to it does so within ``with link:``.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ggml_cffi.core.locks import RemoteLock
from ggml_cffi.errors import BackendCrashedError, ClosedError, GgmlError

if TYPE_CHECKING:
    import socket
    import subprocess

# Those that come from outside, and for which somebody may have a handler: the call that they interrupt fails.
_NAMES = "ALRM", "CHLD", "CONT", "HUP", "INT", "IO", "PROF", "TERM", "URG", "USR1", "USR2", "VTALRM", "WINCH"
_SIGNALS = frozenset(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))


class Link(RemoteLock):
    """One server, through a relay of our own (:mod:`ggml_cffi.rpc.proxy`).

    A reentrant lock: ``with`` it, or ``acquire`` and ``release``, which do not raise what became of the server.

    Parameters
    ----------
    name
        For messages.
    server
        A connected socket, the server greeted. It goes to the relay, and is closed here.
    patience
        Seconds that the server may be silent while an answer is due.
    """

    def __init__(self, name: str, server: socket.socket, patience: float) -> None:
        if not hasattr(os, "splice"):
            raise GgmlError("remote devices need Linux")
        # What takes long to import, or is only there, is imported when there is a server: _relay imports socket.
        import socket
        import subprocess
        import tempfile
        from _signal import pthread_sigmask  # type: ignore[import-not-found]  # signal's takes ten times as long

        from ggml_cffi.rpc import proxy

        self._set_mask: Callable[[int, Any], set[int]] = pthread_sigmask

        self.name = name
        self.ask: Callable[[], object] = lambda: None
        """A question that the server answers when it has done all its work."""
        self._lock = threading.RLock()
        self._depth = 0
        self._mask: set[int] = set()
        self._waiting: deque[Callable[[], None]] = deque()
        self._closed = False
        self._pid = os.getpid()
        with server, socket.socket() as listener, tempfile.TemporaryFile() as file:
            file.truncate(proxy.STATE_SIZE)
            self._state = mmap.mmap(file.fileno(), proxy.STATE_SIZE)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            self.local = f"127.0.0.1:{listener.getsockname()[1]}"
            """Where the relay is: what ggml's client takes for the server."""
            fds = [source.fileno() for source in (listener, server, file)]
            # In a group of its own: Ctrl-C in a terminal is for this process, which may still need the relay.
            self._relay = subprocess.Popen(
                [sys.executable, "-I", "-S", proxy.__file__, *map(str, fds), str(patience)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
                pass_fds=fds,
                process_group=0,
            )
        weakref.finalize(self, _end, self._relay, self._lock, self._pid)

    # ------------------------------------------------------------------ as a lock

    def acquire(self, blocking: bool = True) -> bool:
        """Lock, and keep signals away from this thread."""
        if not self._lock.acquire(blocking):
            return False
        self._depth += 1
        if self._depth == 1:
            self._mask = self._set_mask(signal.SIG_BLOCK, _SIGNALS)
        return True

    def release(self) -> None:
        """Unlock, and free what was given up meanwhile. What a signal raises comes last."""
        mask = self._mask
        if self._depth == 1:
            self._free()
        self._depth -= 1
        outermost = not self._depth
        self._lock.release()
        if outermost:
            self._set_mask(signal.SIG_SETMASK, mask)
            self._settle()

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

    # ------------------------------------------------------------------ the server's end

    @property
    def usable(self) -> bool:
        """Whether the server is there, as far as is known without asking."""
        return not (self._state[0] or self._closed or self._pid != os.getpid() or self.broken)

    @property
    def broken(self) -> bool:
        """Whether somebody ended the relay: any call would end this process then."""
        return self._relay.poll() not in (None, 0)

    def check(self) -> None:
        """Raise if the server is lost.

        Raises
        ------
        BackendCrashedError
            If it is.
        ClosedError
            If it was disconnected.
        GgmlError
            If the connection is another process's, which has forked this one.
        """
        if self._pid != os.getpid():
            raise GgmlError(f"{self.name} was connected before this process was forked: connect again in this one")
        if self._closed:
            raise ClosedError(f"{self.name} was disconnected")
        if self._state[0] or self.broken:
            reason = self._state[1:].split(b"\0", 1)[0].decode("utf-8", "replace") or "lost its relay, which was ended"
            raise BackendCrashedError(
                f"{self.name}: the server {reason}. What it held is gone: close what used it, start it again (its "
                f"output may say what happened), and open ggml_cffi.device({self.name!r}) anew"
            )

    def wait(self) -> None:
        """Wait until the server has done all its work."""
        self.ask()

    def close(self) -> None:
        """Let go of the server. What uses it raises from now on, and can be closed."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        assert self._relay.stdin
        with suppress(OSError):
            self._relay.stdin.write(b"d")
        end = time.monotonic() + 5
        while not self._state[0] and self._relay.poll() is None and time.monotonic() < end:
            time.sleep(0.001)
        # The relay ends once ggml has nothing left that belongs to the server.
        threading.Thread(target=self._relay.wait, daemon=True).start()

    # ------------------------------------------------------------------ freeing

    def free_later(self, call: Callable[[], None]) -> None:
        """Have ``call`` made by whoever talks to the server now, or here if nobody does."""
        self._waiting.append(call)
        self._settle()

    def _free(self) -> None:
        while self._waiting:
            self._waiting.popleft()()

    def _settle(self) -> None:
        # Whoever gives something up and finds the lock taken leaves it to its holder, who looks once more after that.
        while self._waiting and self.acquire(blocking=False):
            self.release()


def _end(relay: subprocess.Popen[bytes], lock: Any, pid: int) -> None:
    """End a relay that nobody needs. At exit, where a thread may still be talking, it ends with this process."""
    if pid == os.getpid() and lock.acquire(blocking=False):
        assert relay.stdin
        relay.stdin.close()
        relay.kill()
        relay.wait()
        lock.release()
