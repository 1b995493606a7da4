"""Requirements of CUDA's kernels, beyond those that its backend reports.

ggml's CUDA backend reports support for nodes that its kernels do not support. Most of these kernels end the process;
others compute wrong numbers. Each rule here is a requirement of a kernel, with the reason that a user reads. A kernel
without rules of its own requires contiguous tensors.

The source is ``ggml/src/ggml-cuda`` of ggml 0.20.2 and 0.25.3, whose ROCm and MUSA backends are built from it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.enums import GluOp, Op, Prec, Type

_LAYOUT = "has tensors in a layout that CUDA's kernel does not support: use cont, or the CPU"
_TYPES = "has types that CUDA's kernel does not support: use cast, or the CPU"
_SIZES = "has sizes that CUDA's kernel does not support: use the CPU"
_PRECISION = "asks for a precision that CUDA's kernel does not have: use the CPU"
_SOFTCAP = "has a logit_softcap, which CUDA's kernels support for heads of 128, 256 and 512 only: use the CPU"
_NOT_INFINITE = "gives -3.4e38 in the place of -inf on CUDA: use soft_max_ext with a mask, or the CPU"
_NOT_DISTINCT = (
    "takes numbers of experts that may name one expert twice for a token, which CUDA's kernels do not support: take "
    "them from argsort, or use the CPU"
)

Requirement = Callable[[Any], bool]
Rule = tuple[Requirement, str]

_F16, _F32, _BF16 = Type.F16, Type.F32, Type.BF16


def fault(p: Any) -> str | None:
    """Return why CUDA's kernel does not compute a node that its backend reports as supported; None if it does.

    Parameters
    ----------
    p
        C pointer of the node.
    """
    if p.op in VIEWS:
        return None
    return next((reason for holds, reason in _RULES.get(p.op, _CONTIGUOUS) if not holds(p)), None)


# Layouts.


def _tensors(p: Any) -> list[Any]:
    return [p, *(t for t in p.src if t)]


def _is_contiguous(p: Any) -> bool:
    return all(c.ggml_is_contiguous(t) for t in _tensors(p))


def _has_dense_rows(*tensors: Any) -> bool:
    """Return whether elements of a row are adjacent. Kernels require that also of rows of one element."""
    return all(t.nb[0] == c.ggml_type_size(t.type) for t in tensors)


def _has_rows(*operands: int) -> Requirement:
    """Return the requirement that the result, and some operands, have rows without gaps."""
    return lambda p: _has_dense_rows(p, *(p.src[i] for i in operands))


def _has_contiguous(*operands: int) -> Requirement:
    """Return the requirement that the result, and those operands that are given, are contiguous."""
    return lambda p: all(c.ggml_is_contiguous(t) for t in (p, *(p.src[i] for i in operands)) if t)


def _has_glu_rows(p: Any) -> bool:
    return all(c.ggml_is_contiguous_1(t) and _has_dense_rows(t) for t in p.src if t)


def _has_copyable_layout(p: Any) -> bool:
    """Return whether the kernel for the types and layouts of a copy follows the strides of both tensors."""
    src = p.src[0]
    if c.ggml_is_contiguous(src) and c.ggml_is_contiguous(p):
        return True
    for this, other in ((src, p), (p, src)):
        if c.ggml_is_quantized(other.type):  # whole blocks are read, or written, as adjacent numbers
            return this.type == _F32 and _has_dense_rows(this) and not this.ne[0] % c.ggml_blck_size(other.type)
    if p.type != src.type:
        return True
    if src.type not in (_F32, _F16, _BF16, Type.I32):
        return False
    size = c.ggml_type_size(src.type)
    is_transposed = src.nb[1] == size and src.ne[3] == 1 and src.nb[2] == src.ne[0] * src.ne[1] * size
    if not is_transposed or _is_one_2d_copy(src, p):
        return True
    # The kernel for transposed tensors writes a contiguous result.
    return bool(c.ggml_is_contiguous(p)) and (src.ne[0] == 1 or src.nb[0] == src.ne[1] * size)


def _is_one_2d_copy(src: Any, dst: Any) -> bool:
    """Return whether a copy is one of some rows with gaps, for which the driver has a function."""
    if list(src.ne) != list(dst.ne):
        return False
    block, d = c.ggml_type_size(src.type), 0
    while d < c.GGML_MAX_DIMS and src.nb[d] == dst.nb[d] == block:
        block *= src.ne[d]
        d += 1
    return d > 0 and all(src.ne[i] == 1 for i in range(d + 1, c.GGML_MAX_DIMS)) and min(src.nb[d], dst.nb[d]) >= block


def _has_product_layout(p: Any) -> bool:
    """Return whether a product reads ``b`` in pairs of adjacent numbers, or one by one as its layout needs."""
    a, b = p.src[0], p.src[1]
    if c.ggml_is_quantized(a.type):
        # Blocks with gaps are read only where they are multiplied as they are: other ways decode them as one range.
        in_blocks = b.type == _F32 and a.type in _MULTIPLIED_IN_BLOCKS and not _is_part_of_result(a)
        return in_blocks or bool(c.ggml_is_contiguously_allocated(a))
    return bool(a.ne[0] % 2) or b.type != _F32 or not any(stride % 8 for stride in list(b.nb)[1:])


def _has_expert_layout(p: Any) -> bool:
    a, b, ids = p.src[0], p.src[1], p.src[2]
    return (
        _has_dense_rows(a, b, ids)
        and b.ne[3] == 1
        and not b.nb[2] % b.nb[1]
        and not (c.ggml_is_quantized(a.type) and _is_part_of_result(a))
        and _has_product_layout(p)
    )


def _is_part_of_result(t: Any) -> bool:
    return bool(t.view_src) and t.view_src.op != Op.NONE


def _has_update_layout(p: Any) -> bool:
    """Return whether ``b`` is not a stack of columns, for which the kernel for transposed tensors would be used."""
    b = p.src[1]
    return b.ne[0] != 1 or bool(b.ne[2] * b.ne[3] == 1)


def _has_outer_product_layout(p: Any) -> bool:
    b = p.src[1]
    transposed = bool(c.ggml_is_transposed(b))
    return _has_dense_rows(p, p.src[0]) and b.nb[1 if transposed else 0] == c.ggml_type_size(b.type)


def _has_attention_layout(p: Any) -> bool:
    """Return whether rows of queries, keys and values begin where kernels read 16 bytes at once."""
    q, k, v = p.src[0], p.src[1], p.src[2]
    return _has_dense_rows(q, k, v) and not any(
        stride % 16 for t in (q, k, v) if not c.ggml_is_quantized(t.type) for stride in list(t.nb)[1:]
    )


def _has_depthwise_layout(p: Any) -> bool:
    kernel, x = p.src[0], p.src[1]
    if c.ggml_is_contiguous(x):
        return bool(c.ggml_is_contiguous(kernel))
    channels_first = (c.ggml_type_size(kernel.type), kernel.ne[3] * kernel.nb[3], kernel.ne[0] * kernel.nb[0])
    return bool(c.ggml_is_contiguous_channels(x)) and (kernel.nb[3], kernel.nb[0], kernel.nb[1]) == channels_first


def _has_state_space_layout(p: Any) -> bool:
    """Return whether a selective scan's tensors have gaps only where the kernel follows strides."""
    s, x, dt, a, b, c_, ids = (p.src[i] for i in range(7))
    return (
        _has_dense_rows(s, x, dt, a, b, c_, ids)
        and all(map(c.ggml_is_contiguous, (p, s, ids)))
        and all(t.nb[1] == t.ne[0] * t.nb[0] for t in (x, b, c_))
    )


