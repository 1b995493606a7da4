"""Two products on two devices, which the scheduler chooses by the weights."""

import numpy as np

import ggml_cffi as ggml


def main() -> None:
    """Compute ``relu(x @ a.T) @ b.T`` with ``a`` on the first device and ``b`` on the second."""
    rng = np.random.default_rng(0)
    x, a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((4, 64), (96, 64), (32, 96)))
    devices = ggml.devices()[:2]
    print("devices:", ", ".join(d.name for d in devices))

    with ggml.Context() as weights, ggml.Context() as work, ggml.Scheduler(devices) as scheduler:
        first = weights.new_tensor(ggml.F32, a.shape, name="a")
        second = weights.new_tensor(ggml.F32, b.shape, name="b")
        weights.alloc(devices[0], [first], usage=ggml.Usage.WEIGHTS)
        weights.alloc(devices[-1], [second], usage=ggml.Usage.WEIGHTS)
        first.set(a)
        second.set(b)

        inputs = work.new_tensor(ggml.F32, x.shape, name="x")
        outputs = ggml.linear(ggml.relu(ggml.linear(inputs, first)), second)
        with ggml.Graph(outputs) as graph:
            scheduler.alloc(graph)
            inputs.set(x)
            scheduler.compute(graph)
            for node, backend in scheduler.assignment():
                print(f"{node.op.name:8} on {backend.name}")
            want = np.maximum(x @ a.T, 0) @ b.T
            error = np.abs(outputs.numpy() - want).max() / np.abs(want).max()
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2


if __name__ == "__main__":
    main()
