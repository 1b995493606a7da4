"""A small random model, and its splits."""

import pytest

from tests.support import llama_float64


@pytest.fixture
def path(tmp_path, rng):
    """Return the file of a llama model with 3 layers."""
    return llama_float64.random_model(tmp_path / "m.gguf", rng)
