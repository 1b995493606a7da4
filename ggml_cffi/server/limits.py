"""Middleware: the API key, the size and the time of a request's body, and the count of requests."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.metrics import Metrics

#: Paths without a key: a browser opens the page before it can send one.
_OPEN = ("/", "/health", "/static/chat.js", "/static/chat.css")

#: Code of the error for a body that is too large.
BODY_TOO_LARGE = "body_too_large"


class Limits:
    """Middleware that refuses requests before any of them is read.

    Parameters
    ----------
    app
        The application behind it.
    metrics
        Counts of requests.
    api_keys
        Keys, of which a request needs one; none for an open server.
    max_body
        Largest number of bytes of a body.
    body_seconds
        Longest time between two parts of a body.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_keys: Sequence[str], max_body: int, body_seconds: float
    ) -> None:
        self._app, self._metrics = app, metrics
        self._keys = [key.encode() for key in api_keys]
        self._max_body, self._body_seconds = max_body, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # of a client that left before the response

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            error = self._refusal(scope)
            if error is not None:
                await JSONResponse(error.body(), error.status, error.headers)(scope, receive, count)
            else:
                await self._app(scope, self._limited(receive), count)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._metrics.requests.labels(path, status).inc()
            self._metrics.request_seconds.labels(path).observe(time.monotonic() - start)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._keys and path not in _OPEN and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, so that the time does not tell which one is similar.
            known = [secrets.compare_digest(given.strip(), key) for key in self._keys]
            if scheme.lower() != b"bearer" or not any(known):
                message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                return ApiError(401, message, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body of a request may have {self._max_body} bytes", code=BODY_TOO_LARGE)

    def _limited(self, receive: Receive) -> Receive:
        """Return ``receive`` with limits, for bodies that do not tell their length or arrive slowly."""
        n, ended = 0, False

        async def limited() -> Message:
            nonlocal n, ended
            if ended:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), self._body_seconds)
            except TimeoutError:
                raise HTTPException(408, "the body of the request did not arrive in time") from None
            n += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if n > self._max_body:
                raise HTTPException(413, str(self._too_large()))  # FastAPI passes on no other exception
            return message

        return limited
