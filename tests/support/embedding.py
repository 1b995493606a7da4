"""Sentence encoders for tests: an embedder over a model file, random texts, and all-MiniLM."""

from __future__ import annotations

from contextlib import contextmanager

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.architectures.bert import Bert
from ggml_cffi.models.placement.place import split_layers
from ggml_cffi.models.runners.embedding import Embedder
from ggml_cffi.models.runners.stage_spec import stages_of
from ggml_cffi.models.runners.weights import Weights

#: Lengths of texts for GPUs, 29 tokens in all: for more than 32, software devices compile other shaders for minutes.
FEW = (9, 1, 4, 15)


@contextmanager
def embedder(path, devices=("CPU",), n_ctx=40, n_batch=64, architecture=Bert):
    """Open an embedder with weights and a scheduler of its own."""
    with ggml.GGUFFile(path) as file, ggml.Scheduler(devices) as scheduler:
        scheduler.backends[-1].n_threads = 1
        model = architecture(file)
        n = len(scheduler.backends) - 1
        stages = stages_of(split_layers([1] * model.n_layers, [*[1] * n, 0], [model.n_layers] * (n + 1)))
        weights = Weights(model, scheduler.backends, 256, ggml.F16, stages)
        try:
            with Embedder(model, weights, scheduler, n_ctx, n_batch) as found:
                yield found
        finally:
            weights.close()


def random_texts(rng, lengths):
    """Return texts of random token ids with these lengths."""
    return [[int(t) for t in rng.integers(0, 50, n)] for n in lengths]


def minilm_file(folder, source, dtype):
    """Return the GGUF file of all-MiniLM-L6-v2 with weights of ``dtype``, converted into ``folder`` once."""
    path = folder / f"{dtype}.gguf"
    if not path.exists():
        models.convert(source, path, dtype)
    return path
