"""Requests of each kind leave no objects behind, whether they end well, are refused, or their client leaves."""

import asyncio
import gc
from collections import Counter
from itertools import pairwise

import pytest

from ggml_cffi.server import Catalog, ModelSpec, create_app
from tests.support.asgi import call

N = 16
TEXT = {"prompt": "abc", "max_tokens": 3, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "ignore_eos": True}
LONG = {"prompt": "abc " * 40, "max_tokens": 400, "ignore_eos": True}
JSON = {"response_format": {"type": "json_object"}}
#: Path, body, and the number of messages after which the client leaves; None for one that stays.
REQUESTS = [
    ("/v1/completions", {**TEXT, "stream": True}, None),
    ("/v1/completions", {**TEXT, "prompt": ["abc", "abd"], "n": 2, "logprobs": 2}, None),
    ("/v1/completions", {**TEXT, "prompt": ["abc", "abd"], "n": 2, "stream": True}, None),
    ("/v1/completions", {**TEXT, "temperature": -1}, None),
    ("/v1/completions", {**TEXT, "prompt": "x" * 600, "stream": True}, None),
    ("/v1/completions", LONG, 0),
    ("/v1/completions", {**LONG, "stream": True}, 0),
    ("/v1/completions", {**LONG, "stream": True, "n": 3}, 3),
    ("/v1/chat/completions", {**CHAT, "stream": True, "logprobs": True}, None),
    ("/v1/chat/completions", {**CHAT, **JSON, "n": 2}, None),
    ("/v1/chat/completions", {**CHAT, **JSON, "max_tokens": 300, "stream": True}, 2),
    ("/v1/responses", {"input": "abc", "max_output_tokens": 3, "stream": True}, None),
    ("/v1/embeddings", {"input": ["abc", "abcd"]}, None),
    ("/v1/embeddings", {"input": ["abc " * 40] * 40}, 0),
    ("/tokenize", {"prompt": "abc"}, None),
    ("/nothing", {}, None),
]


def count():
    """Return the number of objects of each type."""
    gc.collect()
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())


@pytest.mark.parametrize("isolate", [False, True], ids=["here", "in a process"])
def test_requests_leave_no_objects(tiny, isolate):
    async def measure():
        async def requests():
            for _ in range(N):
                await asyncio.gather(*(call(app, *request) for request in REQUESTS))
            while any(engine.n_running + engine.n_waiting for engine in (loaded.engine for loaded in catalog.loaded)):
                await asyncio.sleep(0.01)

        counts = []
        for _ in range(4):
            await requests()
            counts.append(count())
        grown = [{name for name in after if after[name] - before[name] >= N} for before, after in pairwise(counts)]
        return set.intersection(*grown)  # a cache grows once, and no type may grow each time

    options = {"devices": ["CPU"], "n_ctx": 512, "n_threads": 1}
    with Catalog({"tiny": ModelSpec(tiny, options)}, parallel=4, isolate=isolate) as catalog:
        app = create_app(catalog)
        assert not asyncio.run(measure())
