"""Matrix products."""

from __future__ import annotations

from ggml_cffi import c
from ggml_cffi.context import Context
from ggml_cffi.enums import Prec, Type
from ggml_cffi.ops._check import check_result, contiguous_rows, fail, home
from ggml_cffi.ops.elementwise import add
from ggml_cffi.tensor import Tensor

_INTEGERS = frozenset({Type.I8, Type.I16, Type.I32, Type.I64, Type.F64})


def mul_mat(a: Tensor, b: Tensor, *, prec: Prec = Prec.DEFAULT, ctx: Context | None = None) -> Tensor:
    """``b @ a.T``: every row of ``b`` against every row of ``a``.

    Parameters
    ----------
    a
        ``(..., n, k)``, any float or quantized type, not transposed.
    b
        ``(..., m, k)``, F32 (or F16 beside an F16 ``a``). Its leading sizes are multiples of ``a``'s, which is
        repeated.
    prec
        ``Prec.F32`` asks for sums in F32. By default GPUs may sum in F16, which is faster and about 1e-3 to 1e-2 off.
        ggml's Vulkan products of more than 8 rows round their operands to F16 whatever is asked, F32 ones too: values
        beyond 65504 become infinite. ``GGML_VK_DISABLE_F16=1`` in the environment keeps them F32.
    ctx
        Context of the result; default the youngest of the operands'.

    Returns
    -------
    Tensor
        ``(..., m, n)``, F32.

    Raises
    ------
    ValueError
        If the sizes or types do not fit.

    C: ``ggml_mul_mat``, ``ggml_mul_mat_set_prec``.
    """
    ctx = home("mul_mat", a, b, ctx=ctx)
    an, bn = a.ne, b.ne
    if an[0] != bn[0]:
        raise fail("mul_mat", "inner sizes differ", a=a, b=b)
    if not an[0]:
        raise fail("mul_mat", "the inner size is 0", a=a, b=b)
    check_result("mul_mat", (an[1], *bn[1:]))
    if not an[2] or not an[3] or bn[2] % an[2] or bn[3] % an[3]:
        raise fail("mul_mat", "the leading sizes of b must be multiples of a's", a=a, b=b)
    if not (contiguous_rows(a) and contiguous_rows(b)) or a.nb[0] > a.nb[1]:
        raise fail("mul_mat", "the rows of a and b must be contiguous (use cont)", a=a, b=b)
    kind = b.dtype
    if a.dtype in _INTEGERS or (kind is not Type.F32 and (kind is not a.dtype or kind not in (Type.F16, Type.BF16))):
        raise fail(
            "mul_mat", "a must be a float or quantized type, and b F32 or the same half-precision type", a=a, b=b
        )
    # A vector for b gives a vector: (k,) -> (n,).
    ndim = max(b.ndim, a.ndim if a.ndim > 2 else 0)
    out = ctx.build(c.ggml_mul_mat, ndim, a.ptr, b.ptr)
    if prec is not Prec.DEFAULT:
        c.ggml_mul_mat_set_prec(out.ptr, Prec(prec))
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, ctx: Context | None = None) -> Tensor:
    """``x @ weight.T + bias``, as ``torch.nn.functional.linear``.

    Parameters
    ----------
    x
        ``(..., n_in)``, F32.
    weight
        ``(n_out, n_in)``, any float or quantized type.
    bias
        ``(n_out,)``, F32.

    Returns
    -------
    Tensor
        ``(..., n_out)``, F32.

    C: ``ggml_mul_mat``, ``ggml_add``.
    """
    y = mul_mat(weight, x, ctx=ctx)
    return y if bias is None else add(y, bias, ctx=ctx)
