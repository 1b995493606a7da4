"""The runners of a model that was arranged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ggml_cffi.core.backend import Backend
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.placement.arrange import Arrangement, Wish
from ggml_cffi.models.runners.base import Runner
from ggml_cffi.models.runners.pipeline import StagedRunner
from ggml_cffi.models.runners.scheduled import ScheduledRunner
from ggml_cffi.models.runners.tensor import TensorRunner
from ggml_cffi.models.runners.weights import Progress


def open_runners(
    architecture: Architecture,
    backends: Sequence[Backend],
    wish: Wish,
    progress: Progress | None,
    found: Arrangement,
) -> Iterator[Runner]:
    """Load the model: one runner, or one for each replica.

    Raises
    ------
    OutOfMemoryError
        If a device has less memory than it said.
    """
    n_batch = min(wish.n_batch, wish.n_ctx)
    parts = found.replicas or (found,)
    for i, part in enumerate(parts):
        own = [backends[k] for k in part.members]
        given = architecture, own, wish.n_ctx, n_batch, wish.kv_dtype, _part_of(progress, i, len(parts))
        if part.split == "tensor":
            yield TensorRunner(*given, whole_attention=part.whole_attention)
        elif part.staged:
            yield StagedRunner(*given, where=part.where, in_flight=part.split == "pipeline")
        else:
            compute = [share.compute_bytes for share in part.devices]
            yield ScheduledRunner(*given, where=part.where, op_offload=part.op_offload, compute_bytes=compute)


def _part_of(progress: Progress | None, i: int, n: int) -> Progress | None:
    """What is called while the ``i``-th of ``n`` replicas is loaded."""
    if progress is None or n == 1:
        return progress
    report = progress
    return lambda done, total: report(i * total + done, n * total)
