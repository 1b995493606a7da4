"""Vocabularies of real models."""

import json

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.models import fetch
from tests.support.tokenizers import NAMES, tokenizer_of


def minilm_metadata():
    """Return the metadata of a GGUF file, made from Hugging Face's vocabulary."""
    vocab = json.loads((fetch("minilm") / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    texts = [
        text if (text[:1], text[-1:]) == ("[", "]") else text[2:] if text.startswith("##") else "▁" + text
        for text in sorted(vocab, key=vocab.get)
    ]
    types = np.array([3 if text in special else 1 for text in texts], np.int32)
    model = {"model": "bert", "tokens": texts, "token_type": types, "eos_token_id": 102}
    return {f"tokenizer.ggml.{key}": value for key, value in model.items()}


@pytest.fixture(scope="session")
def metadata():
    """Metadata of the models' files, by name."""
    found = {"minilm": minilm_metadata()}
    for name in ("smollm2", "gemma3"):
        with ggml.GGUFFile(fetch(name)) as file:
            found[name] = dict(file.metadata)
    return found


@pytest.fixture(scope="session")
def tokenizers(metadata):
    """Tokenizers of the models, by name."""
    return {name: tokenizer_of(metadata[name]) for name in NAMES}
