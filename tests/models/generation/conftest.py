"""Fixtures of the generation tests."""

from pathlib import Path

import numpy as np
import pytest

from ggml_cffi.models import Tokenizer
from tests.support import llama_float64
from tests.support.byte_level_model import byte_level_model
from tests.support.generation import tokenizer_of


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Write a small random model, and return its file."""
    return llama_float64.random_model(tmp_path / "m.gguf", rng)


@pytest.fixture
def bytes_path(tmp_path: Path) -> Path:
    """Write a small random model whose tokens are the 256 bytes and a few control tokens, and return its file."""
    return byte_level_model(tmp_path / "bytes.gguf")


@pytest.fixture
def tokenizer(bytes_path: Path) -> Tokenizer:
    """Return the tokenizer of :func:`bytes_path`."""
    return tokenizer_of(bytes_path)
