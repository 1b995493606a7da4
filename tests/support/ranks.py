"""Networks for tensor parallelism, with references in float64, and ranks that are all on the CPU."""

import numpy as np
import pytest

from ggml_cffi import ops, parallel
from ggml_cffi.parallel import COLUMNS, ROWS
from ggml_cffi.parallel import tensor_parallel as tensor

DIM, FF, LAYERS = 64, 96, 3


class Ranks(parallel.TensorParallel):
    """A tensor-parallel group of ``n`` ranks, all on the CPU."""

    def __init__(self, n=2, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor, "check_devices", lambda devices: None)
            super().__init__(["CPU"] * n, n_threads=1, **options)


class Blocks:
    """Feed-forward blocks with norms and residuals, and their results in float64."""

    def __init__(self, rng):
        self.values = {}
        for i in range(LAYERS):
            self.values[f"{i}.norm"] = rng.uniform(0.5, 1.5, DIM).astype(np.float32)
            self.values[f"{i}.up"] = (rng.standard_normal((FF, DIM)) / 8).astype(np.float32)
            self.values[f"{i}.down"] = (rng.standard_normal((DIM, FF)) / 10).astype(np.float32)

    def network(self, group, *, residual=False):
        """Return the compiled blocks. With ``residual``, the sums of the devices add the residuals."""
        w = group.weights(self.values, {"*.up": ROWS, "*.down": COLUMNS})

        def run(rank, x):
            for i in range(LAYERS):
                h = ops.mul(ops.rms_norm(x, 1e-5), w[f"{i}.norm"][rank])
                h = ops.linear(ops.relu(ops.linear(h, w[f"{i}.up"][rank])), w[f"{i}.down"][rank])
                x = rank.all_reduce(h, x) if residual else ops.add(x, rank.all_reduce(h))
            return x, rank.all_gather(ops.linear(x, w["0.up"][rank]))

        return group.compile(run)

    def expected(self, x):
        x = np.asarray(x, np.float64)
        for i in range(LAYERS):
            norm, up, down = (self.values[f"{i}.{name}"].astype(np.float64) for name in ("norm", "up", "down"))
            h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm
            x = x + np.maximum(h @ up.T, 0) @ down.T
        return x, x @ self.values["0.up"].T.astype(np.float64)


def chain(w, n):
    """Return a function of ``n`` products, each after a norm and a ReLU."""

    def run(rank, x):
        for _ in range(n):
            x = ops.linear(ops.relu(ops.rms_norm(x, 1e-5)), w[rank])
        return x

    return run


def expected(x, w, n):
    x = x.astype(np.float64)
    for _ in range(n):
        x = np.maximum(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5), 0) @ w.T
    return x