def _has_delta_net_layout(p: Any) -> bool:
    q, k, v, *rest = (p.src[i] for i in range(6))
    return (
        all(c.ggml_is_contiguous(t) for t in (p, *rest))
        and _has_dense_rows(q, k, v)
        and bool(c.ggml_are_same_stride(q, k))
    )


# Types.


def _has_one_type(*types: Type) -> Requirement:
    """Return the requirement that the result and all operands have one of some types, the same."""
    allowed = frozenset(types)

    def holds(p: Any) -> bool:
        found = {t.type for t in _tensors(p)}
        return len(found) == 1 and found <= allowed and (_BF16 not in found or _has_bf16())

    return holds


def _has_operands_of(*allowed: Collection[Type]) -> Requirement:
    """Return the requirement that each operand has one of the types for it."""
    return lambda p: all(not t or t.type in types for t, types in zip(p.src, allowed, strict=False))


def _has_bf16() -> bool:
    """Return whether kernels of functions of one element compute BF16. They began to in one version with a function."""
    return library.provides("ggml_prec_set_acc")


_SUMS = {(_F32, _F32, _F32), (_F32, _F16, _F32), (_F16, _F16, _F16), (_F16, _F32, _F16), (_F16, _F32, _F32)}
_BF16_SUMS = {(_BF16, _BF16, _BF16), (_BF16, _F32, _BF16)}


