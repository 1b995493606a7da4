"""Streams in asyncio: the same answers as without it, and the end of a call from a task."""

import asyncio
import gc
import time
from contextlib import aclosing

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from tests.support.generation import batcher_of

FRANCE, WATER = "The capital of France is", "Water boils at"


@pytest.fixture(scope="module")
def model(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=2) as model:
        model.forward([1])  # the model keeps one graph from now on
        yield model


@pytest.fixture(autouse=True)
def no_objects_left_behind():
    """Disable the check for leaked objects: the tests share a model, which keeps its last graphs."""


def wait_until_idle(model):
    """Wait for the threads of cancelled calls, which may still end their last run."""
    deadline = time.monotonic() + 60
    while batcher_of(model).workload:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_tasks_get_the_answers_of_generate(model):
    want = [model.generate(prompt, 4).completion() for prompt in (FRANCE, WATER)]

    async def main():
        stream = model.agenerate(FRANCE, 4)
        assert (stream.prompt_tokens, stream.token_ids, stream.finish_reason) == (5, [], None)
        pieces, seen = [], []
        async for piece in stream:
            pieces.append(piece)
            seen.append((stream.token_ids, stream.finish_reason))
        assert "".join(pieces) == want[0].text
        # The thread reads ahead, but the attributes are those of the items that the task has.
        assert seen == [(list(want[0].token_ids[: i + 1]), None) for i in range(4)]
        assert (stream.finish_reason, stream.cancelled) == ("length", False)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        both = await asyncio.gather(*(model.agenerate(prompt, 4).completion() for prompt in (FRANCE, WATER)))
        together = await model.agenerate([FRANCE, WATER], 4).completions()
        with pytest.raises(ValueError, match="2 prompts"):
            await model.agenerate([FRANCE, WATER], 4).completion()
        numbered = [number async for number, _ in model.agenerate([FRANCE, WATER], 2)]
        assert sorted(numbered) == [0, 0, 1, 1]
        return both, together

    for found in asyncio.run(main()):
        assert [(c.text, c.token_ids, c.finish_reason) for c in found] == [
            (c.text, c.token_ids, c.finish_reason) for c in want
        ]


@pytest.mark.timeout(60)  # one of the tasks waited forever
@pytest.mark.parametrize("cancel", [False, True])
def test_several_tasks_may_await_one_stream(model, cancel):
    async def main():
        stream = await asyncio.to_thread(model.agenerate, FRANCE, 4)
        tasks = [asyncio.create_task(stream.completion()) for _ in range(3)]
        await asyncio.sleep(0)
        if cancel:
            stream.cancel()
        return await asyncio.gather(*tasks)

    reason = "cancelled" if cancel else "length"
    assert [completion.finish_reason for completion in asyncio.run(main())] == [reason] * 3
    wait_until_idle(model)


def test_a_cancelled_task_ends_its_call(model):
    async def main():
        streams = [model.agenerate("Once upon a time"), model.agenerate("A long story:")]
        task = asyncio.create_task(streams[0].completion())
        await anext(streams[1])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert streams[0].finish_reason == "cancelled"
        assert not streams[1].cancelled
        await anext(streams[1])
        streams[1].cancel()
        with pytest.raises(StopAsyncIteration):
            await anext(streams[1])
        assert (await streams[1].completion()).finish_reason == "cancelled"

    asyncio.run(main())
    wait_until_idle(model)


@pytest.mark.parametrize("leave", ["block", "aclosing", "deleted", "never begun"])
def test_leaving_a_stream_ends_its_call(model, leave):
    async def main():
        if leave == "block":
            async with model.agenerate("Once upon a time") as stream:
                await anext(stream)
            assert stream.cancelled
        elif leave == "aclosing":
            async with aclosing(model.agenerate("Once upon a time")) as stream:
                await anext(stream)
            assert stream.cancelled
        elif leave == "deleted":
            async for _ in model.agenerate("Once upon a time"):
                break
        else:
            model.agenerate("Once upon a time").cancel()

    asyncio.run(main())
    gc.collect()
    wait_until_idle(model)
    assert model.generate(FRANCE, 1).completion().text == " Paris"


def test_errors_reach_the_task(path):
    with models.load(path, ["CPU"], n_ctx=64) as model:
        with pytest.raises(TypeError, match="max_tokens must be an integer"):
            model.agenerate([1], "four")

        def fail_at_the_third(ids, logits):
            if len(ids) == 3:
                raise ZeroDivisionError("the third")

        async def main():
            stream = models.AsyncStream(
                model.generate_tokens([1], stop_at_end=False, logits_processors=[fail_at_the_third])
            )
            with pytest.raises(ZeroDivisionError, match="the third"):
                await stream.completion()
            assert (len(stream.token_ids), stream.finish_reason) == (2, None)

        asyncio.run(main())
        model.close()
        with pytest.raises(ggml.ClosedError):
            model.agenerate("Hello")
