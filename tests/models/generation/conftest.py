"""Fixtures of the generation tests."""

from pathlib import Path

import numpy as np
import pytest

from tests.support import llama_float64


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Write a small random model, and return its file."""
    return llama_float64.random_model(tmp_path / "m.gguf", rng)
