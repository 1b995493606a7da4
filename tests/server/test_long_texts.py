"""Requests with long texts, whose tokens take a while to find, leave threads to the others."""

import asyncio
import json
import threading

import pytest

from ggml_cffi.server import Catalog, ModelSpec, create_app
from ggml_cffi.server.service import text_length
from tests.support import PATIENCE
from tests.support.asgi import call

LONG = "x" * 60_000
#: More than the threads of the loop's executor.
MANY = 40


@pytest.mark.parametrize("leaves_after", [None, 0], ids=["they stay", "they leave"])
def test_many_long_texts_leave_threads_to_short_ones(tiny, leaves_after):
    async def main():
        assert (await call(app, "/tokenize", {"prompt": "abc"}))[0] == 200  # the model is loaded
        text = catalog.loaded[0].text
        tokenize, working, most, ends = text.tokenize, 0, 0, threading.Event()

        def watched(prompt, **options):
            nonlocal working, most
            if len(prompt) == len(LONG):
                working += 1
                most = max(most, working)
                assert ends.wait(PATIENCE)
                working -= 1
            return tokenize(prompt, **options)

        text.tokenize = watched
        long = [
            asyncio.create_task(call(app, path, {field: LONG}, leaves_after))
            for path, field in (("/v1/completions", "prompt"), ("/v1/embeddings", "input"))
            for _ in range(MANY // 2)
        ]
        try:
            while not working:
                await asyncio.sleep(0.01)
            if leaves_after == 0:
                await asyncio.wait(long)
            found = [await asyncio.wait_for(call(app, "/tokenize", {"prompt": "abc"}), PATIENCE) for _ in range(3)]
            assert [json.loads(data)["count"] for _, data in found] == [3, 3, 3]
        finally:
            ends.set()
        statuses = {status for status, _ in await asyncio.gather(*long)}
        assert statuses == ({400} if leaves_after is None else {499})
        assert most == 1

    # A context that the long texts may fit.
    with Catalog({"tiny": ModelSpec(tiny, {"devices": ["CPU"], "n_ctx": 16384, "n_threads": 1})}) as catalog:
        app = create_app(catalog, max_prompt=100)
        asyncio.run(main())


@pytest.mark.parametrize(
    ("value", "n"),
    [("abc", 3), (["abc", 1, "d"], 5), ([[1], [2]], 2), (None, 0), ({"a": [{"b": "cd"}], "n": 1.5}, 2)],
)
def test_the_characters_and_token_ids_of_a_body_are_counted(value, n):
    assert text_length(value) == n


def test_the_characters_of_a_deep_body_are_counted():
    body = "ab"
    for _ in range(5000):
        body = [body]
    assert text_length(body) == 2
