"""A blocking iterator in asyncio: its items, its errors and its end."""

import asyncio
import threading
import time

import pytest

from ggml_cffi.core.async_items import AsyncItems
from tests.support import run_python


class Blocking:
    """An iterator of numbers, whose later ones wait until it is released or cancelled."""

    def __init__(self, n_free):
        self.n_free, self.n, self.threads = n_free, 0, set()
        self.go_on, self.cancelled = threading.Event(), False

    def __iter__(self):
        return self

    def __next__(self):
        self.threads.add(threading.get_ident())
        if self.n >= self.n_free:
            assert self.go_on.wait(60)
        if self.cancelled:
            raise StopIteration
        self.n += 1
        return self.n

    def cancel(self):
        self.cancelled = True
        self.go_on.set()


def test_items_come_from_one_other_thread():
    async def main():
        items = Blocking(3)
        found = AsyncItems(items, items.cancel)
        got = [await anext(found) for _ in range(3)]
        waiting = asyncio.ensure_future(anext(found))
        await asyncio.sleep(0)  # the event loop continues
        assert not waiting.done()
        items.cancel()
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert got == [1, 2, 3]
        assert len(items.threads) == 1
        assert threading.get_ident() not in items.threads

    asyncio.run(main())


def test_an_error_ends_the_items():
    def items():
        yield 1
        raise ValueError("enough")

    async def main():
        found = AsyncItems(items(), lambda: None)
        assert await anext(found) == 1
        with pytest.raises(ValueError, match="enough"):
            await anext(found)
        with pytest.raises(StopAsyncIteration):
            await anext(found)

    asyncio.run(main())


@pytest.mark.parametrize("by", ["task", "thread", "aclose"])
def test_cancelling_ends_the_items_and_the_wait(by):
    async def main():
        items = Blocking(1)
        found = AsyncItems(items, items.cancel)
        assert await anext(found) == 1
        waiting = asyncio.ensure_future(anext(found))
        await asyncio.sleep(0.01)
        if by == "task":
            waiting.cancel()
        elif by == "thread":
            threading.Thread(target=found.cancel).start()
        else:
            await found.aclose()
        with pytest.raises((StopAsyncIteration, asyncio.CancelledError)):
            await waiting
        assert items.cancelled
        with pytest.raises(StopAsyncIteration):
            await anext(found)

    asyncio.run(main())


def test_items_that_are_not_read_end_with_their_object():
    items = Blocking(10**9)

    async def main():
        async for n in AsyncItems(items, items.cancel):
            if n == 2:
                break

    asyncio.run(main())
    deadline = time.monotonic() + 60
    while not items.cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_end_with_the_event_loop():
    items = Blocking(1)
    kept = []

    async def main():
        kept.append(AsyncItems(items, items.cancel))
        await anext(kept[0])

    asyncio.run(main())
    items.n_free = 10**9
    items.go_on.set()
    deadline = time.monotonic() + 60
    while not items.cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    kept[0].cancel()  # no error without the loop


def test_a_forked_process_has_threads_of_its_own():
    code = (
        "import asyncio, os\n"
        "from ggml_cffi.core.async_items import AsyncItems\n"
        "async def total():\n"
        "    return sum([n async for n in AsyncItems(iter([1, 2, 3]), lambda: None)])\n"
        "print(asyncio.run(total()), flush=True)\n"
        "if not os.fork():\n"
        "    os._exit(asyncio.run(total()))\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    assert run_python(code).stdout.split() == ["6", "6"]
