"""Training of a small classifier: three spirals, two hidden layers, AdamW. Forward, backward and step are one graph.

python examples/train.py [DEVICE ...]
"""

import sys
from itertools import pairwise

import numpy as np

import ggml_cffi as ggml

N_CLASSES, HIDDEN, BATCH = 3, 64, 64


def spirals(n, rng):
    """Return ``n`` points of each class in the plane, and their classes."""
    t = np.linspace(0.1, 1, n)
    arms = [4.5 * t + 2 * np.pi * k / N_CLASSES + 0.15 * rng.standard_normal(n) for k in range(N_CLASSES)]
    points = np.concatenate([np.stack([t * np.sin(a), t * np.cos(a)], 1) for a in arms])
    return points.astype(np.float32), np.repeat(np.arange(N_CLASSES), n)


def network(x, weights):
    """Return the logits of points ``x``."""
    for i, (w, b) in enumerate(weights):
        x = ggml.linear(x, w, b)
        if i < len(weights) - 1:
            x = ggml.relu(x)
    return x


def fit(points, classes, test, devices=("CPU",), epochs=30, seed=0):
    """Train with ``points`` and ``classes``.

    Returns
    -------
    tuple
        The predicted classes of the points ``test``, and the loss of each epoch.
    """
    rng = np.random.default_rng(seed)
    sizes = [2, HIDDEN, HIDDEN, N_CLASSES]
    losses = []
    with ggml.Context() as ctx, ggml.Scheduler(list(devices)) as scheduler:
        weights = [(ctx.new_tensor("f32", (n, k)), ctx.new_tensor("f32", (n,))) for k, n in pairwise(sizes)]
        ctx.alloc(devices[0])
        for w, _ in weights:
            w.set(rng.standard_normal(w.shape) * np.sqrt(2 / w.shape[1]))

        with ggml.Context() as work:
            x = work.new_tensor("f32", (BATCH, 2), name="x")
            labels = work.new_tensor("f32", (BATCH, N_CLASSES), name="labels")
            loss = ggml.cross_entropy_loss(network(x, weights), labels)
            params = [t for pair in weights for t in pair]
            with ggml.AdamW(scheduler, loss, params, lr=5e-3, weight_decay=1e-3) as optimizer:
                optimizer.alloc()
                for _ in range(epochs):
                    order = rng.permutation(len(points))
                    total = 0.0
                    for start in range(0, len(order) - BATCH + 1, BATCH):
                        batch = order[start : start + BATCH]
                        x.set(points[batch])
                        labels.set(np.eye(N_CLASSES)[classes[batch]])
                        total += optimizer.step()
                    losses.append(total / (len(order) // BATCH))

        with ggml.Context() as work:
            x = work.new_tensor("f32", test.shape)
            with ggml.Graph(ggml.argmax(network(x, weights))) as graph:
                scheduler.alloc(graph)
                x.set(test)
                scheduler.compute(graph)
                return graph.outputs[0].numpy(), losses


def main():
    """Train, and print the accuracy on new points."""
    rng = np.random.default_rng(1)
    (points, classes), (test, truth) = spirals(400, rng), spirals(200, rng)
    found, losses = fit(points, classes, test, sys.argv[1:] or ("CPU",))
    print(f"loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last")
    print(f"accuracy on {len(test)} new points: {(found == truth).mean():.3f}")


if __name__ == "__main__":
    main()
