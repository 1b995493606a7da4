"""A model whose layers several devices share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi._handle import Closing
from ggml_cffi.device import Device
from ggml_cffi.enums import Type
from ggml_cffi.gguf import GGUFTensor
from ggml_cffi.models.architecture import Architecture, Inputs, LayerCache
from ggml_cffi.models.runner import KV_STEP, Batch
from ggml_cffi.models.weights import Progress, is_across
from ggml_cffi.parallel.program import Program
from ggml_cffi.parallel.rank import Gathered, Rank
from ggml_cffi.parallel.tensor import TensorParallel
from ggml_cffi.tensor import Tensor


class TensorRunner(Closing):
    """Weights and cache of one model, on several devices; runs as :class:`~ggml_cffi.models.runner.Runner` does.

    Each device has some heads and some of the feed-forward part of every layer, with its part of the cache, and some
    rows of the output head; norms and embeddings are on all.

    Parameters
    ----------
    architecture
        The model.
    devices
        GPUs, or the CPU alone; default all GPUs.
    n_rows
        Rows of the KV cache.
    n_batch
        Most tokens of one run.
    kv_dtype
        Type of keys and values in the cache.
    half_above, threads, n_threads
        As for :class:`TensorParallel`.
    weights
        By name, in place of the file's.
    progress
        Called with bytes done and bytes in all while weights are loaded.

    Raises
    ------
    ValueError
        If the devices cannot share a model, or this one is too small for so many.
    OutOfMemoryError
        If a device has no room.
    """

    def __init__(
        self,
        architecture: Architecture,
        devices: Iterable[Device | str] | None = None,
        n_rows: int = 4096,
        n_batch: int = 512,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
        *,
        half_above: int | None = None,
        threads: bool | None = None,
        n_threads: int | None = None,
        weights: Mapping[str, npt.ArrayLike | GGUFTensor] | None = None,
    ) -> None:
        self.architecture, self.n_batch = architecture, n_batch
        self.n_rows = -(-n_rows // KV_STEP) * KV_STEP
        """Rows of the cache: a multiple of :data:`KV_STEP`."""
        self.group = TensorParallel(devices, half_above=half_above, threads=threads, n_threads=n_threads)
        """The devices."""
        try:
            self.shares = architecture.shares(len(self.group.devices))
            """How weights are cut, and what is added up."""
            source = _named(architecture) if weights is None else weights
            self.weights = self.group.weights(source, self.shares.cuts, progress=progress)
            """By name, the part of each device."""
            # The CPU's flash attention sums in F16: see is_across.
            self._across = is_across(self.group.backends[0], kv_dtype)
            self._cache = [self._new_cache(i, kv_dtype) for i in range(architecture.n_layers)]
            self._compute = self.group.compile(self._trace)
        except BaseException:
            self.close()
            raise

    def _new_cache(self, i: int, dtype: Type) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of layer ``i``: for each device rows for as many heads as its projections have."""
        k, v = ([(self.n_rows, w.shape[0]) for w in self.weights[f"blk.{i}.attn_{x}.weight"]] for x in "kv")
        if self._across:
            v = [shape[::-1] for shape in v]
        return self.group.zeros(k, dtype, name=f"cache_k.{i}"), self.group.zeros(v, dtype, name=f"cache_v.{i}")

    def n_kv(self, end: int) -> int:
        """How many cache rows a run looks at whose last row in use is before ``end``."""
        return min(-(-max(end, 1) // KV_STEP) * KV_STEP, self.n_rows)

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Logits ``(n_out, n_vocab)`` of the tokens of ``batch`` that are wanted.

        Raises
        ------
        ValueError
            If ids or rows are out of range.
        ClosedError
            If the model is closed.
        """
        given: list[npt.NDArray[Any]] = [batch.tokens, batch.positions, batch.rows, batch.mask, batch.wanted]
        if self.architecture.window:
            given.append(batch.near if batch.near is not None else batch.mask)
        out: npt.NDArray[np.float32] = self._compute(*given)
        return out

    def _trace(self, rank: Rank, *inputs: Tensor) -> Gathered:
        weights = {name: parts[rank] for name, parts in self.weights.items()}
        cache = [LayerCache(k[rank], v[rank], self._across) for k, v in self._cache]
        tokens, positions, rows, mask, wanted, *windowed = inputs
        near = windowed[0] if windowed else None
        sums = dict.fromkeys(self.shares.summed, rank.sum)
        given = Inputs(tokens, positions, rows, mask, wanted, near, sums=sums)
        return rank.gather(self.architecture.logits(weights, self.architecture.hidden(weights, cache, given)))

    @property
    def programs(self) -> tuple[Program, ...]:
        """The graphs that are kept, the last used last."""
        return self._compute.programs

    @property
    def closed(self) -> bool:
        """Whether the model is closed."""
        return self.group.closed

    def close(self) -> None:
        """Free weights, cache and devices."""
        self.group.close()


def _named(architecture: Architecture) -> dict[str, Any]:
    """The weights of a model's file. The output head is a weight of its own: it is cut, and the embeddings are not."""
    file = architecture.file
    found = {name: file[name] for name in architecture.shapes}
    found["output.weight"] = file[architecture.output_tensor]
    return found
