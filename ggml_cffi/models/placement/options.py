"""Options of a caller: sizes of the context and of batches, and the expected workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ggml_cffi.enums import Type

#: The division of layers: by free ``"memory"``, by measured ``"speed"``, or in given proportions.
Balance = Literal["memory", "speed"] | Sequence[float]

#: Way to split a model over devices.
SplitMode = Literal["layer", "pipeline", "data", "tensor", "auto"]

SPLITS: tuple[str, ...] = get_args(SplitMode)


@dataclass(frozen=True)
class LoadOptions:
    """Sizes of a model's context, batches and cache."""

    n_ctx: int
    n_batch: int
    kv_dtype: Type


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


def check_options(split: str, n_batch: int) -> None:
    """Raise ValueError if there is no such split, or batches would have no tokens."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} does not exist: use one of {', '.join(map(repr, SPLITS))}")
    if n_batch < 1:
        raise ValueError(f"n_batch must be at least 1, not {n_batch}")
