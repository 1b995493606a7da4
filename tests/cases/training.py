"""Losses. ``tests/ops/test_training.py`` has the steps of optimizers, whose weights must have memory."""

from __future__ import annotations

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Type
from tests.cases import Array, In, case, reference


@reference
def cross_entropy_loss(logits: Array, labels: Array) -> Array:
    logits = np.atleast_1d(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.mean((labels * np.log(p)).sum(-1))


@reference
def cross_entropy_loss_back(grad: Array, logits: Array, labels: Array) -> Array:
    """Compute the gradient; ``tests/ops/test_training.py`` compares this reference with differences."""
    logits = np.atleast_1d(logits)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return (grad.reshape(()) * (p - labels) / (logits.size / logits.shape[-1])).reshape(labels.shape)


@reference
def count_equal(a: Array, b: Array) -> Array:
    return np.sum(a == b)


def labels(*shape: int) -> In:
    """Return rows that sum to 1."""
    p = np.random.default_rng(7).uniform(0.1, 1, shape)
    return In(shape, values=p / p.sum(-1, keepdims=True))


def one_hot(*shape: int) -> In:
    return In(shape, values=np.eye(shape[-1])[np.random.default_rng(7).integers(0, shape[-1], shape[:-1])])


CASES = [
    case("cross_entropy_loss", logits=In((7,)), labels=one_hot(7)),
    case("cross_entropy_loss", logits=In((5, 33)), labels=labels(5, 33)),
    case("cross_entropy_loss", logits=In((2, 3, 4, 65)), labels=one_hot(2, 3, 4, 65)),
    case("cross_entropy_loss_back", grad=In(()), logits=In((7,)), labels=one_hot(7)),
    case("cross_entropy_loss_back", grad=In((1,)), logits=In((5, 33)), labels=labels(5, 33)),
    case("cross_entropy_loss_back", grad=In((1, 1)), logits=In((2, 3, 2, 5)), labels=one_hot(2, 3, 2, 5)),
    case("count_equal", a=In((37,), Type.I32), b=In((37,), Type.I32)),
    case("count_equal", a=In((21, 50), Type.I32, values=4), b=In((21, 50), Type.I32, values=4)),
    case("count_equal", a=In((6, 9), Type.I32, "gaps"), b=In((6, 9), Type.I32, "transposed")),
]

WRONG = {
    "cross_entropy_loss: logits and labels differ": lambda t: ggml.cross_entropy_loss(t(3, 4), t(4, 3)),
    "cross_entropy_loss: logits must be contiguous F32": lambda t: ggml.cross_entropy_loss(t(3, 4).T, t(4, 3)),
    "cross_entropy_loss: labels must be contiguous F32": lambda t: ggml.cross_entropy_loss(t(4), t(4, dtype="f16")),
    "cross_entropy_loss: logits has no elements": lambda t: ggml.cross_entropy_loss(t(0, 4), t(0, 4)),
    "cross_entropy_loss: logits has more than 2**31": lambda t: ggml.cross_entropy_loss(t(2**31), t(2**31)),
    # ggml accepts any strides for axes of size 1, but its kernels use them.
    "cross_entropy_loss: logits must be contiguous": lambda t: ggml.cross_entropy_loss(
        ggml.permute(t(2, 5, 4), (1, 0, 2)), t(5, 2, 4)
    ),
    "cross_entropy_loss_back: grad must be one F32": lambda t: ggml.cross_entropy_loss_back(t(2), t(4), t(4)),
    "cross_entropy_loss_back: logits and labels": lambda t: ggml.cross_entropy_loss_back(t(1), t(4), t(1, 2)),
    "cross_entropy_loss_back: logits has no": lambda t: ggml.cross_entropy_loss_back(t(1), t(0), t(0)),
    "count_equal: a and b differ in shape": lambda t: ggml.count_equal(t(4, dtype="i32"), t(5, dtype="i32")),
    "count_equal: a and b must be I32": lambda t: ggml.count_equal(t(4), t(4)),
    "count_equal: a and b must have at most two axes": lambda t: ggml.count_equal(
        t(2, 3, 4, dtype="i32"), t(2, 3, 4, dtype="i32")
    ),
    "count_equal: a has no elements": lambda t: ggml.count_equal(t(0, dtype="i32"), t(0, dtype="i32")),
    "count_equal: a has more than 2**31": lambda t: ggml.count_equal(t(2**31, dtype="i32"), t(2**31, dtype="i32")),
    "count_equal: a starts inside": lambda t: ggml.count_equal(
        ggml.view(t(8, dtype="i32"), (4,), offset=4), t(4, dtype="i32")
    ),
}