def _has_sum_types(p: Any) -> bool:
    types = (p.src[0].type, p.src[1].type, p.type)
    return types in _SUMS or (types in _BF16_SUMS and _has_bf16())


def _has_glu_types(p: Any) -> bool:
    return _GLU_TYPES.get(p.op_params[0], _of_elements)(p)


_of_elements = _has_one_type(_F32, _F16, _BF16)
_GLU_TYPES = {GluOp.SWIGLU_OAI: _has_one_type(_F32), GluOp.SWIGLU_CLAMP: _has_one_type(_F32, _F16)}


# Sizes.

_GRID = 65_535  # most blocks along the second and the third axis of a grid
_INT = 2**31  # kernels that count elements in 32 bits


def _fits_grid(p: Any) -> bool:
    return bool(max(p.ne[2], p.ne[3]) <= _GRID)


def _fits_flat_grid(p: Any) -> bool:
    return bool(max(p.ne[1], p.ne[2] * p.ne[3]) <= _GRID)


def _is_counted_in_32_bits(p: Any) -> bool:
    return all(c.ggml_nelements(t) < _INT for t in _tensors(p))


def _has_whole_groups(p: Any) -> bool:
    return not p.src[0].ne[2] % p.op_params[0]


def _has_softcap_kernel(p: Any) -> bool:
    return p.op_params[2] == 0 or p.src[1].ne[0] in (128, 256, 512)  # op_params[2]: bits of the cap


def _has_length_of(*lengths: int, operand: int = 0) -> Requirement:
    """Return the requirement that rows of an operand have one of some lengths."""
    return lambda p: p.src[operand].ne[0] in lengths


# Numbers.


def _keeps_precision(p: Any) -> bool:
    """Return whether a product of experts rounds operands at most as asked. Its kernels round F32 and F16."""
    return p.op_params[0] != Prec.F32 or p.src[0].type not in (_F32, _F16)


def _has_block_precision(p: Any) -> bool:
    """Return whether numbers that meet quantized weights may be rounded to 8 bits. op_params[3]: precision of ``b``."""
    return not c.ggml_is_quantized(p.src[0].type) or p.op_params[3] in (0, *_BLOCK_PRECISIONS)


def _has_distinct_experts(p: Any) -> bool:
    return bool(p.src[2].ne[0] == 1) or _has_distinct_rows(p.src[2])


def _has_distinct_rows(t: Any) -> bool:
    """Return whether no number is twice in a row: a row is one, or a part of one, of an order."""
    if t.op in (Op.ARGSORT, Op.TOP_K):
        return True
    of = t.src[0]
    if not of or t.op not in (*VIEWS, Op.CONT) or t.ne[0] > of.ne[0]:
        return False
    if t.op == Op.CONT:
        return t.ne[0] == of.ne[0] and _has_distinct_rows(of)
    start = (t.view_offs - of.view_offs) % max(of.nb[1], 1)
    inside = start + t.ne[0] * t.nb[0] <= of.ne[0] * of.nb[0]
    return inside and t.nb[0] == of.nb[0] and not t.nb[1] % max(of.nb[1], 1) and t.nb[1] > 0 and _has_distinct_rows(of)


#: Quantized types with kernels that multiply their blocks as they are, whatever their strides.
_MULTIPLIED_IN_BLOCKS = frozenset(
    {Type.Q1_0, Type.Q2_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.MXFP4, Type.NVFP4, Type.Q2_K}
    | {Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS}
    | {Type.IQ3_S, Type.IQ4_XS, Type.IQ4_NL}
)
_DECODED = frozenset(Type) - {Type.Q8_K}
_BLOCK_PRECISIONS = (Prec.Q8, Prec.Q4)

_ONLY_F32 = _has_one_type(_F32)
_HALF_OR_F32 = _has_one_type(_F32, _F16)

