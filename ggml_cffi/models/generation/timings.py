"""Counts and times of one call of ``generate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock


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
    decode_seconds: float = 0.0
    """Seconds of the runs that computed generated tokens (decode)."""

    _lock: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)

    def add_run(self, n: int, seconds: float, *, decoded: bool) -> None:
        """Count a run of ``n`` tokens of one sequence."""
        with self._lock:
            if decoded:
                self.decode_seconds += seconds
                self.decoded_tokens += n
            else:
                self.prompt_seconds += seconds

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
        """Generated tokens per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0
