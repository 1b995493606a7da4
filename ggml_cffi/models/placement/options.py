"""Options of a caller: sizes of the context and of batches, and the expected workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ggml_cffi.core import text
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.numbers import as_integer
from ggml_cffi.enums import Type

#: The division of layers: by free ``"memory"``, by measured ``"speed"``, or in given proportions.
Balance = Literal["memory", "speed"] | Sequence[float]

#: Way to split a model over devices.
SplitMode = Literal["layer", "pipeline", "data", "tensor", "auto"]

SPLITS: tuple[str, ...] = get_args(SplitMode)

#: Bytes of each GPU's free memory that no placement uses. Plans count all buffers of a model. They do not count the
#: memory of the driver, compiled kernels, and the rounding of allocations to pages: some ten MiB, since a plan of 8B
#: agreed within 0.3 % with the memory that GPUs reported as used (docs/tested.md). The rest is for other programs,
#: such as a desktop, whose use of memory changes while a model is loaded.
RESERVE = 512 << 20
#: Part of the free memory that the weights may take of a processor that repacks some of them. The system cannot drop
#: these, while it drops mapped weights when memory is short.
REPACKED = 1 / 2
#: Part of the free memory that is the reserve of a GPU with less than 8 GiB free.
SMALL_RESERVE = 1 / 16


@dataclass(frozen=True)
class LoadOptions:
    """Sizes of a model's context, batches and cache, the memory that stays free, and the layout of weights."""

    n_ctx: int
    """Tokens for which the KV cache has room: those of one context, or more."""
    n_batch: int
    kv_dtype: Type
    reserve: int | None = None
    """Bytes of each GPU's free memory that stay free; None for the default."""
    repack: bool | None = None
    """True to repack weights of the CPU, False to map them; None to repack them if there are no GPUs, and memory."""

    def repacks(self, backends: Sequence[Backend], weight_bytes: int) -> bool:
        """Return whether a runner of some backends repacks weights of the CPU, of all weights of a model."""
        if self.repack is not None:
            return self.repack
        return len(backends) == 1 and weight_bytes <= REPACKED * backends[0].device.memory().free

    def reserve_of(self, free: int, *, is_cpu: bool) -> int:
        """Return the bytes that stay free on a device with ``free`` bytes; 0 on the CPU.

        The system can take the CPU's memory back: it drops mapped weights, or swaps.
        """
        if is_cpu:
            return 0
        return min(RESERVE, int(free * SMALL_RESERVE)) if self.reserve is None else self.reserve


@dataclass(frozen=True)
class Workload:
    """Requests that a model is loaded for."""

    n_sequences: int = 1
    """Number of sequences that are generated at once."""
    expected_tokens: tuple[int, int] | None = None
    """Tokens of a prompt and of its answer; None if they are unknown."""

    def __post_init__(self) -> None:
        expected = self.expected_tokens
        if self.n_sequences < 1:
            raise ValueError(f"n_sequences must be at least 1, not {self.n_sequences}")
        if expected is not None and (len(expected) != 2 or min(expected) < 0 or not any(expected)):
            raise ValueError(
                f"expected_tokens must be the tokens of a prompt and of an answer, not both 0, not {expected!r}"
            )


def parse_reserve(reserve: int | str | None) -> int | None:
    """Return a reserve in bytes, from bytes or a text such as ``"1G"``; None for the default.

    Raises
    ------
    ValueError
        If it is not a size.
    """
    try:
        return None if reserve is None else text.parse_size(reserve)
    except ValueError as error:
        raise ValueError(f"reserve {error}") from None


def check_options(split: str, n_batch: int) -> None:
    """Raise ValueError if there is no such split, or batches would have no tokens."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist: use one of {', '.join(map(repr, SPLITS))}")
    if n_batch < 1:
        raise ValueError(f"n_batch must be at least 1, not {n_batch}")


def check_kv_slots(kv_slots: int | None, n_ctx: int) -> int:
    """Return the tokens for which the KV cache has room: by default one context.

    Raises
    ------
    ValueError
        If that is less than one context.
    """
    if kv_slots is None:
        return n_ctx
    if as_integer("kv_slots", kv_slots, 1) < n_ctx:
        raise ValueError(f"kv_slots must be at least n_ctx, which is {n_ctx}, not {kv_slots}")
    return kv_slots
