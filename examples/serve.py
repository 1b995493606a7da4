"""A model behind HTTP, for several clients at once: ``python examples/serve.py MODEL``, and then for example

``curl -N 127.0.0.1:8000/generate --json '{"messages": [{"role": "user", "content": "Who are you?"}]}'``.

Needs ``pip install '.[serve]'`` in the checkout.
"""

import argparse
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import uvicorn
from asyncio_chat import stream
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from ggml_cffi import GgmlError, models


class Ask(BaseModel, extra="forbid"):
    """A request: ``prompt`` or ``messages``, and parameters of ``Model.generate``."""

    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    max_tokens: int | None = 256
    stream: bool = True
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: str | list[str] | None = None


def begin(model: models.Model, ask: Ask) -> tuple[int, models.Stream[str]]:
    """Return the number of the prompt's tokens, and the pieces of the answer."""
    if (ask.prompt is None) == (ask.messages is None):
        raise ValueError("give either a prompt or messages")
    prompt = model.apply_chat_template(ask.messages or []) if ask.prompt is None else ask.prompt
    options = ask.model_dump(exclude={"prompt", "messages", "stream"})
    return len(model.tokenize(prompt)), model.generate(prompt, **options)


async def events(n_prompt: int, pieces: models.Stream[str]) -> AsyncIterator[dict[str, Any]]:
    """Yield the pieces as they come, and the counts of tokens at the end."""
    async with aclosing(stream(pieces)) as arriving:  # a disconnect leaves the block, which ends the request
        async for piece in arriving:
            yield {"text": piece}
    yield {"done": True, "prompt_tokens": n_prompt, "tokens": pieces.timings.decoded_tokens}


async def lines(found: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Format server-sent events. An error is an event too, since the status has been sent already."""
    try:
        async with aclosing(found):
            async for event in found:
                yield f"data: {json.dumps(event)}\n\n"
    except GgmlError as error:
        yield f"data: {json.dumps({'error': str(error)})}\n\n"


def application(model: models.Model) -> FastAPI:
    """Make the server of ``model``."""
    app = FastAPI(title="ggml_cffi")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        devices = [placed.device for placed in model.placement]
        return {"status": "ok", "model": repr(model), "n_ctx": model.n_ctx, "devices": devices}

    @app.post("/generate")
    async def generate(ask: Ask, request: Request) -> Response:
        try:
            found = events(*await run_in_threadpool(begin, model, ask))
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from None
        if ask.stream:
            return StreamingResponse(lines(found), media_type="text/event-stream")
        text, event = "", {}
        async with aclosing(found):
            async for event in found:
                text += event.pop("text", "")
                if await request.is_disconnected():
                    break
        return JSONResponse({"text": text, **event})

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> Response:  # FastAPI's own handler cannot echo a NaN
        reasons = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": "; ".join(reasons)}, status_code=422)

    @app.exception_handler(GgmlError)
    async def failed(_: Request, error: GgmlError) -> Response:
        return JSONResponse({"detail": str(error)}, status_code=503)

    return app


def main() -> None:
    """Load the model, and serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a model.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--devices", type=lambda text: text.split(","), help="default: every GPU, then the CPU")
    parser.add_argument("--ctx", type=int, help="largest number of tokens of prompt and answer (default: up to 4096)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    args = parser.parse_args()
    with models.load(args.model, args.devices, n_ctx=args.ctx, n_threads=args.threads) as model:
        uvicorn.run(application(model), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
