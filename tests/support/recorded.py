"""Recorded requests to a server with a small random model, and its replies without ids and times."""

from __future__ import annotations

import json
from typing import Any

from tests.support import DATA
from tests.support.http_server import Served

FILE = DATA / "server_requests.json"
#: Fields whose values differ from run to run.
_VARYING = {"id": "<id>", "item_id": "<id>", "created": "<time>", "created_at": "<time>", "version": "<version>"}


def normalize(value: Any) -> Any:
    """Return a reply without ids and times, and with numbers rounded."""
    if isinstance(value, dict):
        return {
            name: _VARYING[name] if name in _VARYING and item != "tiny" else normalize(item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [normalize(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


def reply(server: Served, request: dict[str, Any]) -> Any:
    """Send a request, and return the status and the reply: JSON, or the data of the events of a stream."""
    body = request.get("body")
    response = server.get(request["path"]) if body is None else server.post(request["path"], body)
    if not response.headers["content-type"].startswith("text/event-stream"):
        return {"status": response.status_code, "reply": normalize(response.json())}
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    events = [line if line == "[DONE]" else normalize(json.loads(line)) for line in data]
    return {"status": response.status_code, "events": events}
