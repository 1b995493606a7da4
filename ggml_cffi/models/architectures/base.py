"""Interface between an architecture and the rest of the package: sizes, tensors by layer, and the graph of a step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ggml_cffi import ops
from ggml_cffi.core import dtypes
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import INTEGERS, INTERNAL
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError, GgmlError
from ggml_cffi.files.gguf import GGUFFile, TensorInfo
from ggml_cffi.parallel.shard import ShardSpec

_logger = logging.getLogger(__name__)

#: ``pooling_type``. 0 leaves the choice to the user; the mean is the usual choice.
_POOLINGS = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
_NO_WEIGHTS = INTEGERS | INTERNAL | {Type.F64}


@dataclass(frozen=True)
class KVView:
    """A view of a cache's KV slots in a graph. A runner may change its place and its number of slots."""

    tensor: Tensor
    """The view. Its last axis in ggml's order is that of ranges, if there are any."""
    axis: int
    """Axis of the KV slots, in ggml's order."""
    slot_bytes: int
    """Bytes from one KV slot to the next."""


class KVResult(NamedTuple):
    """A contiguous intermediate of attention whose size depends on the KV slots. A runner may change the size."""

    tensor: Tensor
    axis: int = 0
    """Axis of the KV slots, in ggml's order."""


@dataclass(frozen=True)
class Inputs:
    """Input tensors of one step over ``n`` tokens."""

    tokens: Tensor
    """Token ids, I32 ``(n,)``."""
    positions: Tensor
    """Positions of the tokens in their sequences, I32 ``(n,)``."""
    kv_slots: Tensor
    """KV slots that receive the tokens' keys and values, I64 ``(n,)``."""
    mask: Tensor
    """Attention mask, F16 ``(n, n_kv)``: 0 where a token attends to a KV slot, ``-inf`` elsewhere. With ranges of KV
    slots it is ``(n_ranges, 1, 1, n_kv)``."""
    output_ids: Tensor
    """Tokens with an output, in order, I32 ``(n_out,)``. If every token has one, the graph does not use this input."""
    window_mask: Tensor | None = None
    """Mask of the layers with a sliding window; None if the architecture has no :attr:`~Architecture.window`."""
    layers: Sequence[Inputs] = ()
    """Inputs of each layer, on the device of the layer, if devices have inputs of their own."""
    sums: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] = field(default_factory=dict)
    """All-reduce of ``attention`` and ``feed_forward``, if several devices compute each layer."""
    kv_views: list[KVView] = field(default_factory=list)
    """Views of the caches, which the architecture adds. A runner may change them, together with :attr:`kv_results` and
    the masks, after the graph was built."""
    kv_results: list[KVResult] = field(default_factory=list)
    """Scores, masks made from others and copies of values, which the architecture adds. Flash attention has none."""
    wide_masks: dict[Tensor, Tensor] = field(default_factory=dict)
    """Masks as the softmax of a processor reads them fastest, by mask, which the architecture adds."""
    query_ids: Tensor | None = None
    """For each of several ranges of KV slots the token that attends to it, by its place in the batch, I32
    ``(n_ranges,)``. None if all tokens attend to one range."""
    result_ids: Tensor | None = None
    """For each token its range, I32 ``(n,)``; None with :attr:`query_ids`."""

    @property
    def n_ranges(self) -> int:
        """Number of ranges of KV slots, 0 if all tokens attend to one."""
        return 0 if self.query_ids is None else self.query_ids.shape[0]

    def for_layer(self, layer: int) -> Inputs:
        """Return the inputs for a layer: positions, rows and masks."""
        return self.layers[layer] if self.layers else self

    def all_reduced(self, part: str, contribution: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the sum over all devices of the contributions of one part of a layer, and of ``residual`` once."""
        if part in self.sums:
            return self.sums[part](contribution, residual)
        return contribution if residual is None else ops.add(residual, contribution)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer in the KV cache."""

    k: Tensor
    """``(n_ctx, size)``."""
    v: Tensor
    """``(n_ctx, size)``, or its transpose."""
    v_transposed: bool = False
    """True if ``v`` is ``(size, n_ctx)``: attention is then two matrix products instead of flash attention."""
    tiled: bool = False
    """True if flash attention is exact for many tokens nevertheless, as on a CPU, which computes it tile by tile."""
    both: Tensor | None = None
    """The memory of ``k`` and, after it, of ``v``, ``(2, n_ctx, size)``, if one node writes the new keys and values;
    see :meth:`Architecture.writes_at_once`."""


class Metadata:
    """Typed access to the metadata of a model file. Errors name the key."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self._used: set[str] = set()

    def unused(self) -> set[str]:
        """Return the keys of the architecture that nobody has read, without its name."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix) for key in self.file.metadata if key.startswith(prefix)} - self._used

    def raw(self, key: str) -> Any:
        """Return the value of ``{architecture}.{key}`` as it is, None without one."""
        self._used.add(key)
        return self.file.metadata.get(f"{self.architecture}.{key}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return the value of ``{architecture}.{key}``; raise FormatError if it has another type."""
        name = f"{self.architecture}.{key}"
        self._used.add(key)
        value = self.file.metadata.get(name, default)
        if kind is int and isinstance(value, np.ndarray):  # one number for each layer
            if not value.size or value.dtype.kind not in "iu" or (value != value[0]).any():
                raise FormatError(f"{self.file.path}: {name!r} differs from layer to layer, which is not supported yet")
            value = value[0].item()
        if value is None:
            raise FormatError(f"{self.file.path}: the model has no {name!r}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise FormatError(f"{self.file.path}: {name!r} is {value!r}, not a {kind.__name__}")
        return value

    def positive_int(self, key: str, default: int | None = None) -> int:
        """Return an integer above 0 that fits a C ``int``."""
        value: int = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise FormatError(f"{self.file.path}: {self.architecture}.{key} is {value}, not a positive number")
        return value

    def nonnegative(self, key: str, default: float | None = None) -> float:
        """Return a finite number that is not negative."""
        value: float = self.get(key, float, default)
        if not (isfinite(value) and value >= 0):
            raise FormatError(f"{self.file.path}: {self.architecture}.{key} is {value}, not a number of 0 or more")
        return value


def joined_name(layer: int, names: Iterable[str], kind: str) -> str:
    """Return the name of the tensor with the rows of several tensors ``blk.{layer}.{name}.{kind}``."""
    return f"blk.{layer}.{'+'.join(names)}.{kind}"


@dataclass(frozen=True)
class TensorParallelSpec:
    """Division of a model's layers among several devices."""

    shards: Mapping[str, ShardSpec]
    """Shard specification of the weights, by pattern of their names."""
    all_reduced: frozenset[str]
    """Parts of a layer whose contributions are all-reduced: ``attention``, ``feed_forward``."""


class Architecture(ABC):
    """Base class of a family of models. Each architecture is one subclass in one file.

    Parameters
    ----------
    file
        The model file.

    Raises
    ------
    FormatError
        If the file lacks a key or a tensor, or sizes contradict one another, or the file has tensors that the graph
        does not use: the results would be wrong without them.
    """

    name: ClassVar[str]
    """``general.architecture`` in GGUF."""

    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    kv_sizes: tuple[int, int]
    """Number of elements of a token's keys, and of its values, in one layer."""
    window: int = 0
    """Tokens to which a layer with a sliding window attends, the token itself included; 0 without such layers."""
    causal: ClassVar[bool] = True
    """True for a decoder: a token attends to earlier tokens, through the KV cache. An encoder attends to the whole
    sequence: it has no cache, and its mask is ``(n, n)``."""
    pooling: str
    """Way to get the embedding of a text from those of its tokens: ``mean``, ``cls`` (the first) or ``last``."""
    joined: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Weights of a layer, such as ``attn_q`` and ``attn_k``, that multiply the same tokens. Where their types are
    equal, one tensor holds the rows of all of them, and one product replaces several; see :func:`joined_name`."""
    joined_on_cpu: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """The same for a model on the CPU alone: GPUs compute these products, and what combines them, in one kernel."""
    max_sequence_length: int = 0
    """Largest number of tokens of a text in training, for embeddings; 0 if the context is the only limit."""

    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "classifier.output_labels",
            "expert_group_count",
            "expert_group_used_count",
            "expert_used_count",
            "rope.scaling.alpha",
            "rope.scaling.finetuned",
            "rope.scaling.original_context_length",
            "tensor_data_layout",
            "vocab_size",
        }
    )
    """Keys that llama.cpp reads for this architecture and that change nothing here."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        meta = Metadata(file, self.name)
        pooling = meta.get("pooling_type", int, 0)
        if pooling not in _POOLINGS:
            raise FormatError(f"{file.path}: pooling type {pooling} is not supported; {sorted(_POOLINGS)} are")
        self.pooling = _POOLINGS[pooling]
        self.read(meta)
        self._refuse_variants(meta)
        for key in sorted(meta.unused() - self.harmless_keys):
            _logger.warning("%s: the key %r is not known, and has no effect", file.path, f"{self.name}.{key}")
        if self.n_layers > len(file.tensors):  # before lists of this length are made
            raise FormatError(
                f"{file.path}: the metadata declares {self.n_layers} layers, but the file has only "
                f"{len(file.tensors)} tensors"
            )
        self.shapes = dict(self.expected_tensors())
        unknown = [name for name in file.tensors if name not in self.shapes and not self.is_ignored(name)]
        if unknown:
            raise FormatError(
                f"{file.path}: architecture {self.name} does not use {len(unknown)} tensors, such as "
                f"{min(unknown)!r}: without them the results would be wrong"
            )
        for name, shape in self.shapes.items():
            info = self.tensor_info(name)
            if info.shape != shape:
                raise FormatError(f"{file.path}: tensor {name!r} has shape {info.shape}; {shape} is expected")
            if info.dtype in _NO_WEIGHTS or not dtypes.is_known(info.dtype):
                raise FormatError(f"{file.path}: tensor {name!r} has type {info.dtype.name}, which no weight can have")

    def is_ignored(self, tensor: str) -> bool:
        """Return whether a tensor has no part in the results that are computed here."""
        return False

    def _refuse_variants(self, meta: Metadata) -> None:
        """Raise FormatError if the file has a variant of the architecture that is not computed here."""
        for key, kind, usual in (
            ("attention.causal", bool, self.causal),
            ("embedding_length_out", int, self.n_embd),
            ("expert_count", int, 0),
            ("nextn_predict_layers", int, 0),
        ):
            value = meta.get(key, kind, usual)
            if value != usual:
                raise FormatError(
                    f"{self.file.path}: {self.name}.{key} is {value}: only {usual} is supported for {self.name}"
                )

    def tensor_info(self, name: str) -> TensorInfo:
        """Return the file's tensor of this name; raise FormatError if there is none."""
        info = self.file.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.file.path}: the model has no tensor {name!r}")
        return info

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in the file."""
        return sum(self.tensor_info(name).nbytes for name in self.shapes)

    @abstractmethod
    def read(self, meta: Metadata) -> None:
        """Read the sizes from the metadata into attributes."""

    @abstractmethod
    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of every tensor that the graph uses, with the shape that it must have."""

    def hidden(self, weights: Mapping[str, Tensor], cache: Sequence[LayerCache], inputs: Inputs) -> Tensor:
        """Build the graph from ``inputs`` to the normalized results of the last layer, ``(n_out, n_embd)``."""
        x = self.build_layers(range(self.n_layers), self.embed(weights, inputs), weights, cache, inputs)
        return self.final_norm(weights, x)

    def flash_attention(self, context: Context, dtype: Type) -> Tensor:
        """Return a decoder's attention of one token as one node, without memory, to ask devices for support.

        Parameters
        ----------
        dtype
            Type of the keys and values in the cache.
        """
        raise NotImplementedError(f"{self.name!r} has no KV cache")

    def tiled_rows(self, dtype: Type) -> int:
        """Return the fewest tokens of a batch that a CPU attends tile by tile with a cache of this type; 0 if none."""
        return 0

    def writes_at_once(self, layer: int, weights: Mapping[str, Tensor]) -> bool:
        """Return whether one node can write new keys and values into the cache, with these weights of the layer."""
        return False

    @abstractmethod
    def embed(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """Build the graph from ``inputs`` to the input of the first layer, ``(n, n_embd)``."""

    @abstractmethod
    def build_layers(
        self,
        layers: Iterable[int],
        x: Tensor,
        weights: Mapping[str, Tensor],
        cache: Sequence[LayerCache],
        inputs: Inputs,
    ) -> Tensor:
        """Build the graph through some layers in order. Tokens are F32 ``(n, n_embd)``; after the last layer of the
        model ``(n_out, n_embd)``.
        """

    def final_norm(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Build the graph from the last layer to normalized results, both ``(n_out, n_embd)``."""
        return x

    def logits(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Build the graph from the result of :meth:`hidden` to logits ``(n_out, n_vocab)``."""
        self.check_decoder()
        return ops.mul_mat(weights["output.weight"], hidden)

    def tensor_parallel(self, n: int, *, whole_attention: bool = False) -> TensorParallelSpec:
        """Return the division of the layers among ``n`` devices.

        Parameters
        ----------
        n
            Number of devices.
        whole_attention
            True if each device computes all heads, which needs more memory and half as many all-reduces.

        Raises
        ------
        ValueError
            If the architecture has no tensor parallelism, or the model is too small for ``n`` devices.
        """
        raise ValueError(f"architecture {self.name!r} has no tensor parallelism: use one device, or pipeline stages")

    def check_decoder(self) -> None:
        """Raise ``GgmlError`` if the model is an encoder, which has no logits and generates no text."""
        if not self.causal:
            raise GgmlError(
                f"{self.file.path}: {self.name!r} is an encoder, which turns texts into vectors, and has no logits and "
                "generates no text: use Model.embed (ggml-cffi embed), or load a decoder"
            )

    @property
    def output_tensor(self) -> str:
        """Name of the output head's tensor: the token embeddings where the file ties the two."""
        return "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
