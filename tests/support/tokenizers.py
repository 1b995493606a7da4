"""Tokenizers of changed and of small vocabularies, and the recorded answers of llama.cpp."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi.enums import GGUFType
from ggml_cffi.models import Tokenizer
from tests.scripts.make_tokens import digest
from tests.support import DATA, gguf_writer, random_text

NAMES = ("smollm2", "gemma3", "minilm")
TEXTS = random_text.texts()
ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.text("ab▁Ġ <>s/\n\0", max_size=40),
    st.text(st.characters(categories=["Cs", "Co", "Cn", "Mn", "Zs", "So"]), max_size=20),
)


GPT2 = {"model": "gpt2", "tokens": ["a", "b", "ab", "</s>"], "merges": ["a b"]}

LLAMA = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "<0x0A>", "▁"],
    "scores": (GGUFType.ARRAY, (GGUFType.FLOAT32, [0.0, 0.0, 0.0, -1.0, -2.0, -0.5, 0.0, -3.0])),
    "token_type": [2, 3, 3, 1, 1, 1, 6, 1],
}

BERT = {"model": "bert", "tokens": ["[UNK]", "[CLS]", "[SEP]", "▁a", "b"], "token_type": [3, 3, 3, 1, 1]}


def answers(name: str) -> dict[str, Any]:
    """Return llama.cpp's recorded answers for a model's vocabulary."""
    found: dict[str, Any] = json.loads((DATA / f"tokens_{name}.json").read_text())
    return found


def split_digests(digits: str, n: int) -> list[str]:
    """Return each of ``n`` digests that are joined to one string."""
    size = len(digits) // n
    return [digits[i : i + size] for i in range(0, len(digits), size)]


def digest_of(tokenizer: Tokenizer, text: str) -> str:
    """Return the digest of the ids of ``text``, with special tokens and without."""
    return digest(tokenizer.encode(text), tokenizer.encode(text, special=False), size=2)


def wrongly_encoded(tokenizer: Tokenizer, texts: list[str], digits: str) -> list[str]:
    """Return the texts that are encoded with other digests than ``digits``."""
    wanted = split_digests(digits, len(texts))
    return [text for text, want in zip(texts, wanted, strict=True) if digest_of(tokenizer, text) != want]


def round_trip(name: str, text: str) -> str:
    """Return what remains of ``text`` after it was encoded and decoded."""
    if name == "gemma3":
        return "<bos>" + text.replace("▁", " ")
    # SmolLM2 has no tokens for some control characters, nor for the first bytes of unassigned planes.
    missing = bytes.fromhex("04 06 13 14 16 1d f1 f2")
    return text.encode().translate(None, missing).decode("utf-8", "replace")


def tokenizer_of(metadata: dict[str, Any], *, llama_cpp: bool = True, **changes: Any) -> Tokenizer:
    """Return the tokenizer of a file with this metadata, with some keys changed; None removes a key.

    WordPiece's ids are llama.cpp's, with which the tests compare, unless ``llama_cpp`` is false.
    """
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    file: Any = SimpleNamespace(path="m.gguf", metadata={k: v for k, v in changed.items() if v is not None})
    return Tokenizer(file, llama_cpp=llama_cpp)


def tokenizer_of_file(folder: Path, base: dict[str, Any], **changes: Any) -> Tokenizer:
    """Write a file with a small vocabulary, and return its tokenizer."""
    values = {f"tokenizer.ggml.{key}": value for key, value in {**base, **changes}.items() if value is not None}
    with ggml.GGUFFile(gguf_writer.write(folder / "v.gguf", values, {})) as file:
        return Tokenizer(file)
