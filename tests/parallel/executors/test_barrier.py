"""The barrier of the threads of devices."""

import threading

import pytest

from ggml_cffi.parallel.executors.barrier import Barrier


@pytest.mark.parametrize("n", [1, 2, 3])
def test_barrier(n):
    barrier, rounds = Barrier(n), 20
    at = [0] * n

    def run(who):
        for k in range(rounds):
            at[who] = k + 1
            barrier.wait(who, k)
            assert min(at) >= k + 1
        seen.append(who)

    seen = []
    for _ in range(2):
        made = [threading.Thread(target=run, args=(who,)) for who in range(n)]
        for thread in made:
            thread.start()
        for thread in made:
            thread.join()
        at[:] = [0] * n
    assert sorted(seen) == sorted([*range(n)] * 2)
