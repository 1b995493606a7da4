"""2. A scheduler over several GPUs: a layer on each. With objects."""

import numpy as np

import ggml_cffi as ggml


def main():
    """Compute ``relu(x @ a.T) @ b.T``, ``a`` on the first GPU and ``b`` on the second."""
    gpus = [d for d in ggml.devices() if not d.is_cpu]
    if len(gpus) < 2:
        print(f"Two GPUs are needed, and this machine has {len(gpus)}: nothing to show.")
        return
    rng = np.random.default_rng(0)
    x, a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((8, 64), (96, 64), (32, 96)))

    with ggml.Context() as weights, ggml.Context() as work, ggml.Scheduler(gpus[:2]) as scheduler:
        print("backends:", ", ".join(backend.name for backend in scheduler.backends))
        layers = [weights.new_tensor(ggml.F32, w.shape) for w in (a, b)]
        for layer, gpu, values in zip(layers, gpus, (a, b), strict=False):
            weights.alloc(gpu, [layer], usage=ggml.Usage.WEIGHTS)
            layer.set(values)

        inputs = work.new_tensor(ggml.F32, x.shape)
        outputs = ggml.linear(ggml.relu(ggml.linear(inputs, layers[0])), layers[1])
        with ggml.Graph(outputs) as graph:
            print("bytes reserved:", {b.name: n for b, n in scheduler.reserve(graph).items()})
            scheduler.alloc(graph)
            inputs.set(x)
            scheduler.compute(graph)
            for backend, nodes in scheduler.splits:
                print(f"{backend.name}: {', '.join(node.op.name for node in nodes)}")
            print("copied between devices:", [f"{t.shape} to {backend.name}" for t, backend in scheduler.copies])
            want = np.maximum(x @ a.T, 0) @ b.T
            error = np.abs(outputs.numpy() - want).max() / np.abs(want).max()
            assert {backend.name for backend, _ in scheduler.splits} >= {gpu.name for gpu in gpus[:2]}
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2


if __name__ == "__main__":
    main()
