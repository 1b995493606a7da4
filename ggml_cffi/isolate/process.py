"""One process of a worker, seen from the parent: started, asked, listened to, ended."""

from __future__ import annotations

import logging
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, Any

from ggml_cffi.errors import BackendCrashedError, BackendTimeoutError, ClosedError, GgmlError
from ggml_cffi.isolate.channel import Channel

_KEPT_LINES = 200
_SHOWN_LINES = 30
_LONGEST_LINE = 4096
_DYING = 10.0  # seconds for a process to end after it has closed its connection

_START = "import sys; sys.path[:] = {path!r}; from ggml_cffi.isolate.child import main; main({calls}, {logs})"

_logger = logging.getLogger("ggml_cffi.isolate")


class Process:
    """A child process with a channel to it, and a thread that listens to what it logs.

    One thread at a time asks. Any thread may kill.
    """

    def __init__(self, name: str, env: Mapping[str, str]) -> None:
        if not hasattr(os, "memfd_create"):
            raise GgmlError("worker processes need Linux: there is no memfd_create here")
        self.name = name
        self.forgotten: list[int] = []
        """Numbers of streams that nobody will ask for again."""
        self.reason: str | None = None
        """Why this side ended it, None where it died by itself."""
        self.closed = False
        """Whether it was ended for good, which is no crash."""
        self._during: str | None = None
        self._tag = 0
        calls, their_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        logs, their_logs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = _START.format(path=[*map(os.fspath, sys.path)], calls=their_calls.fileno(), logs=their_logs.fileno())
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                pass_fds=(their_calls.fileno(), their_logs.fileno()),
                env={**os.environ, **env},
                start_new_session=True,  # Ctrl-C is for the parent, which decides
            )
        except BaseException:
            calls.close()
            logs.close()
            raise
        finally:
            their_calls.close()
            their_logs.close()
        assert self._popen.stderr is not None
        self._channel = Channel(calls)
        self._listener = _Listener(name, self._popen.stderr, logs)
        self._listener.start()
        _processes.add(self)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def dead(self) -> bool:
        """Whether it has ended."""
        return self._popen.poll() is not None

    def start(self, make: Callable[..., Any] | str, args: tuple[Any, ...], timeout: float | None) -> None:
        """Have it call ``make``; where that fails, it is ended."""
        known = logging.root.manager.loggerDict.items()
        levels = {name: logger.level for name, logger in known if isinstance(logger, logging.Logger) and logger.level}
        levels[""] = logging.root.level
        try:
            self.ask("make", make, args, levels, logging.root.manager.disable, during="make", timeout=timeout)
        except BaseException as error:
            self.reason = self.reason or f"could not make what it is for: {type(error).__name__}: {error}"
            self.kill()
            self.dispose()
            raise
        self._channel.trim()  # weights are larger than what comes later

    def ask(self, what: str, *rest: Any, during: str, timeout: float | None) -> tuple[str, Any]:
        """Send a request, and wait for the answer: a value, the number of a stream, or the end of one."""
        deadline = None if timeout is None else time.monotonic() + timeout
        forgotten, self.forgotten = self.forgotten, []
        self._tag += 1
        try:
            self._send((forgotten, what, *rest), during)
            # Answers to earlier questions are of nobody's interest: the wait for them was interrupted.
            while (packet := self._channel.recv(deadline)).tag != self._tag:
                pass
        except TimeoutError:
            self._during = during
            self.reason = self.reason or f"gave no answer to {during!r} within {timeout:g} s and was killed"
            self.kill()
            raise self.error(BackendTimeoutError) from None
        except (EOFError, ConnectionError):
            self._during = during
            raise self.error() from None
        kind, value = packet.load()
        if kind == "error":
            try:
                raise value
            finally:
                del value, packet  # whose traceback refers to this frame
        return kind, value

    def _send(self, request: Any, during: str) -> None:
        try:
            self._channel.send(self._tag, request)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            whose = "make, or an argument of it," if during == "make" else f"an argument of {during!r}"
            raise TypeError(f"{whose} cannot be sent to another process: {error}") from error

    # ------------------------------------------------------------------ its end

    def error(self, kind: type[BackendCrashedError] = BackendCrashedError) -> GgmlError:
        """What to raise now that it has ended, or is about to."""
        code = self._wait(_DYING)
        self._listener.finish()
        who = f"the worker {self.name!r} (process {self.pid})"
        if self.closed:
            return ClosedError(f"{who} was closed")
        when = f"during {self._during!r}" if self._during else "between two calls"
        lines = list(self._listener.lines)
        shown = "".join(f"\n    {line}" for line in lines[-_SHOWN_LINES:])
        said = f". The last lines that it wrote:{shown}" if lines else ". It wrote nothing before."
        return kind(f"{who} {self.reason or f'{_ended(code)} {when}'}{said}", exitcode=code, log=lines)

    def kill(self) -> None:
        """End it at once."""
        self._popen.kill()

    def end(self, grace: float) -> None:
        """Ask it to end, and kill it after ``grace`` seconds."""
        if not self.dead:
            with suppress(OSError):
                self._channel.send(0, (self.forgotten, "end"))
            self._wait(grace)

    def _wait(self, grace: float) -> int:
        try:
            return self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._popen.wait()

    def dispose(self) -> None:
        """Give up what is left of it. Nobody may be asking."""
        self._wait(_DYING)
        self._listener.finish()
        self._channel.close()


