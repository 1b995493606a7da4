"""Log messages of the C library, which go to the logger ``ggml_cffi.ggml`` of :mod:`logging`."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ggml_cffi.c._decl import ffi
from ggml_cffi.enums import LogLevel

# Levels DEBUG, WARNING and ERROR of logging, a module that is imported with the library, not with this package.
_DEBUG, _WARNING, _ERROR = 10, 30, 40
_LEVELS = {
    LogLevel.DEBUG: _DEBUG,
    LogLevel.INFO: _DEBUG,  # ggml informs about every allocation, which is noise at INFO
    LogLevel.WARN: _WARNING,
    LogLevel.ERROR: _ERROR,
}
#: The beginning of the line that ggml prints for a number in ``GGML_VK_VISIBLE_DEVICES`` that no device has.
_MISSING_DEVICE = b"ggml_vulkan: Invalid device index"
#: Largest number of a device that a machine may have.
_LARGEST_NUMBER = 15

_logger: Any = None
_line = threading.local()  # messages come in fragments, separately on each thread


@ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
def _receive(level: int, text: Any, _data: Any) -> None:
    if level != LogLevel.CONT:
        _line.level = _LEVELS.get(LogLevel(level), _DEBUG)
        _line.text = ""
    captured = getattr(_line, "captured", None)
    if not hasattr(_line, "level") or (captured is None and not _logger.isEnabledFor(_line.level)):
        return
    _line.text += ffi.string(text).decode("utf-8", "replace")
    if _line.text.endswith("\n"):
        message = _line.text.rstrip()
        _line.text = ""
        if captured is not None:
            captured.append(message)
        _logger.log(_line.level if captured is None else _DEBUG, "%s", message)


@contextmanager
def captured() -> Iterator[list[str]]:
    """Collect the messages of this thread in a list. The log has them too, at level DEBUG."""
    outer, _line.captured = getattr(_line, "captured", None), []
    try:
        yield _line.captured
    finally:
        _line.captured = outer


@contextmanager
def without_missing_devices() -> Iterator[None]:
    """Keep ggml's complaint about a number in ``GGML_VK_VISIBLE_DEVICES`` that no device has off standard error.

    A number that no machine has, such as 99, means that no GPU is wanted, which is no error. The complaint goes to the
    log at level DEBUG. With other numbers, standard error is untouched: a driver may write there and abort.
    """
    numbers = os.environ.get("GGML_VK_VISIBLE_DEVICES", "").split(",")
    if not any(number.strip().isdecimal() and int(number) > _LARGEST_NUMBER for number in numbers):
        yield
        return
    import tempfile

    with tempfile.TemporaryFile() as printed:
        try:
            stderr = os.dup(2)
        except OSError:  # this process has no standard error
            yield
            return
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            printed.seek(0)
            for line in printed.read().splitlines(keepends=True):
                if line.startswith(_MISSING_DEVICE):
                    _logger.log(_DEBUG, "%s", line.decode("utf-8", "replace").rstrip())
                else:  # of another thread, perhaps
                    os.write(2, line)


def install(base: Any) -> None:
    """Route the messages of the loaded library ``base`` here, until the interpreter exits."""
    import logging

    global _logger
    _logger = logging.getLogger("ggml_cffi.ggml")
    base.ggml_log_set(_receive, ffi.NULL)
    atexit.register(base.ggml_log_set, ffi.NULL, ffi.NULL)
