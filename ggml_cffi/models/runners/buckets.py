"""Buckets of batch sizes: one graph serves all batches of about as many tokens.

A graph of 32 layers takes tens of milliseconds to build, and a prompt may have any length. A batch therefore runs in
the graph of the next larger size that is kept, and its last token is repeated in the rows that are left.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

_EXACT = 8  # largest number of tokens for which GPUs have kernels of their own
_BUCKET = 16  # smallest difference between larger numbers of tokens

#: Sizes on which a graph depends: tokens, KV slots that attention reads, tokens with an output.
Key = tuple[int, int, int]


def bucket(n: int) -> int:
    """Return the number of tokens of the graph for ``n`` tokens: larger by at most a quarter, or 15 tokens."""
    if n <= _EXACT:
        return n
    step = max(1 << n.bit_length() >> 3, _BUCKET)
    return -(-n // step) * step


def cpu_bucket(n: int) -> int:
    """Return the number of tokens of the graph for ``n`` tokens on a processor: larger by at most a sixteenth.

    Each row takes time there, also a few of them.
    """
    step = max(1 << n.bit_length() >> 5, 1)
    return -(-n // step) * step


def output_bucket(n: int, n_out: int, n_rows: int) -> int:
    """Return the number of outputs of the graph with ``n_rows`` rows for ``n`` tokens, ``n_out`` with an output."""
    if n_out == n:
        return n_rows
    if n_out > 1 and n > _EXACT:  # not all rows: an architecture would take them in the order of the tokens
        return min(bucket(max(n_out, _EXACT + 1)), n_rows - 1)
    return n_out


def fill(target: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
    """Write the values of a batch into an input for at least as many tokens; repeat the last token in the others.

    A repeated token writes the same keys and values to the same KV slot again.
    """
    n = len(values)
    target[:n] = values
    if n < len(target):
        target[n:] = values[-1]


def shortened(mask: npt.NDArray[Any], n_kv: int) -> npt.NDArray[Any]:
    """Return the beginning of a mask's memory as a mask of ``n_kv`` KV slots."""
    return mask.reshape(-1)[: len(mask) * n_kv].reshape(len(mask), n_kv)
