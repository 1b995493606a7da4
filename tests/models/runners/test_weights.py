"""Weights: names of tensors."""

from ggml_cffi.models.runners.weights import layer_of


def test_layer_of_reads_the_layer_from_the_name_of_a_weight():
    assert layer_of("blk.12.attn_q.weight") == 12
    assert layer_of("token_embd.weight") is None
    assert layer_of("blk.x.weight") is None
