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
from ggml_cffi.models.weights import Progress
from ggml_cffi.parallel.program import Program
from ggml_cffi.parallel.rank import Gathered, Rank
from ggml_cffi.parallel.tensor import TensorParallel
from ggml_cffi.tensor import Tensor


class TensorRunner(Closing):
    """Weights and cache of one model, on several devices.

    Each device has some heads and some of the feed-forward part of every layer, with its part of the cache, and some
    rows of the output head; norms and embeddings are on all.

    Parameters
    ----------
    architecture
        The model.
    devices
        GPUs, or the CPU alone; default all GPUs.
    n_ctx
        Rows of the cache.
    kv_dtype
        Type of the cache.
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
        n_ctx: int = 4096,
        *,
        kv_dtype: Type = Type.F16,
        half_above: int | None = None,
        threads: bool | None = None,
        n_threads: int | None = None,
        weights: Mapping[str, npt.ArrayLike | GGUFTensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.architecture, self.n_ctx = architecture, n_ctx
        self.group = TensorParallel(devices, half_above=half_above, threads=threads, n_threads=n_threads)
        """The devices."""
        try:
            self.shares = architecture.shares(len(self.group.devices))
            """Which device has what."""
            source = _named(architecture) if weights is None else weights
            self._weights = self.group.weights(source, self.shares.cuts, progress=progress)
            self._cache = [
                [
                    self.group.zeros([(n_ctx, part.kv_sizes[i]) for part in self.shares.parts], kv_dtype)
                    for i in range(2)
                ]
                for _ in range(architecture.n_layers)
            ]
            self._compute = self.group.compile(self._trace)
        except BaseException:
            self.close()
            raise

    def logits(
        self,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int64],
        mask: npt.NDArray[np.float16],
        wanted: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        """One run over ``n`` tokens.

        Parameters
        ----------
        tokens, positions, rows, mask, wanted
            As in :class:`Inputs`: ids and positions ``(n,)``, rows of the cache ``(n,)``, mask ``(n, n_kv)``, and the
            tokens whose logits are wanted ``(n_out,)``.

        Returns
        -------
        array
            ``(n_out, n_vocab)``.

        Raises
        ------
        ValueError
            If ids or rows are out of range.
        ClosedError
            If the model is closed.
        """
        out: npt.NDArray[np.float32] = self._compute(tokens, positions, rows, mask, wanted)
        return out

    def _trace(self, rank: Rank, *inputs: Tensor) -> Gathered:
        tokens, positions, rows, mask, wanted = inputs
        part: Architecture = self.shares.parts[rank]
        weights = {name: w[rank] for name, w in self._weights.items()}
        cache = [LayerCache(k[rank], v[rank]) for k, v in self._cache]
        sums = dict.fromkeys(self.shares.summed, rank.sum)
        given = Inputs(tokens, positions, rows, mask, wanted, sums=sums)
        return rank.gather(part.logits(weights, part.hidden(weights, cache, given)))

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
