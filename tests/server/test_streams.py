"""Streams of events: a client that does not read, and generators that are closed early."""

import asyncio
import threading
from contextlib import aclosing

from ggml_cffi.models import SamplingParams
from ggml_cffi.server.catalog import Loaded, open_engine
from ggml_cffi.server.engine import Job
from ggml_cffi.server.generation import Generation
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


def test_the_end_of_the_loop_during_a_submission_reports_no_error(tiny):
    began, goes_on, problems = threading.Event(), threading.Event(), []

    def slowly(job, deliver):
        began.set()
        assert goes_on.wait(60)
        return submit(job, deliver)

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, problem: problems.append(problem))
        job = Job([1], SamplingParams(), 1)
        asking = asyncio.create_task(anext(Generation(loaded, job).pieces()))
        await asyncio.to_thread(began.wait, 60)
        asking.cancel()
        await asyncio.wait([asking])
        loop.call_soon(goes_on.set)

    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 64}, parallel=1, max_waiting=1) as engine:
        submit, engine.submit = engine.submit, slowly
        loaded = Loaded("m", engine.model, engine)
        asyncio.run(main())
    assert not problems


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
