"""4. Tensors with manual placement. With a session."""

import numpy as np

import ggml_cffi as ggml


def main():
    """Compute ``(a + b) * (a - b)``, sum and product on one GPU and the difference on the other."""
    gpus = [d for d in ggml.devices() if not d.is_cpu]
    if len(gpus) < 2:
        print(f"Two GPUs are needed, and this machine has {len(gpus)}: nothing to show.")
        return
    x, y = np.random.default_rng(0).standard_normal((2, 1000), dtype=np.float32)

    with ggml.Session(gpus[:2]) as session:

        @session.compile
        def squares(a, b):
            total, difference = a + b, a - b
            return total, difference, total * difference

        traced = squares.trace(x, y)
        scheduler = traced.scheduler
        for tensor, backend in zip(traced.outputs, (0, 1, 0), strict=True):
            scheduler.place(tensor, session.backends[backend])
        scheduler.reserve(traced.graph)
        scheduler.alloc(traced.graph)  # the placements are kept
        for name, tensor in zip(("total", "difference", "result"), traced.outputs, strict=True):
            print(f"{name:10} on {scheduler.backend_of(tensor).name}")
        assert scheduler.backend_of(traced.outputs[1]) is session.backends[1]
        for step in range(2):
            *_, result = squares(x, y)
            error = np.abs(result - (x + y) * (x - y)).max()
            print(f"run {step}: largest error against numpy {error:.1e}")
            assert error < 1e-5


if __name__ == "__main__":
    main()
