"""What runs inside a worker process of :mod:`ggml_cffi.isolate`: calls come in, answers go out, one at a time."""

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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

from ggml_cffi.isolate.channel import Channel, Packet, pack
from ggml_cffi.session.factory import open_product

_LONGEST_RECORD = 32 << 10  # characters of a log message: more does not pass through the socket at once


def main(calls: int, logs: int) -> None:
    """Serve until the parent says that it is enough; killed when the parent dies."""
    faulthandler.enable(all_threads=False)  # a crash shows where Python was
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for fd in (calls, logs):
        os.set_inheritable(fd, False)
    connection, records = socket.socket(fileno=calls), socket.socket(fileno=logs)
    # The parent knows by their closing that this process has ended: processes forked from it must not hold them.
    for end in (connection, records):
        os.register_at_fork(after_in_child=end.close)
    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    channel = Channel(connection)
    with ExitStack() as stack:
        server = _Server(channel, records, stack)
        while server.serve():
            pass


def _die_with_parent(connection: socket.socket) -> None:
    """Wait for the other end to close, however the parent ends, and whatever this process is doing then."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


class _Forward(logging.handlers.QueueHandler):
    """Sends log records to the parent."""

    def enqueue(self, record: logging.LogRecord) -> None:
        if len(record.msg) > _LONGEST_RECORD:
            record.msg = record.message = record.msg[:_LONGEST_RECORD] + " ..."
        self.queue.send(pickle.dumps(record.__dict__))  # type: ignore[attr-defined]


class _Server:
    def __init__(self, channel: Channel, logs: socket.socket, stack: ExitStack) -> None:
        self.channel, self.logs, self.stack = channel, logs, stack
        self.made: Any = None
        self.streams: dict[int, Iterator[Any]] = {}
        self.n_streams = 0

    def serve(self) -> bool:
        """Answer one request. False when there are no more."""
        try:
            packet = self.channel.recv()
        except EOFError:
            return False
        tag, reply = packet.tag, self.answer(packet)
        del packet  # the parent can use its memory again once nobody looks at it
        if reply is None:
            return False
        try:
            self.channel.send(tag, reply)
        except ConnectionError:
            return False
        except Exception as error:
            what = f"a {type(reply[1]).__name__} cannot be sent to the parent process: {error}"
            self.channel.send(tag, ("error", portable(TypeError(what))))
        return True

    def answer(self, packet: Packet) -> tuple[str, Any] | None:
        try:
            forgotten, what, *rest = packet.load()
            for number in forgotten:
                self.drop(number)
            if what == "end":
                return None
            reply: tuple[str, Any] = getattr(self, what)(*rest)
            return reply
        except SystemExit:
            raise
        except BaseException as error:
            return "error", portable(error)

    # ------------------------------------------------------------------ requests

    def make(self, make: Any, args: tuple[Any, ...], levels: dict[str, int], disabled: int) -> tuple[str, Any]:
        """Make what is called later."""
        logging.getLogger().addHandler(_Forward(self.logs))  # type: ignore[arg-type]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.disable(disabled)
        logging.captureWarnings(True)
        if isinstance(make, str):
            make = pkgutil.resolve_name(make)
        self.made = open_product(make(*args), self.stack)
        return "value", None

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, Any]:
        """Call what ``made`` has by this name, or get it where it is no function."""
        if not isinstance(self.made, Mapping):
            found = attrgetter(name)(self.made)
        elif name in self.made:
            found = self.made[name]
        else:
            raise AttributeError(f"there is no {name!r}; there are {', '.join(map(str, self.made))}")
        if not callable(found):
            if args or kwargs:
                raise TypeError(f"{name!r} is a {type(found).__name__}, which cannot be called")
            return "value", found
        result = found(*args, **kwargs)
        if not isinstance(result, Iterator):
            return "value", result
        self.n_streams += 1
        self.streams[self.n_streams] = result
        return "stream", self.n_streams

    def next(self, number: int) -> tuple[str, Any]:
        """The next piece of a stream."""
        stream = self.streams.pop(number)
        for piece in stream:
            self.streams[number] = stream  # not where it raised: then it is over
            return "value", piece
        return "stop", None

    def drop(self, number: int) -> tuple[str, Any]:
        """Close a stream."""
        stream = self.streams.pop(number, None)
        if stream is not None and hasattr(stream, "close"):
            stream.close()
        return "value", None


def portable(error: BaseException) -> BaseException:
    """``error``, with its traceback as a note, as the parent can have it: itself, or as its nearest base that can."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace)
    note = f"In the worker process {os.getpid()}:\n" + "".join(lines).rstrip()
    text = f"{type(error).__qualname__}: {error}"
    for kind in type(error).__mro__:
        try:
            data, buffers = pack(error if kind is type(error) else kind(text))
            copy: BaseException = pickle.loads(data, buffers=buffers)
        except Exception:
            continue
        copy.add_note(note)
        return copy
    raise AssertionError("Exception can always be pickled")
