"""`/v1/embeddings` and `/v1/rerank`."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ggml_cffi.server.catalog import Loaded
from ggml_cffi.server.completions import prompt_ids
from ggml_cffi.server.engine import EmbedJob
from ggml_cffi.server.errors import ApiError
from ggml_cffi.server.generation import embed
from ggml_cffi.server.schemas import EmbeddingBody, RerankBody
from ggml_cffi.server.service import Json, Service, new_id
from ggml_cffi.server.sse import unless_client_leaves

#: Largest number of texts of a request.
_MAX_TEXTS = 2048


def router(service: Service) -> APIRouter:
    """Return the routes of embeddings."""
    routes = APIRouter()

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        return Json(await unless_client_leaves(request, _embeddings(service, body)))

    @routes.post("/v1/rerank")
    @routes.post("/rerank")
    async def rerank(body: RerankBody, request: Request) -> Response:
        return Json(await unless_client_leaves(request, _rerank(service, body)))

    return routes


async def _embeddings(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    async with service.catalog.use(body.model) as loaded:
        facts = loaded.engine.facts
        if body.dimensions not in (None, facts.n_embd):
            message = f"the vectors of {loaded.name!r} have {facts.n_embd} dimensions: leave dimensions out"
            raise ApiError(400, message, param="dimensions")
        ids = await service.in_thread(body, prompt_ids, loaded, body.input)
        vectors = await embed(loaded, EmbedJob(_check_texts(service, loaded, ids), body.pooling))
        _count(service, loaded, ids)
        data = [
            {"object": "embedding", "index": i, "embedding": _encode(vector, body.encoding_format)}
            for i, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": loaded.name, "usage": _usage(ids)}


async def _rerank(service: Service, body: RerankBody) -> dict[str, Any]:
    """Return the documents in the order of their similarity to the query: the cosine of their vectors."""
    async with service.catalog.use(body.model) as loaded:
        if loaded.engine.facts.generates:
            message = f"the model {loaded.name!r} generates text: reranking needs a model for embeddings"
            raise ApiError(400, message, param="model")
        texts = [_text_of(i, document) for i, document in enumerate(body.documents)]
        ids = await service.in_thread(body, prompt_ids, loaded, [body.query, *texts])
        query, *documents = await embed(loaded, EmbedJob(_check_texts(service, loaded, ids)))
        _count(service, loaded, ids)
        scores = np.asarray(documents) @ query
        order = np.argsort(-scores, kind="stable")[: body.top_n]
        results: list[dict[str, Any]] = [{"index": int(i), "relevance_score": float(scores[i])} for i in order]
        if body.return_documents is not False:
            results = [entry | {"document": {"text": texts[entry["index"]]}} for entry in results]
        return {"id": new_id("rerank-"), "model": loaded.name, "results": results, "usage": _usage(ids)}


def _text_of(i: int, document: str | dict[str, Any]) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise ApiError(400, f"documents[{i}] must be a text, or an object with 'text'", param="documents")
    return text


def _check_texts(service: Service, loaded: Loaded, texts: list[list[int]]) -> list[list[int]]:
    """Return the token ids of texts.

    Raises
    ------
    ApiError
        If the model cannot embed, or there are too many texts, or one has no tokens or too many.
    """
    limit = loaded.engine.facts.max_embed_tokens
    if not limit:
        message = f"the model {loaded.name!r} is split so that it cannot embed: load it with split='layer'"
        raise ApiError(400, message, param="model")
    if service.max_prompt is not None:
        limit = min(limit, service.max_prompt)
    if not 0 < len(texts) <= _MAX_TEXTS:
        raise ApiError(400, f"a request has 1 to {_MAX_TEXTS} texts, not {len(texts)}", param="input")
    for i, ids in enumerate(texts):
        if not ids:
            raise ApiError(400, f"text {i} has no tokens: there is nothing to embed", param="input")
        if len(ids) > limit:
            message = f"text {i} has {len(ids)} tokens, and the model embeds at most {limit}: divide the text"
            raise ApiError(400, message, code="context_length_exceeded", param="input")
    return texts


def _count(service: Service, loaded: Loaded, texts: list[list[int]]) -> None:
    service.metrics.prompt_tokens.labels(loaded.name).inc(sum(map(len, texts)))


def _encode(vector: npt.NDArray[np.float32], encoding: str | None) -> str | list[float]:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    values: list[float] = vector.tolist()
    return values


def _usage(texts: list[list[int]]) -> dict[str, int]:
    n = sum(map(len, texts))
    return {"prompt_tokens": n, "total_tokens": n}
