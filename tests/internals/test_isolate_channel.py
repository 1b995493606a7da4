"""Blocks of an IPC channel: views at a time, reuse, and the end of idle blocks.

These tests look inside the channel, since values arrive unchanged in any case: a block that is never reused or freed
costs memory and file descriptors only.
"""

import gc

import numpy as np

from ggml_cffi.isolate import Worker
from tests.support import isolated

LARGE = np.arange(120_000, dtype=np.float32).reshape(300, 400)


def channel(worker):
    return worker._processes[0]._channel


def test_a_receiver_views_eight_blocks_at_most():
    """It copies the arrays of further messages, so that kept arrays hold few file descriptors."""
    with Worker(isolated.things) as worker:
        kept = []
        for i in range(30):
            kept.append(worker.same(np.full(20_000, i)))
        assert len(channel(worker)._viewed) == 8
        part = kept[0][5:7]
        del kept
        gc.collect()
        assert len(channel(worker)._viewed) == 1
    assert part.tolist() == [0, 0]


def test_blocks_are_reused_and_freed_when_idle():
    with Worker(isolated.things) as worker:
        blocks = channel(worker)._blocks
        for _ in range(20):
            worker.same(LARGE)
        assert len(blocks) == 2  # the argument of the next call finds the block of this answer still in use
        worker.same(np.zeros(1 << 20))
        assert len(blocks) == 3
        for _ in range(40):
            worker.same(1)
        assert not blocks
        assert (worker.same(LARGE) == LARGE).all()
    with Worker(isolated.things, np.zeros(1 << 20)) as worker:
        worker.same(1)
        assert not channel(worker)._free  # the block of the weights was freed
