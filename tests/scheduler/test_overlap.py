"""Orders of nodes in which two devices work at once."""

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import relative_error


def branch(ctx, x, device, n, rng):
    """Return ``n`` products of ``x`` with weights on ``device``, summed along the rows."""
    y, weights = x, []
    for _ in range(n):
        w = ctx.new_tensor("f32", (32, 32))
        ctx.alloc(device, [w], usage=ggml.Usage.WEIGHTS)
        w.set(rng.standard_normal((32, 32)) / 6)
        weights.append(w.numpy().astype(np.float64))
        y = ggml.linear(y, w)
    return ggml.sum_rows(y), weights


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("overlap", [True, False])
def test_two_branches_that_join_overlap(two_gpus, first, overlap, rng):
    values = rng.standard_normal((4, 32))
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus, overlap=overlap) as s:
        x = ctx.new_tensor("f32", (4, 32))
        devices = two_gpus[first], two_gpus[1 - first]
        (a, wa), (b, wb) = (branch(ctx, x, d, 3, rng) for d in devices)
        y = ggml.scale(ggml.add(a, b), 2.0)
        with ggml.Graph(y) as graph:
            s.alloc(graph)
            x.set(values)
            for _ in range(3):
                s.compute()
                want = sum(np.linalg.multi_dot([values, *(w.T for w in ws)]).sum(1, keepdims=True) for ws in (wa, wb))
                assert relative_error(y.numpy(), 2 * want) < 5e-3
            names = [(split.backend.name, len(split.nodes)) for split in s.splits]
            if overlap:
                # Each branch is a split of its own, and so is the join: neither branch waits for the other.
                assert names == [(devices[1], 4), (devices[0], 4), (devices[1], 2)] or names == [
                    (devices[0], 4),
                    (devices[1], 4),
                    (devices[0], 2),
                ]
            else:
                assert names == [(devices[0], 4), (devices[1], 6)]


def test_nodes_placed_by_hand_keep_their_order(two_gpus, rng):
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
        x = ctx.new_tensor("f32", (4, 32))
        (a, _), (b, _) = (branch(ctx, x, d, 2, rng) for d in two_gpus)
        y = ggml.add(a, b)
        s.place(y, two_gpus[1])
        with ggml.Graph(y) as graph:
            order = graph.nodes
            s.alloc(graph)
            assert graph.nodes == order


def test_in_place_writes_keep_their_order(two_gpus, rng):
    """Readers of memory stay before or after an in-place write of it, although no operand connects them."""
    values = rng.standard_normal((4, 32)).astype(np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
        cache = ctx.new_tensor("f32", (4, 32))
        ctx.alloc(two_gpus[0], [cache], usage=ggml.Usage.WEIGHTS)
        cache.set(values)
        x = ctx.new_tensor("f32", (4, 32))
        other, _ = branch(ctx, x, two_gpus[1], 2, rng)
        before = ggml.sum_rows(cache)
        written = ggml.scale_inplace(cache, 2.0)
        after = ggml.sum_rows(cache)
        with ggml.Graph(before, written, after, ggml.add(other, after)) as graph:
            s.alloc(graph)
            x.set(values)
            s.compute()
            total = values.astype(np.float64).sum(1, keepdims=True)
            assert relative_error(before.numpy(), total) < 1e-3
            assert relative_error(after.numpy(), 2 * total) < 1e-3
