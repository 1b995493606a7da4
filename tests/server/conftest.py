"""Servers that several tests use: small random models, which answer at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs pip install '.[serve]'")

from tests.support import bert_float64
from tests.support.byte_level_model import byte_level_model
from tests.support.http_server import Served, served

#: An answer that fills the context takes several seconds.
CONTEXT = 16384
OPTIONS = ("--devices", "CPU", "--threads", "1", "--ctx", CONTEXT, "--preload")
#: The template of Hermes and Qwen, with tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }} answer in <tool_call></tool_call><|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a random model with one layer and a vocabulary of bytes."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return byte_level_model(path, TEMPLATE, {"llama.context_length": CONTEXT})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a random encoder with a vocabulary of words."""
    return bert_float64.random_model(tmp_path_factory.mktemp("encoder") / "e.gguf", np.random.default_rng(1))


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Served]:
    """A server of the random model on the CPU."""
    with served(f"tiny={tiny}", *OPTIONS) as found:
        yield found
