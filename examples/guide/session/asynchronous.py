"""5. A run in the background while the host continues. With a session."""

import asyncio
import threading
import time

import numpy as np

import ggml_cffi as ggml


def check(label, batch, w, got):
    """Compare a result with numpy's."""
    want = np.maximum(batch @ w.T, 0).sum()
    print(f"{label}: {got.item():.1f}, numpy has {want:.1f}")
    assert abs(got.item() - want) < 1e-2 * want


def compiled(session, w):
    """Compile ``sum(relu(x @ w.T))`` for the first device of the session."""
    weight = session.weight(w)
    return session.compile(lambda x: ggml.sum(ggml.relu(ggml.linear(x, weight))))


async def loop(function, batches):
    """Start all runs at once, while the event loop continues."""
    return await asyncio.gather(*(function.run_async(batch) for batch in batches))


def main():
    """Compute by futures, with asyncio, and in two sessions at once."""
    gpus = [d for d in ggml.devices() if not d.is_cpu]
    if not gpus:
        print("A GPU is missing: the CPU computes.")
    rng = np.random.default_rng(0)
    w = rng.standard_normal((128, 128))
    batches = [rng.standard_normal((16, 128)) for _ in range(3)]

    with ggml.Session(gpus[:1]) as session:
        function = compiled(session, w)
        batch = rng.standard_normal((16, 128))
        for step in range(3):
            started = time.perf_counter()
            future = function.submit(batch)
            returned = time.perf_counter()
            next_batch = rng.standard_normal(batch.shape)  # while it runs
            total = future.result()
            done = time.perf_counter()
            times = f"returned after {(returned - started) * 1e3:.2f} ms, done after {(done - started) * 1e3:.2f} ms"
            check(f"step {step}: {times}", batch, w, total)
            batch = next_batch

        for k, total in enumerate(asyncio.run(loop(function, batches))):
            check(f"asyncio {k}", batches[k], w, total)

    def work(device):
        with ggml.Session([device]) as session:
            function = compiled(session, w)
            totals[device] = [function(batch) for batch in batches]

    totals = {}
    chosen = gpus[:2] if len(gpus) > 1 else [*gpus, "CPU"]
    threads = [threading.Thread(target=work, args=(device,)) for device in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in chosen:
        for batch, total in zip(batches, totals[device], strict=True):
            check(f"in a thread, on {getattr(device, 'name', device)}", batch, w, total)


if __name__ == "__main__":
    main()
