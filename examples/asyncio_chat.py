"""Several answers at once in an ``asyncio`` program: they share each run of the model, and one is cancelled."""

import asyncio

from ggml_cffi import models

PROMPTS = {"The capital of France is": 12, "Water boils at": 8, "Once upon a time": 200}  # with max_tokens of each


async def answer(model: models.Model, prompt: str, max_tokens: int, arrived: list[str]) -> models.Completion:
    """Return the whole answer, and append its pieces to ``arrived`` as they come."""
    stream = model.agenerate(prompt, max_tokens)
    async for piece in stream:
        arrived.append(piece)
    return await stream.completion()


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

        for (prompt, n), completion in zip(PROMPTS.items(), answers, strict=False):
            assert completion.text == "".join(model.generate(prompt, n)), "the same as alone"
            print(f"{prompt}|{completion.text!r}, {len(completion.token_ids)} tokens, {completion.finish_reason}")
        *_, (prompt, n) = PROMPTS.items()
        assert isinstance(last, asyncio.CancelledError)
        assert len(arrived[-1]) < n
        print(f"{prompt}|{''.join(arrived[-1])!r}, cancelled after {len(arrived[-1])} pieces")


if __name__ == "__main__":
    asyncio.run(main())
