"""5. A run in the background while the host continues. With the flat API."""
# ruff: noqa: F403, F405

import time

import numpy as np

from ggml_cffi.flat import *


def main():
    """Compute ``sum(relu(w @ x))`` of several ``x``, while the host makes the next one."""
    n_devices = ggml_vulkan_device_count()
    if not n_devices:
        print("A GPU is missing: the CPU computes, and a start waits for it.")
    backends = [ggml_vulkan_init(i) for i in range(min(n_devices, 2))] or [ggml_backend_cpu_init()]
    sched = ggml_backend_sched_new(backends)

    ctx = ggml_init(16 * 1024 * 1024)
    w = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 128, 128)
    x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 128, 16)
    y = ggml_sum(ctx, ggml_relu(ctx, ggml_mul_mat(ctx, w, x)))
    graph = ggml_build_forward_expand(ctx, y)
    ggml_backend_sched_alloc_graph(sched, graph)

    rng = np.random.default_rng(0)
    weights = rng.standard_normal(w.shape)
    ggml_set_f32(w, weights)
    batch = rng.standard_normal(x.shape)
    for step in range(3):
        ggml_set_f32(x, batch)
        started = time.perf_counter()
        ggml_backend_sched_graph_compute_async(sched, graph)
        returned = time.perf_counter()
        next_batch = rng.standard_normal(x.shape)  # while it runs
        ggml_backend_sched_synchronize(sched)
        done = time.perf_counter()

        want = np.maximum(batch @ weights.T, 0).sum()
        got = ggml_get_f32(y)[0]
        print(
            f"step {step}: returned after {(returned - started) * 1e3:.2f} ms, done after "
            f"{(done - started) * 1e3:.2f} ms; {got:.1f}, numpy has {want:.1f}"
        )
        assert abs(got - want) < 1e-2 * want
        batch = next_batch

    ggml_backend_sched_free(sched)
    ggml_free(ctx)
    for backend in backends:
        ggml_backend_free(backend)


if __name__ == "__main__":
    main()
