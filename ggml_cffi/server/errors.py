"""Errors of the server in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any

from ggml_cffi.errors import BackendCrashedError, ClosedError, GgmlError, OutOfMemoryError


class ApiError(Exception):
    """An error that the client gets as JSON.

    Parameters
    ----------
    status
        HTTP status.
    message
        Text for the client.
    code
        Short name of the error, such as ``"model_not_found"``.
    param
        Field of the request that caused it.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response: a client may try again after a second where that can help."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class QueueFullError(GgmlError):
    """Error of a request that finds too many others waiting."""


class LoadingError(GgmlError):
    """Error of a model that cannot be loaded. Its cause tells why: the server's files and options, not the request."""


class StoppingError(GgmlError):
    """Error of the requests that the end of the server interrupts."""


def as_api_error(error: BaseException) -> ApiError:
    """Return the error for the client. Errors of its input are 400, those of the server have no details of its code."""
    if isinstance(error, ApiError):
        return error
    message = str(error) or type(error).__name__
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="rate_limit_exceeded")
    if isinstance(error, StoppingError | ClosedError):
        return ApiError(503, message, code="unavailable")
    if isinstance(error, BackendCrashedError):  # its message has the last lines of the process: they are in the log
        return ApiError(503, "the process of this model ended; a new one takes later requests", code="model_crashed")
    if isinstance(error, OutOfMemoryError):
        return ApiError(503, message, code="out_of_memory")
    if isinstance(error, ValueError | TypeError):
        return ApiError(400, message)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body of the request is nested too deeply")
    if isinstance(error, GgmlError):
        return ApiError(500, message)
    return ApiError(500, "internal error: the log of the server has the details")
