"""Interface between an architecture and the rest of the package: sizes, tensors by layer, and the graph of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar

from ggml_cffi import ops
from ggml_cffi.core.dtypes import INTEGERS, INTERNAL
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf import GGUFFile, TensorInfo
from ggml_cffi.parallel.shard import ShardSpec

#: ``pooling_type``. 0 leaves the choice to the user; the mean is the usual choice.
_POOLINGS = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
_NO_WEIGHTS = INTEGERS | INTERNAL | {Type.F64}


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
    """Attention mask, F16 ``(n, n_kv)``: 0 where a token attends to a KV slot, ``-inf`` elsewhere."""
    output_ids: Tensor
    """Tokens with an output, in order, I32 ``(n_out,)``. If every token has one, the graph does not use this input."""
    window_mask: Tensor | None = None
    """Mask of the layers with a sliding window; None if the architecture has no :attr:`~Architecture.window`."""
    layers: Sequence[Inputs] = ()
    """Inputs of each layer, on the device of the layer, if devices have inputs of their own."""
    sums: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """All-reduce of ``attention`` and ``feed_forward``, if several devices compute each layer."""

    def for_layer(self, layer: int) -> Inputs:
        """Return the inputs for a layer: positions, rows and masks."""
        return self.layers[layer] if self.layers else self

    def all_reduced(self, part: str, contribution: Tensor) -> Tensor:
        """Return the sum over all devices of the contributions of one part of a layer."""
        return self.sums[part](contribution) if part in self.sums else contribution


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer in the KV cache."""

    k: Tensor
    """``(n_ctx, size)``."""
    v: Tensor
    """``(n_ctx, size)``, or its transpose."""
    v_transposed: bool = False
    """True if ``v`` is ``(size, n_ctx)``: attention is then two matrix products instead of flash attention."""


class Metadata:
    """Typed access to the metadata of a model file. Errors name the key."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return the value of ``{architecture}.{key}``; raise FormatError if it has another type."""
        name = f"{self.architecture}.{key}"
        value = self.file.metadata.get(name, default)
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
        If the file lacks a key or a tensor, or sizes contradict one another.
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
    max_sequence_length: int = 0
    """Largest number of tokens of a text in training, for embeddings; 0 if the context is the only limit."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        meta = Metadata(file, self.name)
        pooling = meta.get("pooling_type", int, 0)
        if pooling not in _POOLINGS:
            raise FormatError(f"{file.path}: pooling type {pooling} is not supported; {sorted(_POOLINGS)} are")
        self.pooling = _POOLINGS[pooling]
        self.read(meta)
        if self.n_layers > len(file.tensors):  # before lists of this length are made
            raise FormatError(
                f"{file.path}: the metadata declares {self.n_layers} layers, but the file has only "
                f"{len(file.tensors)} tensors"
            )
        self.shapes = dict(self.expected_tensors())
        for name, shape in self.shapes.items():
            info = self.tensor_info(name)
            if info.shape != shape:
                raise FormatError(f"{file.path}: tensor {name!r} has shape {info.shape}; {shape} is expected")
            if info.dtype in _NO_WEIGHTS:
                raise FormatError(f"{file.path}: tensor {name!r} has type {info.dtype.name}, which no weight can have")

    def tensor_info(self, name: str) -> TensorInfo:
        """Return the file's tensor of this name; raise FormatError if there is none."""
        info = self.file.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.file.path}: the model has no tensor {name!r}")
        return info

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

    @property
    def output_tensor(self) -> str:
        """Name of the output head's tensor: the token embeddings where the file ties the two."""
        return "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
