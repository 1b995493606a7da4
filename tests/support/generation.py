"""Prompts for small random models, and the tokens that a model generates for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models import Model, Sampler, Timings, Tokenizer
from ggml_cffi.models.generation import Batcher, Request, generate_many


def random_prompts(rng: np.random.Generator, sizes: Sequence[int]) -> list[list[int]]:
    """Return prompts with these numbers of token ids, for a vocabulary of 50."""
    return [[int(t) for t in rng.integers(0, 50, n)] for n in sizes]


def generate_alone(model: Model, ids: list[int], n: int) -> list[int]:
    """Return ``n`` tokens after ``ids``, generated with the whole KV cache free."""
    model.clear_cache()
    return list(model.generate_tokens(ids, n, stop_at_end=False, reuse=False))


def generate_together(model: Model, prompts: list[list[int]], n: int, max_sequences: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of a prompt's number and one of ``n`` tokens after it, with several prompts in each run."""
    requests = enumerate([Request(ids, Sampler(), n, frozenset()) for ids in prompts])
    for number, token in generate_many(batcher_of(model), requests, max_sequences, Timings()):
        if token is not None:
            yield number, token


def batcher_of(model: Model) -> Batcher:
    """Return the batcher of a model without replicas."""
    (batcher,) = model.batchers
    return batcher


def tokenizer_of(path: Path) -> Tokenizer:
    """Return the tokenizer of a file."""
    with GGUFFile(path) as file:
        return Tokenizer(file)


def n_free_slots(model: Model) -> int:
    """Return the number of free KV slots."""
    return batcher_of(model).cache.slots.n_free
