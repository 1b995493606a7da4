"""Log messages of the C library, passed on to :mod:`logging` as logger ``ggml_cffi.ggml``."""

from __future__ import annotations

import atexit
import logging
import threading
from typing import Any

from ggml_cffi._decl import ffi
from ggml_cffi.enums import LogLevel

logger = logging.getLogger("ggml_cffi.ggml")

_LEVELS = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.DEBUG,  # ggml informs about every allocation: nothing that a user of Python asked to see
    LogLevel.WARN: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}
_line = threading.local()  # messages come in fragments, each thread's its own


@ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
def _receive(level: int, text: Any, _data: Any) -> None:
    if level != LogLevel.CONT:
        _line.level = _LEVELS.get(LogLevel(level), logging.DEBUG)
        _line.text = ""
    if not hasattr(_line, "level") or not logger.isEnabledFor(_line.level):
        return
    _line.text += ffi.string(text).decode("utf-8", "replace")
    if _line.text.endswith("\n"):
        logger.log(_line.level, "%s", _line.text.rstrip())
        _line.text = ""


def install(base: Any) -> None:
    """Route the messages of the loaded library ``base`` here, until the interpreter exits."""
    base.ggml_log_set(_receive, ffi.NULL)
    atexit.register(base.ggml_log_set, ffi.NULL, ffi.NULL)
