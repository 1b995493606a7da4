"""Exceptions of this package.

Wrong arguments raise the built-in ``ValueError``, ``TypeError`` or ``IndexError``. A failure of the C library, or a
request that would make it fail, raises one of these.
"""

from __future__ import annotations

from collections.abc import Iterable


def missing_extra(purpose: str, package: str, extra: str) -> ImportError:
    """Return the error for a package that is not installed, and that an extra of this package has.

    Parameters
    ----------
    purpose
        The subject of the sentence, such as ``"reading safetensors"``.
    package
        Its name on PyPI.
    extra
        The extra in ``pyproject.toml``.
    """
    return ImportError(
        f"{purpose} needs {package}, of the extra {extra}: pip install '.[{extra}]' in a checkout, "
        f"pip install './ggml_cffi-....whl[{extra}]' with a wheel",
        name=package,
    )


class GgmlError(Exception):
    """A failure in ggml; base of the other exceptions."""


class LibraryNotFoundError(GgmlError, ImportError):
    """No usable libggml or plug-in was found. The message lists every place that was tried."""


class LibraryMismatchError(LibraryNotFoundError):
    """A libggml was found, but of another version than this package needs."""


class OutOfMemoryError(GgmlError, MemoryError):
    """A device or the host has not enough memory for a buffer."""


class UnsupportedOpError(GgmlError):
    """No backend of a scheduler can run a node."""


class AbortedError(GgmlError):
    """A run was stopped on request."""


class ClosedError(GgmlError):
    """An object was used after it had been closed."""


class FormatError(GgmlError, ValueError):
    """A file does not have the format that it claims to have, or is cut short."""


class BackendCrashedError(GgmlError):
    """A worker process died (crashed or killed), or the connection to the server of a remote device was lost.

    Parameters
    ----------
    message
        The event, with the last lines that the process wrote.
    exitcode
        The process's exit status; minus the number of the signal that killed it.
    log
        The last lines that it logged or wrote to stderr, more than the message has.
    """

    def __init__(self, message: str = "", *, exitcode: int | None = None, log: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.log = tuple(log)


class BackendTimeoutError(BackendCrashedError, TimeoutError):
    """A worker process did not answer in time, and was killed."""


class RemoteError(GgmlError, ConnectionError):
    """The server of a remote device cannot be reached, or cannot be used."""
