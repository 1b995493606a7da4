"""Fixtures of the commands' tests: a GGUF file, and a function that runs a command in this process."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli


@pytest.fixture
def path(tmp_path, rng):
    """Return a small model file with values and tensors of several types."""
    values = {
        "general.architecture": "llama",
        "general.name": "bell\a \x1b[31mred\n",
        "u64": np.uint64(2**63),
        "eps": 1e-5,
        "words": ["größe", "\udcff"] + ["w"] * 100,
        "numbers": np.arange(3, dtype=np.int16),
        "nested": [[1], ["x"]],
    }
    tensors = {
        "token_embd.weight": rng.standard_normal((8, 256)),
        "blk.0.attn_q.weight": rng.standard_normal((4, 256)),
        "blk.0.attn_norm.weight": rng.standard_normal(256),
        "scalar": np.array(2.5),
    }
    ggml.write_gguf(tmp_path / "m.gguf", values, tensors)
    return tmp_path / "m.gguf"


@pytest.fixture
def run_main(capsys):
    """Return a function that runs a command in this process and returns its output, or its line of error."""

    def run(*arguments, code=0):
        assert cli.main([str(a) for a in arguments]) == code
        printed = capsys.readouterr()
        if code:
            assert printed.out == ""
            assert printed.err.startswith("ggml-cffi: ")
            assert printed.err.count("\n") == 1
            return printed.err
        assert printed.err == ""
        return printed.out

    return run
