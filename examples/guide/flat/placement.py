"""4. Tensors with manual placement. With the flat API."""
# ruff: noqa: F403, F405

import numpy as np

from ggml_cffi.flat import *


def main():
    """Compute ``(a + b) * (a - b)``, sum and product on one GPU and the difference on the other."""
    n_devices = ggml_vulkan_device_count()
    if n_devices < 2:
        print(f"Two GPUs are needed, and this machine has {n_devices}: nothing to show.")
        return
    gpu0 = ggml_vulkan_init(0)
    gpu1 = ggml_vulkan_init(1)
    sched = ggml_backend_sched_new([gpu0, gpu1])

    ctx = ggml_init(16 * 1024 * 1024)
    a = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1000)
    b = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1000)
    rng = np.random.default_rng(0)
    data_a, data_b = rng.standard_normal((2, 1000))
    ggml_set_f32(a, data_a)  # kept until the tensor has memory
    ggml_set_f32(b, data_b)
    total = ggml_add(ctx, a, b)
    difference = ggml_sub(ctx, a, b)
    result = ggml_mul(ctx, total, difference)
    graph = ggml_build_forward_expand(ctx, result)

    ggml_backend_sched_reserve(sched, graph)
    for tensor, gpu in ((total, gpu0), (difference, gpu1), (result, gpu0)):
        ggml_backend_sched_set_tensor_backend(sched, tensor, gpu)
    ggml_backend_sched_alloc_graph(sched, graph)
    for name, tensor in (("total", total), ("difference", difference), ("result", result)):
        print(f"{name:10} on {ggml_backend_name(ggml_backend_sched_get_tensor_backend(sched, tensor))}")
    assert ggml_backend_sched_get_tensor_backend(sched, difference) is gpu1

    for step in range(2):  # inputs keep their values for the second run
        ggml_backend_sched_graph_compute(sched, graph)
        error = np.abs(ggml_get_f32(result) - (data_a + data_b) * (data_a - data_b)).max()
        print(f"run {step}: largest error against numpy {error:.1e}")
        assert error < 1e-5

    ggml_backend_sched_free(sched)
    ggml_free(ctx)
    ggml_vulkan_free(gpu0)
    ggml_vulkan_free(gpu1)


if __name__ == "__main__":
    main()
