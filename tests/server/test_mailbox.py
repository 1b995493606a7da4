"""Mailboxes: events of threads reach their tasks in order, and those of a step wake the loop once."""

import asyncio
import threading

from ggml_cffi.server.engine import Ended, Token
from ggml_cffi.server.mailbox import Lane, Mailbox, call_once, together


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def count_wake_ups(monkeypatch):
    """Return a list that grows with each call from another thread to the running loop."""
    loop, calls = asyncio.get_running_loop(), []
    call = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: (calls.append(given), call(*given)))
    return calls


def test_events_of_several_threads_arrive_in_the_order_of_each():
    async def main():
        mailboxes = [Mailbox() for _ in range(4)]

        def put(mailbox):
            for i in range(500):
                mailbox.put(Token(i))
            mailbox.put(Ended("stop"))

        async def read(mailbox):
            found = []
            while not isinstance((found := found + await mailbox.take())[-1], Ended):
                pass
            return found

        threads = [threading.Thread(target=put, args=(mailbox,)) for mailbox in mailboxes]
        for thread in threads:
            thread.start()
        return await asyncio.wait_for(asyncio.gather(*map(read, mailboxes)), 60)

    assert asyncio.run(main()) == [[*map(Token, range(500)), Ended("stop")]] * 4


def test_the_events_of_a_step_wake_the_loop_once(monkeypatch):
    async def main():
        calls, mailboxes = count_wake_ups(monkeypatch), [Mailbox() for _ in range(5)]

        def step():
            with together():
                for i, mailbox in enumerate(mailboxes):
                    mailbox.put(Token(i))
                assert not calls

        in_thread(step)
        assert len(calls) == 1
        assert [await mailbox.take() for mailbox in mailboxes] == [[Token(i)] for i in range(5)]
        in_thread(lambda: mailboxes[0].put(Token(9)))
        assert len(calls) == 2
        assert await mailboxes[0].take() == [Token(9)]

    asyncio.run(main())


def test_a_wake_up_is_called_once_for_a_step_and_at_once_otherwise():
    calls = []

    def wake():
        calls.append(1)

    with together():
        call_once(wake)
        call_once(wake)
        in_thread(lambda: call_once(wake))
        assert len(calls) == 1
    assert len(calls) == 2


def test_an_event_for_a_loop_that_has_ended_is_dropped():
    async def main():
        return Mailbox()

    mailbox = asyncio.run(main())
    mailbox.put(Token(1))
    with together():
        mailbox.put(Token(2))


def test_a_lane_gives_all_items_at_once_also_after_a_reader_was_cancelled():
    async def main():
        lane = Lane()
        reader = asyncio.create_task(lane.take())
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        lane.put(1)
        lane.put(2)
        assert await lane.take() == [1, 2]
        reader = asyncio.create_task(lane.take())
        await asyncio.sleep(0)
        lane.put(3)
        assert await asyncio.wait_for(reader, 60) == [3]

    asyncio.run(main())
