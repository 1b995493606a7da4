"""The program of a worker process: it serves requests of the parent, one at a time."""

from __future__ import annotations

import faulthandler
import logging
import logging.handlers
import os
import pickle
import pkgutil
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

from ggml_cffi.isolate.channel import Channel, Packet, pack
from ggml_cffi.session.factory import open_product

_MAX_RECORD = 32 << 10  # characters of a log message, which must fit into one packet of the socket


def main(calls: int, logs: int, cancels: int) -> None:
    """Serve requests until the parent ends this process or dies itself.

    Parameters
    ----------
    calls, logs, cancels
        File descriptors of the sockets for requests, for log records, and for the numbers of streams to cancel.
    """
    faulthandler.enable(all_threads=False)  # a crash writes the Python traceback to stderr
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for fd in (calls, logs, cancels):
        os.set_inheritable(fd, False)
    connection, records, numbers = (socket.socket(fileno=fd) for fd in (calls, logs, cancels))
    # The parent takes their closing for the end of this process, so forked processes must not keep them open.
    for end in (connection, records, numbers):
        os.register_at_fork(after_in_child=end.close)
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    channel = Channel(connection)
    with ExitStack() as stack:
        server = _RequestServer(channel, records, stack)
        threading.Thread(target=server.cancel_streams, args=(numbers,), daemon=True).start()
        while server.serve():
            pass


def _die_with_parent(connection: socket.socket) -> None:
    """Kill this process once the parent's end of the connection closes, even during a call."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


class _ForwardingHandler(logging.handlers.QueueHandler):
    """A log handler that sends records to the parent."""

    def enqueue(self, record: logging.LogRecord) -> None:
        if len(record.msg) > _MAX_RECORD:
            record.msg = record.message = record.msg[:_MAX_RECORD] + " ..."
        self.queue.send(pickle.dumps(record.__dict__))  # type: ignore[attr-defined]


class _RequestServer:
    """The object that ``make`` returned, and its open streams. A request is the name of a method of this class."""

    def __init__(self, channel: Channel, logs: socket.socket, stack: ExitStack) -> None:
        self.channel, self.logs, self.stack = channel, logs, stack
        self.target: Any = None
        self.streams: dict[int, Iterator[Any]] = {}
        self.n_streams = 0

    def serve(self) -> bool:
        """Answer one request. Return False if no further request will come."""
        try:
            packet = self.channel.recv()
        except EOFError:
            return False
        tag, reply = packet.tag, self.answer(packet)
        del packet  # the parent reuses the shared memory once no array refers to it
        if reply is None:
            return False
        try:
            self.channel.send(tag, reply)
        except ConnectionError:
            return False
        except Exception as error:
            message = f"a {type(reply[1]).__name__} cannot be sent to the parent process: {error}"
            self.channel.send(tag, ("error", portable(TypeError(message))))
        return True

    def answer(self, packet: Packet) -> tuple[str, Any] | None:
        """Return the reply to a request, None if the request ends this process."""
        try:
            forgotten, command, *rest = packet.load()
            for number in forgotten:
                self.close(self.streams.pop(number))
            if command == "end":
                return None
            reply: tuple[str, Any] = getattr(self, command)(*rest)
            return reply
        except SystemExit:
            raise
        except BaseException as error:
            return "error", portable(error)

    # ------------------------------------------------------------------ requests

    def make(self, make: Any, args: tuple[Any, ...], levels: dict[str, int], disabled: int) -> tuple[str, Any]:
        """Set up logging as in the parent, and call ``make``."""
        logging.getLogger().addHandler(_ForwardingHandler(self.logs))  # type: ignore[arg-type]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.disable(disabled)
        logging.captureWarnings(True)
        if isinstance(make, str):
            make = pkgutil.resolve_name(make)
        self.target = open_product(make(*args), self.stack)
        return "value", None

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """Call the target's function of this name, or return its attribute if that is not callable."""
        if not isinstance(self.target, Mapping):
            found = attrgetter(name)(self.target)
        elif name in self.target:
            found = self.target[name]
        else:
            raise AttributeError(f"there is no {name!r}; there are {', '.join(map(str, self.target))}")
        if not callable(found):
            if args or kwargs:
                raise TypeError(f"{name!r} is a {type(found).__name__}, which cannot be called")
            return "value", found
        result = found(*args, **kwargs)
        if isinstance(result, AsyncIterator):
            raise TypeError(
                f"{name!r} returns an asynchronous iterator, which cannot leave its process: call a function that "
                "returns an iterator, such as a model's generate, and read it by async for"
            )
        if not isinstance(result, Iterator):
            return "value", result
        self.n_streams += 1
        self.streams[self.n_streams] = result
        return "stream", self.n_streams

    # ------------------------------------------------------------------ requests about a stream

    def of_stream(self, number: int, cancelled: bool, command: str, *rest: Any) -> tuple[str, Any]:
        """Answer a request about a stream: ``command`` is the name of a method below."""
        if cancelled:  # the number on the other socket may arrive later
            self.cancel(number)
        reply: tuple[str, Any] = getattr(self, command)(self.streams[number], *rest)
        return reply

    def next(self, stream: Iterator[Any]) -> tuple[str, Any]:
        """Return the next item."""
        for item in stream:
            return "value", item
        return "stop", None

    def attribute(self, stream: Iterator[Any], name: str) -> tuple[str, Any]:
        """Return an attribute; a method stays here."""
        found = getattr(stream, name)
        return ("method", None) if callable(found) else ("value", found)

    def method(self, stream: Iterator[Any], name: str, args: tuple[Any, ...], kwargs: Any) -> tuple[str, Any]:
        """Call a method."""
        return "value", getattr(stream, name)(*args, **kwargs)

    def close(self, stream: Iterator[Any]) -> tuple[str, Any]:
        """Close a stream. It stays for its attributes."""
        if hasattr(stream, "close"):
            stream.close()
        return "value", None

    def cancel_streams(self, numbers: socket.socket) -> None:
        """Cancel the streams whose numbers arrive, while this process may compute their next item."""
        while number := numbers.recv(8):
            self.cancel(int.from_bytes(number))

    def cancel(self, number: int) -> None:
        """Cancel a stream that has a method for it."""
        cancel = getattr(self.streams.get(number), "cancel", None)
        if cancel is not None:
            cancel()


def portable(error: BaseException) -> BaseException:
    """Return an exception that can be sent to the parent, with the traceback of ``error`` as a note.

    The exception is ``error`` itself if it can be pickled, else one of its nearest base class that can.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace)
    note = f"In the worker process {os.getpid()}:\n" + "".join(lines).rstrip()
    text = f"{type(error).__qualname__}: {error}"
    for base in type(error).__mro__:
        try:
            data, buffers = pack(error if base is type(error) else base(text))
            copy: BaseException = pickle.loads(data, buffers=buffers)
        except Exception:
            continue
        copy.add_note(note)
        return copy
    raise AssertionError("Exception can always be pickled")
