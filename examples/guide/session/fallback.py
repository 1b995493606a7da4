"""3. A GPU, and the CPU for operations that the GPU lacks. With a session."""

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

    with ggml.Session(gpus, n_threads=2) as session:
        weight = session.weight(w)

        @session.compile
        def activated(x):
            return ggml.scale(ggml.map_custom1(ggml.linear(x, weight), softsign), 2)

        outputs = activated(x)
        where = activated.trace(x).scheduler.assignment()
        for node, backend in where:
            print(f"{node.op.name:12} {node.shape} on {backend.name}")
        assert {backend.name for node, backend in where if node.op.name == "MAP_CUSTOM1"} == {"CPU"}
    product = x @ w.T
    error = np.abs(outputs - 2 * product / (1 + np.abs(product))).max()
    print(f"largest error against numpy: {error:.1e}")
    assert error < 1e-2


if __name__ == "__main__":
    main()