_CONTIGUOUS: list[Rule] = [(_is_contiguous, _LAYOUT)]
_COPY: list[Rule] = [(_has_copyable_layout, _LAYOUT)]
_OF_ONE_ELEMENT: list[Rule] = [*_CONTIGUOUS, (_of_elements, _TYPES), (_is_counted_in_32_bits, _SIZES)]
_OF_TWO: list[Rule] = [(_has_rows(), _LAYOUT), (_has_sum_types, _TYPES)]
_NORM: list[Rule] = [(_has_rows(0), _LAYOUT), (_has_contiguous(), _LAYOUT), (_ONLY_F32, _TYPES), (_fits_grid, _SIZES)]
_POOL: list[Rule] = [*_CONTIGUOUS, (_ONLY_F32, _TYPES), (_is_counted_in_32_bits, _SIZES)]
_ROTATION: list[Rule] = [
    (lambda p: all(c.ggml_is_contiguous(t) for t in (p.src[1], p.src[2]) if t), _LAYOUT),
    (_has_rows(0), _LAYOUT),
    (_has_operands_of((_F32, _F16)), _TYPES),
]
_WINDOWS: list[Rule] = [
    *_CONTIGUOUS,
    (lambda p: p.src[1].type == _F32 and p.type in (_F32, _F16), _TYPES),
]
_LINEAR_ATTENTION: list[Rule] = [*_CONTIGUOUS, (_has_length_of(64, 128), _SIZES)]
_STRIDED: list[Rule] = []

