"""Operations: functions from tensors to a tensor that a graph computes.

Every function checks what ggml would assert, before it calls ggml.
"""

from ggml_cffi.ops.attention import RopeMode, flash_attn_ext, rope_ext, soft_max_ext
from ggml_cffi.ops.elementwise import add, div, gelu, mul, relu, scale, silu, sub, swiglu_split
from ggml_cffi.ops.matmul import linear, mul_mat
from ggml_cffi.ops.norm import norm, rms_norm, sum_rows
from ggml_cffi.ops.rows import get_rows, set_rows
from ggml_cffi.ops.shape import cast, cont, permute, reshape, transpose, view

__all__ = [
    "RopeMode",
    "add",
    "cast",
    "cont",
    "div",
    "flash_attn_ext",
    "gelu",
    "get_rows",
    "linear",
    "mul",
    "mul_mat",
    "norm",
    "permute",
    "relu",
    "reshape",
    "rms_norm",
    "rope_ext",
    "scale",
    "set_rows",
    "silu",
    "soft_max_ext",
    "sub",
    "sum_rows",
    "swiglu_split",
    "transpose",
    "view",
]
