"""4. Tensors with manual placement. With objects."""

import numpy as np

import ggml_cffi as ggml


def main():
    """Compute ``(a + b) * (a - b)``, sum and product on one GPU and the difference on the other."""
    gpus = [d for d in ggml.devices() if not d.is_cpu]
    if len(gpus) < 2:
        print(f"Two GPUs are needed, and this machine has {len(gpus)}: nothing to show.")
        return
    x, y = np.random.default_rng(0).standard_normal((2, 1000), dtype=np.float32)

    with ggml.Context() as ctx, ggml.Scheduler(gpus[:2]) as scheduler:
        a, b = ctx.new_tensor(ggml.F32, x.shape), ctx.new_tensor(ggml.F32, y.shape)
        total, difference = a + b, a - b
        result = total * difference
        with ggml.Graph(result) as graph:
            for tensor, backend in zip((total, difference, result), (0, 1, 0), strict=True):
                scheduler.place(tensor, scheduler.backends[backend])
            scheduler.reserve(graph)
            scheduler.alloc(graph)  # the placements are kept
            for name, tensor in (("total", total), ("difference", difference), ("result", result)):
                print(f"{name:10} on {scheduler.backend_of(tensor).name}")
            assert scheduler.backend_of(difference) is scheduler.backends[1]
            a.set(x)
            b.set(y)
            for step in range(2):  # inputs keep their values for the second run
                scheduler.compute(graph)
                error = np.abs(result.numpy() - (x + y) * (x - y)).max()
                print(f"run {step}: largest error against numpy {error:.1e}")
                assert error < 1e-5


if __name__ == "__main__":
    main()