_processes: weakref.WeakSet[Process] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """A worker ends when its connection closes: a fork that lives on must not keep it open."""
    for process in list(_processes):
        process._channel.close()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _ended(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


class _Listener(threading.Thread):
    """Passes on what a process logs, and what it writes to stderr, and keeps the last lines."""

    def __init__(self, name: str, errors: IO[bytes], records: socket.socket) -> None:
        super().__init__(name=f"ggml_cffi listener of {name}", daemon=True)
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._worker, self._errors, self._records = name, errors, records
        self._rest = b""
        os.set_blocking(errors.fileno(), False)
        records.setblocking(False)

    def run(self) -> None:
        poll = select.poll()
        for source in (self._errors, self._records):
            poll.register(source, select.POLLIN)
        # Only the process itself has the other end of ``records``: when that closes, the process is gone. What it
        # started may still hold its stderr open.
        running = True
        while running:
            ready = [fd for fd, _ in poll.poll()]
            written = self._read_errors()
            running = self._pass_records()  # what was logged before that was written comes before it
            self._split(written)
            if not written and self._errors.fileno() in ready:  # closed
                poll.unregister(self._errors)
        while written := self._read_errors():
            self._split(written)
        self._line(self._rest)
        self._errors.close()
        self._records.close()

    def finish(self) -> None:
        """Wait until all is read, after the process has ended."""
        if threading.current_thread() is not self:
            self.join()

    def _pass_records(self) -> bool:
        """Pass on all log records that there are. False when there will be no more."""
        while True:
            try:
                data = self._records.recv(1 << 18)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            self._pass(data)

    def _pass(self, data: bytes) -> None:
        try:
            record = logging.makeLogRecord(pickle.loads(data))
            record.processName = self._worker
            self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")
            logger = logging.getLogger(record.name)
            if logger.isEnabledFor(record.levelno):
                logger.handle(record)
        except Exception as error:  # of what came with the record, or of a filter: the next one may do
            self.lines.append(f"a log record could not be passed on: {type(error).__name__}: {error}")

    def _read_errors(self) -> bytes:
        """What was written to stderr and not read yet."""
        try:
            return os.read(self._errors.fileno(), 1 << 16)
        except BlockingIOError:
            return b""

    def _split(self, written: bytes) -> None:
        *lines, self._rest = (self._rest + written).replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._rest) > _LONGEST_LINE:
            self._line(self._rest)
            self._rest = b""

    def _line(self, raw: bytes) -> None:
        text = raw.decode("utf-8", "replace").rstrip()
        if text:
            self.lines.append(text)
            _logger.warning("%s: %s", self._worker, text)
