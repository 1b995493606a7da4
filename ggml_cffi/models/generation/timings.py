"""Counts and times of one call of ``generate``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any


@dataclass
class Timings:
    """Token counts and seconds of one call of ``generate``.

    Sequences that share a run each count the whole time of that run.
    """

    prompt_tokens: int = 0
    """Tokens of the prompts, those from the KV cache included."""
    reused_tokens: int = 0
    """Prompt tokens whose keys and values were in the KV cache, from an earlier sequence."""
    prompt_seconds: float = 0.0
    """Seconds of the runs that computed prompt tokens (prefill)."""
    decoded_tokens: int = 0
    """Generated tokens."""
    decode_steps: int = 0
    """Generated tokens that were computed: the last one of a sequence is not."""
    decode_seconds: float = 0.0
    """Seconds of the runs that computed generated tokens (decode)."""

    def __post_init__(self) -> None:
        self._lock = Lock()  # not a field: a copy, and the state that is pickled, has none

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return asdict(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def add_run(self, n: int, seconds: float, *, decoded: bool) -> None:
        """Count a run of ``n`` tokens of one sequence."""
        with self._lock:
            if decoded:
                self.decode_seconds += seconds
                self.decode_steps += n
            else:
                self.prompt_seconds += seconds

    def add_token(self) -> None:
        """Count a generated token."""
        with self._lock:
            self.decoded_tokens += 1

    def add_prompt(self, n: int, reused: int) -> None:
        """Count a prompt of ``n`` tokens, of which ``reused`` were in the KV cache."""
        with self._lock:
            self.prompt_tokens += n
            self.reused_tokens += reused

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed per second."""
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens computed per second."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0
