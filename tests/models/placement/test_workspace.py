"""Memory that GPU backends allocate themselves."""

import ggml_cffi as ggml
from ggml_cffi.c import library
from ggml_cffi.models.placement.workspace import workspace_bytes


def test_workspace_is_estimated_for_large_products():

    with ggml.Context() as ctx:
        w, deep = ctx.new_tensor("f16", (512, 256)), ctx.new_tensor("f16", (512, 2048))
        x = ctx.new_tensor("f32", (64, 256))
        few, halves = ctx.new_tensor("f32", (4, 2048)), ctx.new_tensor("f16", (64, 2048))
        many = ctx.new_tensor("f32", (64, 2048))

        def estimate(*products):
            with ggml.Graph(*products) as graph:
                return workspace_bytes(graph.node_pointers())

        assert estimate(ggml.mul_mat(deep, few)) == 0
        assert estimate(ggml.mul_mat(w, x), ggml.neg(x)) == 64 * 256 * 2
        assert estimate(ggml.mul_mat(deep, many)) == 64 * 2048 * 2 + (12 << 20)
        assert estimate(ggml.mul_mat(deep, halves)) == 12 << 20


def test_workspace_is_estimated_for_attention_with_quantized_caches():
    """ggml 0.25 decodes both caches to F16 for 64 queries or more."""
    with ggml.Context() as ctx:

        def estimate(dtype, queries):
            q = ctx.new_tensor("f32", (4, queries, 64))
            k, v = (ctx.new_tensor(dtype, (2, 256, 64)) for _ in range(2))
            with ggml.Graph(ggml.flash_attn_ext(q, k, v, scale=0.125)) as graph:
                return workspace_bytes(graph.node_pointers())

        assert estimate("q8_0", 63) == estimate("f16", 64) == 0
        newer = library.provides("ggml_prec_set_acc")
        assert estimate("q8_0", 64) == (2 * 2 * (2 * 256 * 64) if newer else 0)
