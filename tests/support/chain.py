"""A chain of products whose weights are on several devices."""

import numpy as np

import ggml_cffi as ggml


class Chain:
    """A chain of ``depth`` products with one input and one output, with weights on the devices in turn."""

    def __init__(self, devices, depth=3, n=32):
        rng = np.random.default_rng(7)
        self.values = [rng.standard_normal((n, n)).astype(np.float32) / np.sqrt(n) for _ in range(depth)]
        self.weights, self.work = ggml.Context(), ggml.Context()
        self.layers = []
        self.x = y = self.work.new_tensor("f32", (4, n), name="x")
        for i, values in enumerate(self.values):
            w = self.weights.new_tensor("f32", (n, n), name=f"w{i}")
            self.weights.alloc(devices[i * len(devices) // depth], [w], usage=ggml.Usage.WEIGHTS)
            w.set(values)
            y = ggml.linear(y, w)
            y.name = f"y{i}"
            self.layers.append(y)
        self.y = y
        self.graph = ggml.Graph(y)

    def want(self, x):
        for w in self.values:
            x = x @ w.T
        return x

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in (self.graph, self.work, self.weights):
            handle.close()
