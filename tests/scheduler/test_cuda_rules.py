"""Rules about nodes that CUDA's kernels do not compute, although its backend reports support for them."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import Op, OpPool, Prec, Type
from ggml_cffi.scheduler import cuda_rules
from tests import cases
from tests.support import relative_error, skip_if_newer_needed

LAYOUT, TYPES, SIZES, PRECISION = "layout", "types", "sizes", "precision"


def faults(result):
    """Return the reasons for the nodes of a result, without those that are right."""
    with ggml.Graph(result) as graph:
        return [reason for p in graph.node_pointers() if (reason := cuda_rules.fault(p))]


def columns(t):
    """Return all columns of ``t`` but the last: rows with gaps."""
    return ggml.view(t, (*t.shape[:-1], t.shape[-1] - 1), strides=t.nb[: t.ndim][::-1])


def swapped(t):
    """Return ``t`` with the two axes before the last swapped."""
    axes = list(range(t.ndim))
    axes[-2], axes[-3] = axes[-3], axes[-2]
    return ggml.permute(t, axes)


def maker(ctx):
    return lambda *shape, dtype="f32": ctx.new_tensor(dtype, shape)


def experts(t, ids, dtype="f32", prec=Prec.DEFAULT):
    """Return a product with the experts that ``ids`` names for each token."""
    out = ggml.mul_mat_id(t(3, 16, 64, dtype=dtype), t(ids.shape[0], 1, 64), ids)
    out.ptr.op_params[0] = prec
    return out


#: Operations that kernels compute, and the same in a form that they do not compute, with a word of the reason.
PAIRS = [
    (lambda t: ggml.sqr(t(4, 8)), lambda t: ggml.sqr(columns(t(4, 8))), LAYOUT),
    (lambda t: ggml.sin(t(2, 4, 8)), lambda t: ggml.sin(swapped(t(2, 4, 8))), LAYOUT),
    (lambda t: ggml.log(t(4, 8, dtype="f16")), lambda t: ggml.log(columns(t(4, 8, dtype="f16"))), LAYOUT),
    (lambda t: ggml.argmax(t(3, 65)), lambda t: ggml.argmax(columns(t(3, 65))), LAYOUT),
    (lambda t: ggml.diag(t(3, 1, 5)), lambda t: ggml.diag(columns(t(3, 1, 5))), LAYOUT),
    (
        lambda t: ggml.count_equal(t(6, 9, dtype="i32"), t(6, 9, dtype="i32")),
        lambda t: ggml.count_equal(columns(t(6, 9, dtype="i32")), t(6, 8, dtype="i32")),
        LAYOUT,
    ),
    (lambda t: ggml.set(t(4, 6), t(2, 3)), lambda t: ggml.set(t(4, 6), columns(t(2, 4))), LAYOUT),
    (lambda t: ggml.set(t(4, 6), t(3, 1)), lambda t: ggml.set(t(4, 4, 6), t(3, 2, 1)), LAYOUT),
    (lambda t: ggml.cumsum(t(4, 8)), lambda t: ggml.cumsum(swapped(t(3, 4, 8))), LAYOUT),
    (lambda t: ggml.add(columns(t(4, 8)), t(4, 7)), lambda t: ggml.add(t(4, 64, dtype="q8_0"), t(4, 64)), TYPES),
    (lambda t: ggml.rms_norm(columns(t(4, 8)), 1e-5), lambda t: ggml.rms_norm_inplace(columns(t(4, 8)), 1e-5), LAYOUT),
    (
        lambda t: ggml.cpy(ggml.transpose(t(6, 8)), t(8, 6)),
        lambda t: ggml.cpy(ggml.transpose(t(6, 8)), columns(t(8, 7))),
        LAYOUT,
    ),
    (
        lambda t: ggml.pool_1d(t(3, 9), OpPool.AVG, 3),
        lambda t: ggml.pool_1d(t(3, 9, dtype="f16"), OpPool.AVG, 3),
        TYPES,
    ),
    (
        lambda t: ggml.im2col(t(1, 2, 2, 2), t(2, 2, 4, 5), dtype=Type.F16),
        lambda t: ggml.im2col(t(1, 2, 2, 2), t(2, 2, 4, 5, dtype="f16"), dtype=Type.F16),
        TYPES,
    ),
    (
        lambda t: ggml.conv_transpose_1d(t(4, 5), t(4, 2, 3), stride=3),
        lambda t: ggml.conv_transpose_1d(columns(t(4, 6)), t(4, 2, 3), stride=3),
        LAYOUT,
    ),
    (
        lambda t: ggml.get_rows_back(t(4, 33), t(4, dtype="i32"), n_rows=9),
        lambda t: ggml.get_rows_back(columns(t(4, 33)), t(4, dtype="i32"), n_rows=9),
        LAYOUT,
    ),
    (
        lambda t: ggml.flash_attn_ext(t(4, 2, 128), t(4, 64, 128), t(4, 64, 128), scale=1, logit_softcap=5.0),
        lambda t: ggml.flash_attn_ext(t(4, 2, 64), t(4, 64, 64), t(4, 64, 64), scale=1, logit_softcap=5.0),
        "logit_softcap",
    ),
    (
        lambda t: ggml.gated_linear_attn(*(t(4, 2, 64) for _ in range(4)), t(1, 2 * 64 * 64), scale=1.0),
        lambda t: ggml.gated_linear_attn(*(t(4, 2, 32) for _ in range(4)), t(1, 2 * 32 * 32), scale=1.0),
        SIZES,
    ),
    (lambda t: ggml.out_prod(t(5, 7), t(5, 4)), lambda t: ggml.out_prod(t(5, 7, dtype="f16"), t(5, 4)), TYPES),
    (
        lambda t: ggml.mul_mat(t(8, 31), columns(t(4, 32))),
        lambda t: ggml.mul_mat(t(8, 32), columns(t(4, 33))),
        LAYOUT,
    ),
    (
        lambda t: experts(t, ggml.argsort(t(12, 3)), "f16"),
        lambda t: experts(t, t(12, 2, dtype="i32"), "f16"),
        "twice",
    ),
    (
        lambda t: experts(t, t(12, 1, dtype="i32"), "f16"),
        lambda t: experts(t, t(12, 1, dtype="i32"), "f16", prec=Prec.F32),
        PRECISION,
    ),
    (lambda t: ggml.soft_max(t(4, 4)), lambda t: ggml.diag_mask_inf(t(4, 4), 0), "soft_max_ext"),
]


@pytest.mark.parametrize(("right", "wrong", "word"), PAIRS, ids=lambda value: "" if callable(value) else value)
def test_nodes_that_kernels_do_not_compute_are_found(right, wrong, word):
    with ggml.Context() as ctx, skip_if_newer_needed():
        t = maker(ctx)
        assert faults(right(t)) == []
        (reason,) = faults(wrong(t))
        assert word in reason


def test_expert_numbers_of_an_order_are_distinct():
    """Parts of the rows of an order, and copies of these, name no expert twice; rows that are joined may."""
    with ggml.Context() as ctx:
        t = maker(ctx)
        order = ggml.argsort(t(12, 3))
        first = ggml.view(order, (12, 2), strides=(order.nb[1], order.nb[0]))
        for ids in (order, first, ggml.cont(first)):
            assert faults(experts(t, ids)) == []
        shifted = ggml.view(order, (11, 2), strides=(order.nb[1], order.nb[0]), offset=2 * order.nb[0])
        for ids in (shifted, ggml.reshape(order, (6, 6))):
            (reason,) = faults(experts(t, ids))
            assert "twice" in reason


def test_contiguous_f32_needs_the_cpu_in_few_operations():
    """Compare with the operations whose kernels lack something for F32."""
    found = set()
    for case in cases.CASES:
        if all(spec.layout == "contiguous" and spec.dtype in (Type.F32, Type.I32) for spec in case.operands().values()):
            with ggml.Context() as ctx, skip_if_newer_needed():
                result, _ = case.build(ctx)
                with ggml.Graph(result) as graph:
                    found |= {Op(p.op).name for p in graph.node_pointers() if cuda_rules.fault(p)}
    lacking = {"DIAG_MASK_INF", "GATED_DELTA_NET", "GATED_LINEAR_ATTN", "MUL_MAT_ID", "SSM_CONV", "REPEAT"}
    assert found <= lacking | {"RWKV_WKV6", "RWKV_WKV7", "GROUP_NORM"}


def test_found_nodes_are_computed_by_the_cpu(devices, rng):
    """On devices without CUDA's kernels, no such node is moved, and all give the same result."""
    x = rng.standard_normal((5, 8)).astype(np.float32)
    with ggml.Session(devices) as session:
        f = session.compile(lambda x: ggml.soft_max(ggml.diag_mask_inf(ggml.add(x, x), 2)))
        want = np.exp(2.0 * x) * (np.arange(8) <= 2 + np.arange(5)[:, None])
        assert relative_error(f(x), want / want.sum(-1, keepdims=True)) <= 1e-5
