"""Child processes: started, watched and ended in one way by workers, RPC servers and RPC proxies.

All of them share these rules:

* A child is in a session of its own: Ctrl-C in a terminal reaches the parent only, and the parent decides what to stop.
* A child ends when its parent ends. It watches a lifeline, which is its standard input or a socket. However the parent
  ends, the lifeline closes. (``PR_SET_PDEATHSIG`` would end the child with the thread that started it.)
* A process that is forked from the parent closes its copies of the lifelines. They would otherwise keep the child alive
  after the parent.
* A thread reads the lines that the child writes, and keeps the last of them for error messages.

The three users differ in their lifeline and in their output, each for a reason:

* A worker's lifeline is the socket of its calls, because user code in it may read standard input. Its stderr is
  captured, together with a socket of log records, in one thread so that their order is kept.
* An RPC server's lifeline is standard input: it is the command ``ggml-cffi rpc-server``, which a shell can start as
  well. Both of its outputs are captured, because it announces its address on stdout.
* An RPC proxy's lifeline is standard input, which also carries one command. Its output is not captured: the proxy
  reports in shared memory, which saves a reading thread for each connection.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import IO, Literal

_KEPT_LINES = 200
_MAX_LINE = 4096  # bytes; longer lines are split
_MAX_PACKET = 1 << 18


class ChildProcess:
    """A process that this process has started. Any thread may kill it or wait for it.

    Parameters
    ----------
    command
        The program and its arguments.
    name
        Name of the child in thread names.
    capture
        The output whose lines are kept: ``"stderr"``, ``"output"`` for stdout and stderr together, None for neither.
        With ``"stderr"``, the child writes to the parent's stdout. With None, its stdout is discarded, and it writes
        to the parent's stderr.
    lifeline
        True to give the child a pipe as standard input that closes with this process; False for an empty one.
    env
        Environment variables to set, in addition to those of this process.
    pass_fds
        File descriptors that the child inherits.
    on_line
        Called in the reading thread with each captured line. It must not refer to this object, which could then never
        be garbage collected.
    packets, on_packet
        A socket whose other end only the child holds, and a function that is called in the reading thread with each
        packet. It returns a line to keep, or None. The reading thread then stops when this socket closes, even if
        processes that the child started still hold its stderr open.
    after_fork
        Called in processes that are forked from this one, to close their copies of other lifelines.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        name: str,
        capture: Literal["stderr", "output"] | None = None,
        lifeline: bool = False,
        env: Mapping[str, str] | None = None,
        pass_fds: Collection[int] = (),
        on_line: Callable[[str], object] | None = None,
        packets: socket.socket | None = None,
        on_packet: Callable[[bytes], str | None] | None = None,
        after_fork: Callable[[], object] | None = None,
    ) -> None:
        stdout: int | None = None
        if capture is None:
            stdout = subprocess.DEVNULL
        elif capture == "output":
            stdout = subprocess.PIPE
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if lifeline else subprocess.DEVNULL,
            stdout=stdout,
            stderr={"stderr": subprocess.PIPE, "output": subprocess.STDOUT, None: None}[capture],
            bufsize=0,
            pass_fds=tuple(pass_fds),
            env=None if env is None else {**os.environ, **env},
            start_new_session=True,
        )
        self._after_fork = after_fork
        self._reader: _OutputReader | None = None
        captured = self._popen.stdout if capture == "output" else self._popen.stderr
        if captured is not None:
            self._reader = _OutputReader(name, captured, on_line, packets, on_packet)
            self._reader.start()
        _children.add(self)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit status, the negative number of the signal that killed the process, None while it runs."""
        return self._popen.poll()

    @property
    def end_reason(self) -> str:
        """Description of the process's end: ``"exited with status 3"``, ``"was killed by SIGSEGV"``."""
        code = self.exit_code
        if code is None:
            return "is running"
        if code >= 0:
            return f"exited with status {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"

    @property
    def lines(self) -> list[str]:
        """The last captured lines, the oldest first. Complete once :meth:`wait_or_kill` has returned."""
        return list(self._reader.lines) if self._reader is not None else []

    def send(self, data: bytes) -> None:
        """Write to the child's standard input; do nothing if the child has closed it."""
        assert self._popen.stdin is not None
        with suppress(OSError):
            self._popen.stdin.write(data)

    def close_lifeline(self) -> None:
        """Close the child's standard input: a request to end."""
        if self._popen.stdin is not None:
            self._popen.stdin.close()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._popen.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._popen.kill()

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code. Captured lines may still be on their way."""
        return self._popen.wait()

    def wait_or_kill(self, grace: float) -> int:
        """Wait for the end, kill the process after ``grace`` seconds, and read the rest of its output.

        Returns
        -------
        int
            The exit code.
        """
        try:
            code = self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._popen.wait()
        if self._reader is not None and threading.current_thread() is not self._reader:
            self._reader.join()
        return code

    def _forked(self) -> None:
        self.close_lifeline()
        if self._after_fork is not None:
            self._after_fork()


_children: weakref.WeakSet[ChildProcess] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for child in list(_children):
        child._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _OutputReader(threading.Thread):
    """The thread that reads the captured output of a child, and its packets, until the child has ended."""

    def __init__(
        self,
        name: str,
        output: IO[bytes],
        on_line: Callable[[str], object] | None,
        packets: socket.socket | None,
        on_packet: Callable[[bytes], str | None] | None,
    ) -> None:
        super().__init__(name=f"ggml_cffi output of {name}", daemon=True)
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._output, self._on_line = output, on_line
        self._packets, self._on_packet = packets, on_packet
        self._partial = b""  # the beginning of a line
        self._ended = False
        os.set_blocking(output.fileno(), False)
        if packets is not None:
            packets.setblocking(False)

    def run(self) -> None:
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if self._packets is not None:
            poll.register(self._packets, select.POLLIN)
        running = True
        while running:
            ready = [fd for fd, _ in poll.poll()]
            written = self._read_output()
            # Packets first: the child sent them before it wrote these lines.
            running = self._read_packets() if self._packets is not None else not self._ended
            self._split(written)
            if self._ended and self._output.fileno() in ready:
                poll.unregister(self._output)
        while written := self._read_output():
            self._split(written)
        self._keep(self._partial)
        self._output.close()
        if self._packets is not None:
            self._packets.close()

    def _read_output(self) -> bytes:
        """Return the bytes that were written and not read yet."""
        try:
            data = os.read(self._output.fileno(), 1 << 16)
        except BlockingIOError:
            return b""
        self._ended = not data
        return data

    def _read_packets(self) -> bool:
        """Pass all packets that have arrived to ``on_packet``. Return False if no more will come."""
        assert self._packets is not None
        while True:
            try:
                data = self._packets.recv(_MAX_PACKET)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            line = self._on_packet(data) if self._on_packet is not None else None
            if line is not None:
                self.lines.append(line)

    def _split(self, written: bytes) -> None:
        *lines, self._partial = (self._partial + written).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._keep(line)
        if len(self._partial) > _MAX_LINE:
            self._keep(self._partial)
            self._partial = b""

    def _keep(self, raw: bytes) -> None:
        text = raw.decode("utf-8", "replace").rstrip()
        if text:
            self.lines.append(text)
            if self._on_line is not None:
                self._on_line(text)
