"""`create_app`: the application, for uvicorn, or to be mounted in another one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import ggml_cffi
from ggml_cffi.core.numbers import as_integer
from ggml_cffi.core.text import parse_size
from ggml_cffi.server import chat, completions, embeddings, responses, system, tokens
from ggml_cffi.server.catalog import Catalog, ModelSpec
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.limits import BODY_TOO_LARGE, Limits
from ggml_cffi.server.metrics import Metrics
from ggml_cffi.server.service import Service
from ggml_cffi.server.sse import ClientLeftError, log_error


def create_app(
    models: Catalog | Mapping[str, ModelSpec | str | os.PathLike[str]],
    *,
    api_keys: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    max_prompt: int | None = None,
    max_body: int | str = "8M",
    body_seconds: float = 30.0,
    **options: Any,
) -> FastAPI:
    """Return an application with OpenAI's interface to models.

    Parameters
    ----------
    models
        The models by name: paths of GGUF files, or :class:`ModelSpec`. Or a :class:`Catalog`, which the caller closes:
        for an application that is mounted in another one, whose lifespan does not reach it.
    api_keys
        Keys, of which each request needs one; none for an open server. A key must not be empty.
    cors_origins
        Origins of other pages that may use the server from a browser; ``"*"`` for all.
    max_prompt
        Largest number of tokens of a prompt; default the context of the model.
    max_body
        Largest number of bytes of a request's body.
    body_seconds
        Longest time between two parts of a body.
    **options
        Arguments of :class:`Catalog`, if ``models`` is none.

    Raises
    ------
    TypeError, ValueError
        If an option is unknown or out of range.

    Examples
    --------
    >>> import uvicorn
    >>> uvicorn.run(create_app({"smollm2": "smollm2.gguf"}))  # doctest: +SKIP
    """
    if isinstance(models, Catalog) and options:
        raise TypeError(f"{', '.join(options)}: give these to Catalog")
    if any(not key.strip() for key in api_keys):
        raise ValueError("an API key is empty, so that everybody would have it: give another one, or none at all")
    if max_prompt is not None:
        as_integer("max_prompt", max_prompt, 1)
    if not body_seconds > 0:
        raise ValueError(f"body_seconds must be above 0, not {body_seconds}")
    own = not isinstance(models, Catalog)
    catalog = models if isinstance(models, Catalog) else Catalog(models, **options)
    service = Service(catalog, Metrics(catalog), max_prompt)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            if own:
                catalog.close()

    app = FastAPI(title="ggml_cffi", version=ggml_cffi.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.catalog = catalog
    for module in (chat, completions, embeddings, responses, tokens, system):
        app.include_router(module.router(service))
    _add_error_handlers(app)
    app.add_middleware(
        Limits,
        metrics=service.metrics,
        api_keys=list(api_keys),
        max_body=parse_size(max_body),
        body_seconds=body_seconds,
    )
    if cors_origins:
        app.add_middleware(  # OpenAI's client for browsers sends headers of its own
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of OpenAI's API, without a traceback."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            return _response(ApiError(400, "send JSON, with the header 'Content-Type: application/json'"))
        return _response(_describe(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            return _response(ApiError(error.status_code, f"there is no {request.method} {request.url.path!r:.200}"))
        code = BODY_TOO_LARGE if error.status_code == 413 else None
        return _response(ApiError(error.status_code, str(error.detail), code=code))

    @app.exception_handler(ClientLeftError)
    async def left(_: Request, _error: ClientLeftError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return _response(log_error(error))

    for kind in (ApiError, ggml_cffi.GgmlError, ValueError, TypeError, OSError):
        app.add_exception_handler(kind, failed)


def _response(error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


def _is_member(part: str | int) -> bool:
    """Return whether a part of a problem's place is a member of a union: each member has a problem of its own."""
    return part in ("str", "int", "NamedTool") or str(part).startswith(("list[", "dict[", "literal["))


def _describe(error: RequestValidationError) -> ApiError:
    """Return the first problem of a body, with its place. The given value is left out: it may be large, or not text."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body of the request is not valid JSON")
    place = ".".join(str(part) for part in first["loc"][1:] if not _is_member(part))
    text = str(first["msg"]).encode("utf-8", "replace").decode()
    place = place.encode("utf-8", "replace").decode()
    return ApiError(400, f"{place or 'body'}: {text}", param=place or None)
