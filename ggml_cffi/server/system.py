"""`/v1/models`, `/health`, `/metrics`, and the page for chats."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

import ggml_cffi
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.service import Service

_STATIC = Path(__file__).parent / "static"
#: Files of the page, each with its type.
_FILES = {"chat.js": "text/javascript", "chat.css": "text/css"}
#: The page loads nothing from other servers.
_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes, started = APIRouter(), int(time.time())

    def entry(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"id": name, "object": "model", "created": started, "owned_by": "ggml_cffi"}
        loaded = next((loaded for loaded in service.catalog.loaded if loaded.name == name), None)
        found["loaded"] = loaded is not None
        if loaded is not None:
            facts = loaded.engine.facts
            found |= {"max_model_len": facts.n_ctx, "generates": facts.generates, "devices": list(facts.devices)}
        return found

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in service.catalog.names]}

    @routes.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        if name not in service.catalog.names:
            raise ApiError(404, f"the model {name!r:.80} does not exist", code="model_not_found", param="model")
        return entry(name)

    @routes.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": ggml_cffi.__version__, "models": [entry(n) for n in service.catalog.names]}

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/")
    async def page() -> Response:
        return FileResponse(_STATIC / "index.html", headers={"Content-Security-Policy": _POLICY})

    @routes.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, f"there is no file {name!r:.80}")
        return FileResponse(_STATIC / name, media_type=_FILES[name])

    return routes
