"""Reports of progress: callbacks that callers give, and notices of long work that no caller asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

#: Called with the bytes (or tokens) done and their total.
Progress = Callable[[int, int], None]

#: Shows a notice while its context manager is entered.
Display = Callable[[str], AbstractContextManager[object]]


@contextmanager
def _log(text: str) -> Iterator[None]:
    import logging  # imported with the C library, not with this package

    logging.getLogger("ggml_cffi").info("%s", text)
    yield


_display: Display = _log


def notice(text: str) -> AbstractContextManager[object]:
    """Return a context manager that tells the user about work that takes seconds and is done once, while it is done.

    By default the text goes to the logger ``ggml_cffi`` at level INFO.
    """
    return _display(text)


@contextmanager
def display_notices(display: Display) -> Iterator[None]:
    """Show notices by ``display`` in this block, instead of logging them. For the command line."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before
