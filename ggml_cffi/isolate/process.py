"""One process of a worker, as the parent sees it: its start, its requests and its end."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from ggml_cffi.core.child_process import ChildProcess
from ggml_cffi.errors import BackendCrashedError, BackendTimeoutError, ClosedError, GgmlError
from ggml_cffi.isolate.channel import Channel

_SHOWN_LINES = 30
_EXIT_TIME = 10.0  # seconds that a process may take to end after it has closed its channel

_START = (
    "import sys; sys.path[:] = {path!r}; from ggml_cffi.isolate.child import main; main({calls}, {logs}, {cancels})"
)

_logger = logging.getLogger("ggml_cffi.isolate")


class WorkerProcess:
    """A child process with an IPC channel to it. Its log records and its stderr go to ``logging``.

    One thread at a time may send requests. Any thread may kill the process.

    Parameters
    ----------
    name
        The worker's name in messages and log records.
    env
        Environment variables to set.
    """

    def __init__(self, name: str, env: Mapping[str, str]) -> None:
        if not hasattr(os, "memfd_create"):
            raise GgmlError("worker processes need Linux: this system has no memfd_create")
        self.name = name
        self.forgotten: list[int] = []
        """Numbers of abandoned streams. The process closes them with the next request."""
        self.reason: str | None = None
        """The reason for which the parent ended the process, None if the process ended by itself."""
        self.closed = False
        """True if the worker was closed: the end of the process is not a crash then."""
        self._during: str | None = None
        self._tag = 0
        calls, child_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        logs, child_logs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._cancels, child_cancels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = [end.fileno() for end in (child_calls, child_logs, child_cancels)]
        code = _START.format(path=[*map(os.fspath, sys.path)], calls=fds[0], logs=fds[1], cancels=fds[2])
        self._channel = Channel(calls)
        try:
            self.child = ChildProcess(
                [sys.executable, "-c", code],
                name=name,
                capture="stderr",
                env=env,
                pass_fds=tuple(fds),
                on_line=partial(_logger.warning, "%s: %s", name),
                packets=logs,
                on_packet=partial(_handle_record, name),
                after_fork=self._close_sockets,
            )
        except BaseException:
            self._close_sockets()
            logs.close()
            raise
        finally:
            for end in (child_calls, child_logs, child_cancels):
                end.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self.child.pid

    @property
    def ended(self) -> bool:
        """True if the process has ended."""
        return not self.child.running

    def start(self, make: Callable[..., Any] | str, args: tuple[Any, ...], timeout: float | None) -> None:
        """Call ``make`` in the process, and end the process if that fails."""
        known = logging.root.manager.loggerDict.items()
        levels = {name: logger.level for name, logger in known if isinstance(logger, logging.Logger) and logger.level}
        levels[""] = logging.root.level
        try:
            self.request("make", make, args, levels, logging.root.manager.disable, during="make", timeout=timeout)
        except BaseException as error:
            self.reason = self.reason or f"could not call make: {type(error).__name__}: {error}"
            self.kill()
            self.dispose()
            raise
        self._channel.trim()  # the arguments of make are often weights, larger than any later message

    def request(self, command: str, *rest: Any, during: str, timeout: float | None) -> tuple[str, Any]:
        """Send a request and wait for its reply.

        Parameters
        ----------
        command, rest
            The name of a method of the request server in the process, and its arguments.
        during
            Name of the user's function, for messages.
        timeout
            Seconds after which the process is killed; None for no limit.

        Returns
        -------
        tuple
            ``("value", value)``, ``("stream", number)`` or ``("stop", None)``.

        Raises
        ------
        BackendCrashedError, BackendTimeoutError, ClosedError
            If the process ended, took too long, or was closed.
        TypeError
            If an argument cannot be pickled.
        Exception
            The exception that the request raised in the process.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        forgotten, self.forgotten = self.forgotten, []
        self._tag += 1
        try:
            self._send((forgotten, command, *rest), during)
            # Replies to earlier requests may still arrive: an exception interrupted the wait for them.
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
        status, value = packet.load()
        if status == "error":
            try:
                raise value
            finally:
                del value, packet  # the exception's traceback refers to this frame
        return status, value

    def _send(self, request: Any, during: str) -> None:
        try:
            self._channel.send(self._tag, request)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            subject = "make, or an argument of it," if during == "make" else f"an argument of {during!r}"
            raise TypeError(f"{subject} cannot be sent to another process: {error}") from error

    def cancel(self, number: int) -> None:
        """Cancel a stream, from any thread, also during a request."""
        with suppress(OSError):  # the process has ended
            self._cancels.send(number.to_bytes(8))

    # ------------------------------------------------------------------ the end of the process

    def error(self, error_type: type[BackendCrashedError] = BackendCrashedError) -> GgmlError:
        """Return the exception to raise for a process that has ended or is ending."""
        code = self.child.wait_or_kill(_EXIT_TIME)
        subject = f"the worker {self.name!r} (process {self.pid})"
        if self.closed:
            return ClosedError(f"{subject} was closed")
        when = f"during {self._during!r}" if self._during else "between two calls"
        lines = self.child.lines
        shown = "".join(f"\n    {line}" for line in lines[-_SHOWN_LINES:])
        output = f". The last lines that it wrote:{shown}" if lines else ". It wrote nothing before."
        reason = self.reason or f"{self.child.end_reason} {when}"
        return error_type(f"{subject} {reason}{output}", exitcode=code, log=lines)

    def kill(self) -> None:
        """Kill the process."""
        self.child.kill()

    def end(self, grace: float) -> None:
        """Ask the process to end, and kill it after ``grace`` seconds."""
        if not self.ended:
            with suppress(OSError):
                self._channel.send(0, (self.forgotten, "end"))
            self.child.wait_or_kill(grace)

    def dispose(self) -> None:
        """Wait for the end, and close the channel. No request may be running."""
        self.child.wait_or_kill(_EXIT_TIME)
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._channel.close()
        self._cancels.close()


def _handle_record(worker: str, data: bytes) -> str:
    """Pass a log record of the process to this process's loggers, and return it as a line."""
    try:
        record = logging.makeLogRecord(pickle.loads(data))
        record.processName = worker
        line = f"{record.levelname} {record.name}: {record.getMessage()}"
    except Exception as error:  # one broken record must not end the reading of later ones
        return f"a log record could not be read: {type(error).__name__}: {error}"
    try:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception as error:  # a filter of this process failed
        return f"{line} (a log record could not be passed on: {type(error).__name__}: {error})"
    return line