_RULES: dict[int, list[Rule]] = {
    Op.ADD: _OF_TWO,
    Op.SUB: _OF_TWO,
    Op.MUL: _OF_TWO,
    Op.DIV: _OF_TWO,
    Op.ADD1: _OF_TWO,
    Op.ADD_ID: [
        (_has_rows(0, 1, 2), _LAYOUT),
        (_has_contiguous(), _LAYOUT),
        (_has_operands_of((_F32,), (_F32,), (Type.I32,)), _TYPES),
        (_fits_grid, _SIZES),
    ],
    Op.REPEAT: [(_has_rows(), _LAYOUT), (_HALF_OR_F32, _TYPES)],
    Op.REPEAT_BACK: [(_has_contiguous(), _LAYOUT), (_ONLY_F32, _TYPES), (_fits_flat_grid, _SIZES)],
    Op.UNARY: _OF_ONE_ELEMENT,
    Op.SQR: _OF_ONE_ELEMENT,
    Op.SQRT: _OF_ONE_ELEMENT,
    Op.SIN: _OF_ONE_ELEMENT,
    Op.COS: _OF_ONE_ELEMENT,
    Op.LOG: _OF_ONE_ELEMENT,
    Op.LEAKY_RELU: [*_CONTIGUOUS, (_HALF_OR_F32, _TYPES), (_is_counted_in_32_bits, _SIZES)],
    Op.CLAMP: [*_CONTIGUOUS, (_HALF_OR_F32, _TYPES), (_is_counted_in_32_bits, _SIZES)],
    Op.SCALE: [*_CONTIGUOUS, (_has_one_type(_F32, _BF16), _TYPES)],
    Op.FILL: [(_has_contiguous(), _LAYOUT), (_HALF_OR_F32, _TYPES)],
    Op.GLU: [(_has_glu_rows, _LAYOUT), (_has_contiguous(), _LAYOUT), (_has_glu_types, _TYPES)],
    Op.NORM: _NORM,
    Op.RMS_NORM: _NORM,
    Op.L2_NORM: _NORM,
    Op.GROUP_NORM: [*_CONTIGUOUS, (_ONLY_F32, _TYPES), (_has_whole_groups, _SIZES)],
    Op.SUM: [(lambda p: bool(c.ggml_is_contiguously_allocated(p.src[0])), _LAYOUT), (_ONLY_F32, _TYPES)],
    Op.SUM_ROWS: [(_has_rows(0), _LAYOUT), (_ONLY_F32, _TYPES)],
    Op.MEAN: [(_has_rows(0), _LAYOUT), (_ONLY_F32, _TYPES)],
    Op.CUMSUM: [*_CONTIGUOUS, (_ONLY_F32, _TYPES), (_fits_grid, _SIZES)],
    Op.SOFT_MAX: [*_CONTIGUOUS, (_has_operands_of((_F32,), (_F32, _F16), (_F32,)), _TYPES), (_fits_grid, _SIZES)],
    Op.DIAG: [*_CONTIGUOUS, (_HALF_OR_F32, _TYPES)],
    Op.DIAG_MASK_INF: [(lambda _: False, _NOT_INFINITE)],
    Op.TRI: [(_has_rows(0), _LAYOUT), (_has_one_type(_F32, _F16, _BF16), _TYPES), (_fits_grid, _SIZES)],
    Op.PAD: [(_has_contiguous(), _LAYOUT), (_ONLY_F32, _TYPES), (_fits_flat_grid, _SIZES)],
    Op.PAD_REFLECT_1D: [(_ONLY_F32, _TYPES), (_fits_grid, _SIZES)],
    Op.UPSCALE: [(_has_contiguous(), _LAYOUT), (_ONLY_F32, _TYPES), (_is_counted_in_32_bits, _SIZES)],
    Op.TIMESTEP_EMBEDDING: [*_CONTIGUOUS, (_ONLY_F32, _TYPES), (lambda p: p.ne[1] <= _GRID, _SIZES)],
    Op.SET: [*_CONTIGUOUS, (_has_update_layout, _LAYOUT)],
    Op.CPY: _COPY,
    Op.CONT: _COPY,
    Op.DUP: _COPY,
    Op.CONCAT: [(_has_contiguous(), _LAYOUT), (_fits_grid, _SIZES)],
    Op.GET_ROWS: [(_has_rows(0, 1), _LAYOUT)],
    Op.SET_ROWS: [(_has_rows(0), _LAYOUT), (lambda p: c.ggml_nelements(p.src[0]) < 2 * _INT, _SIZES)],
    Op.COUNT_EQUAL: [*_CONTIGUOUS, (_has_operands_of((Type.I32,), (Type.I32,)), _TYPES)],
    Op.ROPE: _ROTATION,
    Op.ROPE_BACK: _ROTATION,
    Op.MUL_MAT: [
        (_has_operands_of(_DECODED), _TYPES),
        (_has_block_precision, _PRECISION),
        (_has_product_layout, _LAYOUT),
    ],
    Op.MUL_MAT_ID: [
        (_has_operands_of(_DECODED, (_F32,)), _TYPES),
        (_keeps_precision, _PRECISION),
        (_has_block_precision, _PRECISION),
        (_has_expert_layout, _LAYOUT),
        (_has_distinct_experts, _NOT_DISTINCT),
    ],
    Op.OUT_PROD: [(_ONLY_F32, _TYPES), (_has_outer_product_layout, _LAYOUT)],
    Op.FLASH_ATTN_EXT: [(_has_attention_layout, _LAYOUT), (_has_softcap_kernel, _SOFTCAP)],
    Op.IM2COL: _WINDOWS,
    Op.IM2COL_3D: _WINDOWS,
    Op.CONV_2D: [*_CONTIGUOUS, (_has_operands_of((_F32, _F16), (_F32,)), _TYPES)],
    Op.CONV_2D_DW: [(_has_operands_of((_F32, _F16), (_F32,)), _TYPES), (_has_depthwise_layout, _LAYOUT)],
    Op.CONV_TRANSPOSE_2D: [*_CONTIGUOUS, (_has_operands_of((_F32, _F16), (_F32,)), _TYPES)],
    Op.POOL_1D: _POOL,
    Op.POOL_2D: _POOL,
    Op.SSM_CONV: [
        (_has_rows(0, 1), _LAYOUT),
        (lambda p: p.src[0].nb[1] == p.src[0].ne[0] * p.src[0].nb[0], _LAYOUT),
        (_has_length_of(3, 4, 5, 9, 15, operand=1), _SIZES),
    ],
    Op.SSM_SCAN: [(_has_state_space_layout, _LAYOUT)],
    Op.RWKV_WKV6: _LINEAR_ATTENTION,
    Op.RWKV_WKV7: _LINEAR_ATTENTION,
    Op.GATED_LINEAR_ATTN: _LINEAR_ATTENTION,
    Op.GATED_DELTA_NET: [(_has_delta_net_layout, _LAYOUT), (_has_length_of(16, 32, 64, 128, operand=2), _SIZES)],
    Op.LIGHTNING_INDEXER: [
        (_has_rows(0, 1, 2, 3), _LAYOUT),
        (lambda p: (p.src[0].type, p.src[2].type, p.src[3].type) == (_F32, _F32, _F16), _TYPES),
    ],
    Op.DSV4_HC_COMB: _STRIDED,
    Op.DSV4_HC_PRE: _STRIDED,
    Op.DSV4_HC_POST: _STRIDED,
}
