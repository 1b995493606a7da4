"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.chat import tool_dict
from ggml_cffi.server.completions import check_ids
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.schemas import DetokenizeBody, TokenizeBody
from ggml_cffi.server.service import Service


def router(service: Service) -> APIRouter:
    """Return the routes of tokens."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        async with service.catalog.use(body.model) as loaded:
            ids = await service.in_thread(body, _tokenize, loaded, body)
            return {"tokens": ids, "count": len(ids), "max_model_len": loaded.engine.facts.n_ctx}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        async with service.catalog.use(body.model) as loaded:
            return {"prompt": await service.in_thread(body, _detokenize, loaded, body)}

    return routes


def _tokenize(loaded: Loaded, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either 'prompt' or 'messages'")
    if body.prompt is not None:
        return loaded.text.tokenize(body.prompt, special=body.special is not False)
    tools = [tool_dict(tool) for tool in body.tools or []]
    return loaded.text.tokenize(body.messages or [], tools=tools or None)


def _detokenize(loaded: Loaded, body: DetokenizeBody) -> str:
    return loaded.text.detokenize(check_ids(loaded, body.tokens))
