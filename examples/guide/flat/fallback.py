"""3. A GPU, and the CPU for operations that the GPU lacks. With the flat API."""
# ruff: noqa: F403, F405

import numpy as np

from ggml_cffi.flat import *


def softsign(out, a):
    """Compute an operation that no GPU supports."""
    out[...] = a / (1 + np.abs(a))


def main():
    """Compute ``2 * softsign(x @ w.T)``."""
    backends = []
    if ggml_vulkan_device_count():
        backends.append(ggml_vulkan_init(0))
    else:
        print("A GPU is missing: the CPU computes it all.")
    cpu = ggml_backend_cpu_init()
    ggml_backend_cpu_set_n_threads(cpu, 2)
    backends.append(cpu)
    sched = ggml_backend_sched_new(backends)

    ctx = ggml_init(16 * 1024 * 1024)
    w = ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 32, 16), "w")
    x = ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 32, 4), "x")
    product = ggml_set_name(ggml_mul_mat(ctx, w, x), "product")
    activated = ggml_set_name(ggml_map_custom1(ctx, product, softsign, 1, None), "softsign")
    y = ggml_set_name(ggml_scale(ctx, activated, 2.0), "y")
    graph = ggml_build_forward_expand(ctx, y)

    ggml_backend_sched_alloc_graph(sched, graph)
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(t.shape).astype(np.float32) for t in (w, x)]
    ggml_set_f32(w, data[0].reshape(-1))
    ggml_set_f32(x, data[1].reshape(-1))
    ggml_backend_sched_graph_compute(sched, graph)

    for tensor in (w, x, product, activated, y):
        backend = ggml_backend_sched_get_tensor_backend(sched, tensor)
        print(f"{ggml_get_name(tensor):10} {ggml_tensor_shape(tensor)} on {ggml_backend_name(backend)}")
    assert ggml_backend_name(ggml_backend_sched_get_tensor_backend(sched, activated)) == "CPU"
    product = data[1] @ data[0].T
    error = np.abs(ggml_get_f32(y) - (2 * product / (1 + np.abs(product))).reshape(-1)).max()
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2

    ggml_backend_sched_free(sched)
    ggml_free(ctx)
    for backend in backends:
        ggml_backend_free(backend)


if __name__ == "__main__":
    main()
