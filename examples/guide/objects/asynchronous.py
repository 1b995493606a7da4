"""5. A run in the background while the host continues. With objects."""

import time

import numpy as np

import ggml_cffi as ggml


def main():
    """Compute ``sum(relu(x @ w.T))`` of several ``x``, while the host makes the next one."""
    gpus = [d for d in ggml.devices() if not d.is_cpu]
    if not gpus:
        print("A GPU is missing: the CPU computes, and a start waits for it.")
    rng = np.random.default_rng(0)

    with ggml.Context() as ctx, ggml.Scheduler(gpus[:2] or ["CPU"]) as scheduler:
        weight, inputs = ctx.new_tensor(ggml.F32, (128, 128)), ctx.new_tensor(ggml.F32, (16, 128))
        total = ggml.sum(ggml.relu(ggml.linear(inputs, weight)))
        with ggml.Graph(total) as graph:
            scheduler.alloc(graph)
            w, batch = rng.standard_normal(weight.shape), rng.standard_normal(inputs.shape)
            weight.set(w)
            for step in range(3):
                inputs.set(batch)
                started = time.perf_counter()
                scheduler.compute_async(graph)
                returned = time.perf_counter()
                next_batch = rng.standard_normal(inputs.shape)  # while it runs
                scheduler.synchronize()
                done = time.perf_counter()

                want, got = np.maximum(batch @ w.T, 0).sum(), total.numpy()
                print(
                    f"step {step}: returned after {(returned - started) * 1e3:.2f} ms, done after "
                    f"{(done - started) * 1e3:.2f} ms; {got:.1f}, numpy has {want:.1f}"
                )
                assert abs(got - want) < 1e-2 * want
                batch = next_batch


if __name__ == "__main__":
    main()
