"""The guide's graph of two matrix products, built with the flat functions."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import flat

F32 = flat.GGML_TYPE_F32

CPU = flat.ggml_backend_cpu_init


def backends(devices):
    """Open devices by their names."""
    return [flat.ggml_vulkan_init(int(d.removeprefix("Vulkan"))) if d != "CPU" else CPU() for d in devices]


class Guide:
    """``sum(relu(w2 @ relu(w1 @ x)))``: a graph to put on several devices."""

    def __init__(self, rng):
        self.ctx = flat.ggml_init(16 * 1024 * 1024)
        self.w1 = flat.ggml_new_tensor_2d(self.ctx, F32, 16, 24)
        self.w2 = flat.ggml_new_tensor_2d(self.ctx, F32, 24, 8)
        self.x = flat.ggml_new_tensor_2d(self.ctx, F32, 16, 4)
        self.h = flat.ggml_relu(self.ctx, flat.ggml_mul_mat(self.ctx, self.w1, self.x))
        self.y = flat.ggml_relu(self.ctx, flat.ggml_mul_mat(self.ctx, self.w2, self.h))
        self.values = [rng.standard_normal(t.shape).astype(np.float32) for t in (self.w1, self.w2, self.x)]
        self.graph = flat.ggml_build_forward_expand(self.ctx, self.y)

    def set(self):
        """Set the values of all inputs."""
        for t, values in zip((self.w1, self.w2, self.x), self.values, strict=True):
            flat.ggml_set_f32(t, values.reshape(-1))

    def set_x(self, rng):
        """Set new values of the input."""
        self.values[2] = rng.standard_normal(self.x.shape).astype(np.float32)
        flat.ggml_set_f32(self.x, self.values[2])

    def check(self):
        """Compare the result with numpy's."""
        w1, w2, x = (v.astype(np.float64) for v in self.values)
        want = np.maximum(np.maximum(x @ w1.T, 0) @ w2.T, 0)
        np.testing.assert_allclose(flat.ggml_get_f32(self.y), want.reshape(-1), rtol=1e-2, atol=1e-2)


def spread(guide, sched):
    """Place the two products on the first and the second backend."""
    for i, tensors in enumerate(((guide.w1, guide.h.ptr.src[0]), (guide.w2, guide.y.ptr.src[0]))):
        for t in tensors:
            t = t if isinstance(t, ggml.Tensor) else ggml.Tensor(guide.ctx, t, 2)
            backend = flat.ggml_backend_sched_get_backend(sched, min(i, len(sched.backends) - 1))
            flat.ggml_backend_sched_set_tensor_backend(sched, t, backend)
