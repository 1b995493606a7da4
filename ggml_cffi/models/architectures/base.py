"""What an architecture tells the rest: its sizes, which tensors belong to which layer, and how to build its graph."""

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
from ggml_cffi.files.gguf.reader import GGUFFile, TensorInfo
from ggml_cffi.parallel.shard import ShardSpec

#: ``pooling_type``. 0 leaves the choice to the user, for which the mean is the usual one.
_POOLINGS = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
_NO_WEIGHTS = INTEGERS | INTERNAL | {Type.F64}


@dataclass(frozen=True)
class Inputs:
    """The inputs of one run over ``n`` tokens."""

    tokens: Tensor
    """Token ids, I32 ``(n,)``."""
    positions: Tensor
    """Positions in the text, I32 ``(n,)``."""
    rows: Tensor
    """Where in the cache the tokens' keys and values go, I64 ``(n,)``."""
    mask: Tensor
    """What each token may look at, F16 ``(n, n_kv)``: 0 or ``-inf``."""
    wanted: Tensor
    """Tokens whose results are wanted, in their order, I32 ``(n_out,)``. Where that is all of them, an architecture
    leaves it out of its graph."""
    near: Tensor | None = None
    """As ``mask``, for layers with a sliding window; there if the architecture has a :attr:`~Architecture.window`."""
    layers: Sequence[Inputs] = ()
    """For each layer the inputs where it is computed, if each device has its own."""
    sums: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Where several devices share the layers: what adds up their contributions to ``attention``, ``feed_forward``."""

    def at(self, layer: int) -> Inputs:
        """The inputs for a layer: positions, rows and masks."""
        return self.layers[layer] if self.layers else self

    def added(self, part: str, contribution: Tensor) -> Tensor:
        """What a part of a layer adds to the tokens, over all devices."""
        return self.sums[part](contribution) if part in self.sums else contribution


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer."""

    k: Tensor
    """``(n_ctx, size)``."""
    v: Tensor
    """``(n_ctx, size)``, or its transpose."""
    across: bool = False
    """Whether ``v`` is ``(size, n_ctx)``, for attention as two products instead of flash attention."""


class Metadata:
    """Typed access to the metadata of a model file, with errors that name the key."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of ``{architecture}.{key}``, checked for its type."""
        name = f"{self.architecture}.{key}"
        value = self.file.metadata.get(name, default)
        if value is None:
            raise FormatError(f"{self.file.path}: the model has no {name!r}")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
            raise FormatError(f"{self.file.path}: {name!r} is {value!r}, not a {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """An integer above 0 (and of a size that C can hold)."""
        value: int = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise FormatError(f"{self.file.path}: {self.architecture}.{key} is {value}, not a positive number")
        return value

    def at_least_0(self, key: str, default: float | None = None) -> float:
        """A finite number that is not negative."""
        value: float = self.get(key, float, default)
        if not (isfinite(value) and value >= 0):
            raise FormatError(f"{self.file.path}: {self.architecture}.{key} is {value}, not a number of 0 or more")
        return value


@dataclass(frozen=True)
class TensorParallelSpec:
    """How several devices share the layers of a model."""

    cuts: Mapping[str, ShardSpec]
    """How weights are cut, by pattern of their names."""
    summed: frozenset[str]
    """The parts of a layer whose contributions are added up: ``attention``, ``feed_forward``."""


class Architecture(ABC):
    """A family of models. One subclass, in one file, for each.

    Parameters
    ----------
    file
        The model file.

    Raises
    ------
    FormatError
        If the file lacks something or sizes contradict one another.
    """

    name: ClassVar[str]
    """``general.architecture`` in GGUF."""

    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    kv_sizes: tuple[int, int]
    """Elements of a token's keys and values in one layer."""
    window: int = 0
    """Tokens that layers with a sliding window look back at, their own included; 0 where there are no such layers."""
    causal: ClassVar[bool] = True
    """Whether tokens look at those before them, through a cache. An encoder's look at their whole text instead: it
    has no cache, and its mask is ``(n, n)``."""
    pooling: str
    """How a text's embedding comes from its tokens': ``mean``, ``cls`` (the first) or ``last``."""
    longest_text: int = 0
    """Most tokens of a text for its embedding to be as in training; 0 where that is all that fit the context."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        meta = Metadata(file, self.name)
        pooling = meta.get("pooling_type", int, 0)
        if pooling not in _POOLINGS:
            raise FormatError(f"{file.path}: pooling type {pooling} is not supported; {sorted(_POOLINGS)} are")
        self.pooling = _POOLINGS[pooling]
        self.read(meta)
        if self.n_layers > len(file.tensors):  # before a list is made of that many
            raise FormatError(f"{file.path}: {self.n_layers} layers, but only {len(file.tensors)} tensors")
        self.shapes = dict(self.expected_tensors())
        for name, shape in self.shapes.items():
            info = self.info(name)
            if info.shape != shape:
                raise FormatError(f"{file.path}: tensor {name!r} has shape {info.shape}; {shape} is expected")
            if info.dtype in _NO_WEIGHTS:
                raise FormatError(f"{file.path}: tensor {name!r} has type {info.dtype.name}, which no weight can have")

    def info(self, name: str) -> TensorInfo:
        """The file's tensor of this name, or FormatError."""
        info = self.file.tensors.get(name)
        if info is None:
            raise FormatError(f"{self.file.path}: the model has no tensor {name!r}")
        return info

    @abstractmethod
    def read(self, meta: Metadata) -> None:
        """Set the sizes from the metadata."""

    @abstractmethod
    def expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor that the graph uses, with the shape that it must have."""

    def hidden(self, weights: Mapping[str, Tensor], cache: Sequence[LayerCache], inputs: Inputs) -> Tensor:
        """The graph from ``inputs`` to the normalized results of the last layer ``(n_out, n_embd)``."""
        x = self.through(range(self.n_layers), self.embed(weights, inputs), weights, cache, inputs)
        return self.finish(weights, x)

    @abstractmethod
    def embed(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """The graph from ``inputs`` to what goes into the first layer, ``(n, n_embd)``."""

    @abstractmethod
    def through(
        self,
        layers: Iterable[int],
        x: Tensor,
        weights: Mapping[str, Tensor],
        cache: Sequence[LayerCache],
        inputs: Inputs,
    ) -> Tensor:
        """The graph through some layers, one after another: F32 ``(n, n_embd)`` in and out, ``(n_out, n_embd)`` after
        the last layer of all.
        """

    def finish(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The graph from the last layer to normalized results, both ``(n_out, n_embd)``."""
        return x

    def logits(self, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The graph from :meth:`hidden` to logits ``(n_out, n_vocab)``."""
        return ops.mul_mat(weights["output.weight"], hidden)

    def tensor_parallel(self, n: int, *, whole_attention: bool = False) -> TensorParallelSpec:
        """How ``n`` devices share the layers; with ``whole_attention`` each computes all heads, which takes more memory
        and half of the sums.

        Raises
        ------
        ValueError
            If they cannot, or the model is too small.
        """
        raise ValueError(f"models of architecture {self.name!r} cannot be shared by several devices, layer by layer")

    @property
    def output_tensor(self) -> str:
        """The tensor of the output head; the token embeddings where the two are tied."""
        return "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
