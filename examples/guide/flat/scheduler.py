"""2. A scheduler over several GPUs: a layer on each. With the flat API."""
# ruff: noqa: F403, F405

import numpy as np

from ggml_cffi.flat import *


def main():
    """Compute ``relu(x @ w0.T) @ w1.T``, ``w0`` on the first GPU and ``w1`` on the second."""
    n_devices = ggml_vulkan_device_count()
    if n_devices < 2:
        print(f"Two GPUs are needed, and this machine has {n_devices}: nothing to show.")
        return
    gpu0 = ggml_vulkan_init(0)
    gpu1 = ggml_vulkan_init(1)
    sched = ggml_backend_sched_new([gpu0, gpu1])  # adds the CPU
    n = ggml_backend_sched_get_n_backends(sched)
    names = [ggml_backend_name(ggml_backend_sched_get_backend(sched, i)) for i in range(n)]
    print("backends:", ", ".join(names))

    ctx = ggml_init(16 * 1024 * 1024)
    w0 = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 64, 96)  # 96 rows of 64
    w1 = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 96, 32)
    x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 64, 8)
    hidden = ggml_relu(ctx, ggml_mul_mat(ctx, w0, x))
    y = ggml_mul_mat(ctx, w1, hidden)
    graph = ggml_build_forward_expand(ctx, y)

    rng = np.random.default_rng(0)
    data = [rng.standard_normal(t.shape).astype(np.float32) for t in (w0, w1, x)]
    for tensor, values in zip((w0, w1, x), data, strict=True):
        ggml_set_f32(tensor, values)

    for tensor, gpu in ((w0, gpu0), (hidden, gpu0), (w1, gpu1), (y, gpu1)):
        ggml_backend_sched_set_tensor_backend(sched, tensor, gpu)
    ggml_backend_sched_reserve(sched, graph)
    ggml_backend_sched_alloc_graph(sched, graph)  # the same graph again: wrong numbers in C, correct ones here
    ggml_backend_sched_graph_compute(sched, graph)

    print("splits:", ggml_backend_sched_get_n_splits(sched), "copies:", ggml_backend_sched_get_n_copies(sched))
    for name, tensor in (("hidden", hidden), ("y", y)):
        backend = ggml_backend_sched_get_tensor_backend(sched, tensor)
        print(f"{name:6} {ggml_tensor_shape(tensor)} on {ggml_backend_name(backend)}")
    want = np.maximum(data[2] @ data[0].T, 0) @ data[1].T
    error = np.abs(ggml_get_f32(y) - want.reshape(-1)).max() / np.abs(want).max()
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2
    assert ggml_backend_sched_get_n_splits(sched) >= 2

    ggml_free(ctx)
    ggml_backend_sched_free(sched)
    ggml_vulkan_free(gpu0)
    ggml_vulkan_free(gpu1)


if __name__ == "__main__":
    main()
