"""Programs: joined results, and work of the caller during a run."""

import numpy as np
import pytest

from ggml_cffi import ops
from ggml_cffi.parallel import ROWS
from tests.support import relative_error
from tests.support.ranks import Ranks


def test_adjoining_parts_are_joined_without_a_copy(rng):
    w = rng.standard_normal((128, 32)).astype(np.float32)
    with Ranks() as group:
        parts = group.weight(w, ROWS)
        head = group.compile(lambda rank, x: rank.all_gather(ops.linear(x, parts[rank])))
        for n in (1, 3):
            x = rng.standard_normal((n, 32)).astype(np.float32)
            assert relative_error(head(x), x.astype(np.float64) @ w.T.astype(np.float64)) < 1e-5
            program = head.programs[-1]
            assert np.shares_memory(program.result(), program.output_arrays[0][1]) == (n == 1)


@pytest.mark.parametrize("n", [1, 2])
def test_the_caller_can_work_while_devices_compute(rng, n):
    w = rng.standard_normal((8, 8)).astype(np.float32)
    called = []
    with Ranks(n) as group:
        kept = group.weight(w)
        product = group.compile(lambda rank, x: ops.linear(x, kept[rank]))
        product(np.eye(8, dtype=np.float32))
        program = product.programs[-1]
        program.input_arrays[0][...] = 2 * np.eye(8)
        program.compute(lambda: called.append(1))
        np.testing.assert_allclose(program.result(), 2 * w.T, rtol=1e-5)
        assert called == [1]
        with pytest.raises(KeyboardInterrupt):
            program.compute(_interrupt)
        program.compute()  # the program stays usable
        np.testing.assert_allclose(program.result(), 2 * w.T, rtol=1e-5)


def _interrupt():
    raise KeyboardInterrupt
