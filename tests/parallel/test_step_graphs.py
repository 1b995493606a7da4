"""Steps of a trace: results that later steps read, also where a backend fuses nodes."""

import numpy as np
import pytest

from ggml_cffi import ops, parallel
from ggml_cffi.parallel import COLUMNS, ROWS
from tests.support import relative_error
from tests.support.ranks import DIM, Ranks


@pytest.mark.parametrize("rows", [1, 40])
def test_fused_nodes_that_a_later_step_reads_are_kept(two_gpus, rows, rng):
    """ggml's Vulkan backend fuses a norm with the product by its weight, and a product with an addition. It omits the
    result of the first node if nothing else in the graph uses it.
    """
    values = {name: rng.standard_normal((DIM, DIM)).astype(np.float32) / 8 for name in "abc"}
    values |= {"scale": rng.uniform(0.5, 1.5, DIM).astype(np.float32)}
    with parallel.TensorParallel(two_gpus) as group:
        w = group.weights(values, {"a": ROWS, "b": COLUMNS})

        def run(rank, x):
            norm = ops.rms_norm(x, 1e-5)
            scaled = ops.mul(norm, w["scale"][rank])
            both = ops.linear(scaled, w["c"][rank])
            added = ops.add(both, norm)  # a product that the next step needs as well
            y = rank.all_reduce(ops.linear(ops.linear(added, w["a"][rank]), w["b"][rank]))
            return ops.add(ops.add(y, both), ops.add(scaled, norm))

        f = group.compile(run)
        x = rng.standard_normal((rows, DIM)).astype(np.float32)
        a, b, c, scale = (values[name].astype(np.float64) for name in ("a", "b", "c", "scale"))
        norm = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
        both = (norm * scale) @ c.T
        want = (both + norm) @ a.T @ b.T + both + norm * scale + norm
        for _ in range(2):
            assert relative_error(f(x), want) < 2e-3


def test_results_of_earlier_steps_stay(rng):
    """The last step uses a result of the first one and views of it. A partial sum is used twice."""
    a = rng.standard_normal((8, DIM)).astype(np.float32)
    with Ranks() as group:
        w = group.weight(np.eye(DIM, dtype=np.float32), COLUMNS)

        def run(rank, x):
            kept = ops.scale(x, 3.0)
            lower = ops.view(kept, (4, DIM), offset=4 * DIM * 4)
            half = ops.view(x, (8, DIM // 2), strides=(4 * DIM, 4), offset=rank.index * DIM * 2)
            partial = ops.linear(ops.cont(half), w[rank])
            total = rank.all_reduce(partial)
            for _ in range(4):
                total = rank.all_reduce(ops.scale(ops.sqrt(ops.sqr(total)), 0.5))
            return ops.add(total, kept), lower, rank.all_gather(partial, 0), partial

        total, lower, partials, first = group.compile(run)(a)
        np.testing.assert_allclose(total, np.abs(a) + 3 * a, rtol=1e-5)
        np.testing.assert_array_equal(lower, (3 * a)[4:])
        np.testing.assert_allclose(partials[:8] + partials[8:], a, rtol=1e-6)
        np.testing.assert_array_equal(first, partials[:8])


@pytest.mark.parametrize("threads", [False, True])
def test_a_last_step_that_only_the_first_rank_has(threads, rng):
    x = rng.standard_normal((2, 4)).astype(np.float32)
    with Ranks(3, threads=threads) as group:
        f = group.compile(lambda rank, x: rank.all_reduce(ops.scale(x, 2.0)))
        for _ in range(3):
            np.testing.assert_allclose(f(x), 6 * x, rtol=1e-6)
        assert group.executor.steps_computed == [6, 3, 3]
        alone = group.compile(lambda rank, x: ops.scale(x, 2.0))
        np.testing.assert_array_equal(alone(x), 2 * x)
