"""Requests to an application of ASGI, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any


async def call(app: Any, path: str, body: Any, leaves_after: int | None = None) -> tuple[int, bytes]:
    """Send a request, and return the status and the body of the response.

    Parameters
    ----------
    app
        The application.
    path, body
        The request.
    leaves_after
        Number of messages after which the client leaves; None for one that stays.
    """
    data, sent, left = json.dumps(body).encode(), False, asyncio.Event()
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": data}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)
        if len(messages) == leaves_after:
            left.set()

    if leaves_after == 0:
        asyncio.get_running_loop().call_later(0.01, left.set)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path}
    scope |= {"query_string": b"", "headers": headers, "root_path": "", "scheme": "http", "state": {}}
    await app(scope, receive, send)
    left.set()
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages)
