"""Several answers at once in an ``asyncio`` program: they share each run of the model, and one is cancelled."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

from ggml_cffi import models

PROMPTS = {"The capital of France is": 12, "Water boils at": 8, "Once upon a time": 200}  # with max_tokens of each


async def stream(pieces: models.Stream[str]) -> AsyncIterator[str]:
    """Iterate ``pieces`` in a thread, so that the event loop continues. Leaving the iterator ends the request."""
    queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(item: str | Exception | None) -> None:
        if not pieces.cancelled:  # nobody reads the queue then, and the event loop may be closed
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def iterate() -> None:
        try:
            for piece in pieces:
                put(piece)
        except Exception as error:  # the reader raises it
            put(error)
        else:
            put(None)

    threading.Thread(target=iterate, daemon=True).start()
    try:
        while isinstance(item := await queue.get(), str):
            yield item
        if item is not None:
            raise item
    finally:
        pieces.cancel()


async def answer(model: models.Model, prompt: str, max_tokens: int, arrived: list[str]) -> str:
    """Return the whole answer, and append its pieces to ``arrived`` as they come."""
    async with aclosing(stream(model.generate(prompt, max_tokens))) as pieces:
        async for piece in pieces:
            arrived.append(piece)
    return "".join(arrived)


async def main() -> None:
    """Answer all prompts at once, and cancel the last and longest one."""
    with models.load(models.fetch("smollm2"), ["CPU"], n_ctx=256) as model:
        arrived: list[list[str]] = [[] for _ in PROMPTS]
        tasks = [
            asyncio.create_task(answer(model, prompt, n, pieces))
            for (prompt, n), pieces in zip(PROMPTS.items(), arrived, strict=True)
        ]
        while len(arrived[-1]) < 3:
            await asyncio.sleep(0.005)
        tasks[-1].cancel()
        *answers, last = await asyncio.gather(*tasks, return_exceptions=True)

        for (prompt, n), text in zip(PROMPTS.items(), answers, strict=False):
            assert text == "".join(model.generate(prompt, n)), "the same as alone"
            print(f"{prompt}|{text!r}")
        *_, (prompt, n) = PROMPTS.items()
        assert isinstance(last, asyncio.CancelledError)
        assert len(arrived[-1]) < n
        print(f"{prompt}|{''.join(arrived[-1])!r}, cancelled after {len(arrived[-1])} pieces")


if __name__ == "__main__":
    asyncio.run(main())
