"""Streams of events: a client that does not read, and generators that are closed early."""

import asyncio
from contextlib import aclosing

from ggml_cffi.server.sse import EventStream, merged


def test_a_client_that_does_not_read_keeps_no_model_in_use():
    async def main():
        ended, reads = asyncio.Event(), asyncio.Event()
        sent = []

        async def events():
            for i in range(1000):
                yield {"n": i}
            ended.set()

        async def send(message):
            await reads.wait()
            sent.append(message)

        async def receive():
            await asyncio.Event().wait()

        source = events()
        response = EventStream(await anext(source), source)
        serving = asyncio.create_task(response({"type": "http", "asgi": {}}, receive, send))
        await asyncio.wait_for(ended.wait(), 60)
        assert not sent
        reads.set()
        await serving
        return b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")

    lines = asyncio.run(main())
    assert lines == [f'data: {{"n": {i}}}' for i in range(1000)] + ["data: [DONE]", ""]


def test_the_end_of_merged_items_ends_their_generators():
    closed = []

    async def source(name):
        try:
            while True:
                yield name
                await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            closed.append(name)

    async def main(names):
        async with aclosing(merged([source(name) for name in names])) as items:
            async for number, name in items:
                assert names[number] == name
                break
        assert sorted(closed) == names
        closed.clear()

    asyncio.run(main(["a"]))
    asyncio.run(main(["a", "b"]))
