"""Models in a FastAPI application of your own: ``python examples/serve.py MODEL``.

``http://127.0.0.1:8000/llm/`` is the page for chats, and ``/llm/v1`` the address for clients of OpenAI's interface:
``curl 127.0.0.1:8000/llm/v1/completions --json '{"prompt": "The capital of France is"}'``.

Needs ``pip install '.[serve]'`` in the checkout. Without an application of your own, ``ggml-cffi serve`` does the same.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from ggml_cffi import server


def application(path: str, devices: list[str] | None) -> FastAPI:
    """Make an application with a route of its own, and the model under ``/llm``."""
    catalog = server.Catalog({"model": server.ModelSpec(path, {"devices": devices})})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with catalog:
            yield

    app = FastAPI(lifespan=lifespan)
    app.mount("/llm", server.create_app(catalog))

    @app.get("/summary")
    async def summary() -> dict[str, list[str]]:
        return {"models": catalog.names, "loaded": [loaded.name for loaded in catalog.loaded]}

    return app


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a model inside an application.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--devices", type=lambda text: text.split(","), help="default: every GPU, then the CPU")
    args = parser.parse_args()
    uvicorn.run(application(args.model, args.devices), port=args.port)


if __name__ == "__main__":
    main()
