"""Importance matrices that ``llama-imatrix`` wrote."""

import numpy as np
import pytest

import ggml_cffi as ggml


def test_an_importance_matrix_is_read_from_a_file(tmp_path):
    path = tmp_path / "imatrix.gguf"
    sums = {
        "a.weight.in_sum2": np.full((1, 4), 6.0),
        "a.weight.counts": np.full((1, 1), 3.0),
        "b.weight.in_sum2": np.array([[2.0, 4.0], [8.0, 9.0], [5.0, 5.0]]),
        "b.weight.counts": np.array([[2.0], [0.0], [5.0]]),
    }
    ggml.write_gguf(path, {"general.type": "imatrix"}, sums)
    found = ggml.read_imatrix(path)
    assert {name: w.tolist() for name, w in found.items()} == {
        "a.weight": [[2, 2, 2, 2]],
        "b.weight": [[1, 2], [1, 1], [1, 1]],
    }
    del sums["b.weight.counts"]
    ggml.write_gguf(path, {}, sums)
    with pytest.raises(ggml.FormatError, match=r"'b.weight.in_sum2' has no counts"):
        ggml.read_imatrix(path)
    ggml.write_gguf(path, {}, sums | {"b.weight.counts": np.ones((2, 1))})
    with pytest.raises(ggml.FormatError, match="3 rows and 2 counts"):
        ggml.read_imatrix(path)
    ggml.write_gguf(path, {}, {"a.weight": np.ones(3)})
    with pytest.raises(ggml.FormatError, match="no importance matrix"):
        ggml.read_imatrix(path)
