"""Data of the tests of remote devices."""

from __future__ import annotations

import numpy as np


def weight_and_input(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a square matrix and three rows to multiply by it."""
    return rng.standard_normal((64, 64), dtype=np.float32) / 8, rng.standard_normal((3, 64), dtype=np.float32)
