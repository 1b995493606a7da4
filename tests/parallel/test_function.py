"""Compiled functions keep the most recently used programs."""

import numpy as np

from ggml_cffi import ops
from tests.support.ranks import Ranks


def test_the_last_used_programs_are_kept():
    with Ranks(1) as group:
        f = group.compile(lambda rank, x: ops.scale(x, 2.0))
        for n in range(1, 20):
            f(np.ones(n))
        assert len(f.programs) == 16
        last = f.programs[-1]
        assert f.trace(np.ones(19)) is last
        assert repr(last) == "<ParallelProgram of 1 steps on 1 devices, [2] nodes>"
        f.clear()
        assert not f.programs
        assert f(np.ones(3, np.float32)).tolist() == [2, 2, 2]
