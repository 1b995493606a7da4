"""Manual placement: the second of three operations runs on another device."""

import numpy as np

import ggml_cffi as ggml


def main() -> None:
    """Compute ``2 * relu(3 * x)``, the ``relu`` on the last device."""
    x = np.linspace(-1, 1, 8, dtype=np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(ggml.devices()) as scheduler:
        inputs = ctx.new_tensor(ggml.F32, x.shape, name="x")
        middle = ggml.relu(ggml.scale(inputs, 3))
        outputs = ggml.scale(middle, 2)
        with ggml.Graph(outputs) as graph:
            scheduler.place(middle, "CPU")
            print("compute buffers:", {b.name: n for b, n in scheduler.reserve(graph).items()})
            scheduler.alloc(graph)  # keeps the placement
            inputs.set(x)
            scheduler.compute(graph)
            print({node.op.name: backend.name for node, backend in scheduler.assignment()})
            assert scheduler.backend_of(middle).name == "CPU"
            np.testing.assert_allclose(outputs.numpy(), 2 * np.maximum(3 * x, 0), rtol=1e-6)
    print("as numpy computes it")


if __name__ == "__main__":
    main()
