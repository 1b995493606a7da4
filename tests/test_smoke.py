"""Smoke test: two layers on every device, in seconds."""

import numpy as np

import ggml_cffi as ggml


def test_two_layers_on_every_device(devices, rng):
    w1 = rng.standard_normal((48, 64), dtype=np.float32)
    w2 = rng.standard_normal((32, 48), dtype=np.float32)
    x = rng.standard_normal((5, 64), dtype=np.float32)
    with ggml.Context() as weights, ggml.Context() as work, ggml.Scheduler(devices) as scheduler:
        a = weights.new_tensor(ggml.F32, w1.shape, name="w1")
        b = weights.new_tensor(ggml.F16, w2.shape, name="w2")
        weights.alloc(devices[0], [a], usage=ggml.Usage.WEIGHTS)
        weights.alloc(devices[-1], [b], usage=ggml.Usage.WEIGHTS)
        a.set(w1)
        b.set(w2)
        t = work.new_tensor(ggml.F32, x.shape, name="x")
        y = ggml.linear(ggml.relu(ggml.linear(t, a)), b)
        with ggml.Graph(y) as graph:
            scheduler.alloc(graph)
            t.set(x)
            scheduler.compute(graph)
            got = y.numpy()
            used = {backend.name for _, backend in scheduler.assignment()}
            assert used == set(devices)
            assert scheduler.n_splits == len(devices)
    want = np.maximum(x.astype(np.float64) @ w1.T, 0) @ w2.astype(np.float16).astype(np.float64).T
    assert got.shape == (5, 32)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-3
