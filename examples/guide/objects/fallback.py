"""3. A GPU, and the CPU for operations that the GPU lacks. With objects."""

import numpy as np

import ggml_cffi as ggml


def softsign(out, a):
    """Compute an operation that no GPU supports."""
    out[...] = a / (1 + np.abs(a))


def main():
    """Compute ``2 * softsign(x @ w.T)``."""
    gpus = [d for d in ggml.devices() if not d.is_cpu][:1]
    if not gpus:
        print("A GPU is missing: the CPU computes it all.")
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((16, 32), (4, 32)))

    with ggml.Context() as ctx, ggml.Backend("CPU", n_threads=2) as cpu, ggml.Scheduler([*gpus, cpu]) as scheduler:
        weight, inputs = ctx.new_tensor(ggml.F32, w.shape), ctx.new_tensor(ggml.F32, x.shape)
        activated = ggml.map_custom1(ggml.linear(inputs, weight), softsign)
        outputs = ggml.scale(activated, 2)
        with ggml.Graph(outputs) as graph:
            scheduler.alloc(graph)
            weight.set(w)
            inputs.set(x)
            scheduler.compute(graph)
            for node, backend in scheduler.assignment():
                print(f"{node.op.name:12} {node.shape} on {backend.name}")
            assert scheduler.backend_of(activated) is cpu
            product = x @ w.T
            error = np.abs(outputs.numpy() - 2 * product / (1 + np.abs(product))).max()
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2


if __name__ == "__main__":
    main()
