"""Observation of runs, and inspection of scheduled graphs."""

import numpy as np
import pytest

import ggml_cffi as ggml


@pytest.fixture
def chain(rng):
    """Build a chain of four operations on a small input."""
    with ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (4, 16))
        a = ggml.scale(x, 2.0)
        b = ggml.scale_bias(a, 1.0, 1.0)
        c = ggml.scale(ggml.reshape(b, (16, 4)), 3.0)
        d = ggml.scale(c, 0.5)
        with ggml.Graph(d) as graph:
            yield x, (a, b, c, d), graph, rng.standard_normal((4, 16)).astype(np.float32)


def test_an_observer_can_read_intermediates(chain, devices):
    x, nodes, graph, values = chain
    with ggml.Scheduler(devices) as s:
        s.alloc(graph)
        x.set(values)
        seen = []
        s.compute(observe=lambda t: seen.append((t, t.numpy())))
        assert [t for t, _ in seen] == list(nodes)
        for (_, got), want in zip(seen, (2 * values, 2 * values + 1, 6 * values + 3, 3 * values + 1.5), strict=True):
            np.testing.assert_allclose(got, want.reshape(got.shape), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="is an intermediate"):
            seen[0][0].numpy()
        only = []
        s.compute(observe=only.append, only=[nodes[1]])
        assert only == [nodes[1]]
        only.clear()
        s.compute()
        assert not only
        np.testing.assert_allclose(nodes[3].numpy(), (3 * values + 1.5).reshape(16, 4), rtol=1e-5, atol=1e-5)


def test_an_exception_or_false_stops_the_run(chain, two_gpus):
    x, nodes, graph, values = chain
    with ggml.Scheduler(two_gpus) as s:
        for t, name in zip(nodes, (two_gpus[0], two_gpus[0], two_gpus[1], two_gpus[1]), strict=True):
            s.place(t, name)
        s.alloc(graph)
        x.set(values)
        assert s.n_splits == 2
        seen = []

        def stop(t):
            seen.append(t)
            return len(seen) < 2

        with pytest.raises(ggml.AbortedError, match=r"stopped by its observer after <Tensor .* scale"):
            s.compute(observe=stop)
        assert seen == list(nodes[:2])

        def fail(t):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            s.compute(observe=fail)
        with pytest.raises(TypeError, match="observe must be a function of a tensor, not int"):
            s.compute(observe=3)
        s.compute()
        np.testing.assert_allclose(nodes[3].numpy(), (3 * values + 1.5).reshape(16, 4), rtol=1e-5, atol=1e-5)


def test_splits_and_copies_match_the_assignment(chain, two_gpus):
    _, nodes, graph, _ = chain
    with ggml.Scheduler(two_gpus) as s:
        for t, name in zip(nodes, (two_gpus[0], two_gpus[0], two_gpus[1], two_gpus[1]), strict=True):
            s.place(t, name)
        planned = s.split_graph(graph)
        assert s.graph is None
        s.alloc(graph)
        for splits in (planned, s.splits):
            assert [(split.backend.name, split.nodes) for split in splits] == [
                (two_gpus[0], list(nodes[:2])),
                (two_gpus[1], list(nodes[2:])),
            ]
        assert s.n_splits == 2
        ((tensor, backend),) = s.copies
        assert tensor.op is ggml.Op.RESHAPE
        assert backend.name == two_gpus[1]
        assert s.buffer_type(two_gpus[1]).name == two_gpus[1]
        s.reset()
        with pytest.raises(ValueError, match="holds no graph"):
            s.splits  # noqa: B018


def test_reserve_size_takes_no_memory(devices):
    with ggml.Context() as ctx, ggml.Scheduler(devices) as s:
        x = ctx.new_tensor("f32", (256, 64))
        y = ggml.scale(ggml.scale(x, 2.0), 3.0)
        with ggml.Graph(y) as graph:
            sizes = s.reserve_size(graph)
            assert sum(s.buffer_sizes().values()) == 0
            assert s.reserve(graph) == sizes
            assert sum(sizes.values()) >= 256 * 64 * 4
            # For a smaller graph, ggml frees the larger buffer. Later runs must still work.
            small = ggml.scale(ctx.new_tensor("f32", (2, 2)), 2.0)
            with ggml.Graph(small) as other:
                s.reserve_size(other)
                s.compute(graph)
                x.set(np.ones((256, 64)))
                s.compute(graph)
                assert (y.numpy() == 6).all()
