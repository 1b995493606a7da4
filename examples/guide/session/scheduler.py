"""2. A scheduler over several GPUs: a layer on each. With a session."""

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

    with ggml.Session(gpus[:2]) as session:
        print("backends:", ", ".join(device.name for device in session.devices))
        first, second = session.weight(a, on=gpus[0]), session.weight(b, on=gpus[1])

        @session.compile
        def layers(x):
            return ggml.linear(ggml.relu(ggml.linear(x, first)), second)

        outputs = layers(x)
        scheduler = layers.trace(x).scheduler
        print("bytes reserved:", {b.name: n for b, n in scheduler.buffer_sizes().items()})
        for backend, nodes in scheduler.splits:
            print(f"{backend.name}: {', '.join(node.op.name for node in nodes)}")
        print("copied between devices:", [f"{t.shape} to {backend.name}" for t, backend in scheduler.copies])
        assert {backend.name for backend, _ in scheduler.splits} >= {gpu.name for gpu in gpus[:2]}
    want = np.maximum(x @ a.T, 0) @ b.T
    error = np.abs(outputs - want).max() / np.abs(want).max()
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2


if __name__ == "__main__":
    main()
