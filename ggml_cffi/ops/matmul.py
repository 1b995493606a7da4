"""Matrix products."""

from __future__ import annotations

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.context import Context
from ggml_cffi.core.dtypes import is_quantized
from ggml_cffi.core.tensor import Head, Tensor
from ggml_cffi.enums import Op, Prec, Type
from ggml_cffi.ops._f32 import batched_product, decoded, fits_batches, is_f32, split_product
from ggml_cffi.ops._operands import check_result, contiguous_rows, op_error, result_context
from ggml_cffi.ops._parameters import MAX_GROUPS
from ggml_cffi.ops.elementwise import add
from ggml_cffi.ops.rows import limit_row_numbers
from ggml_cffi.ops.shape import cont, transpose

__all__ = [
    "linear",
    "mul_mat",
    "mul_mat_id",
    "out_prod",
]

_HALF = frozenset({Type.F16, Type.BF16})
_INTEGERS = frozenset({Type.I8, Type.I16, Type.I32, Type.I64, Type.F64})


#: Checked products by the ids of the operands' heads (type, sizes, strides), with the head of the result. A model has
#: few different products, and equal heads are one object, so most calls skip the check.
_products: dict[tuple[int, int], tuple[Head, Head, Head]] = {}
_MOST_PRODUCTS = 1024


def _check_product(a: Tensor, b: Tensor) -> tuple[Head, Head, Head]:
    """Check a product, and return the heads of ``a``, of ``b`` and of the product."""
    an, bn = a.ne, b.ne
    if an[0] != bn[0]:
        raise op_error("mul_mat", "inner sizes differ", a=a, b=b)
    if not an[0]:
        raise op_error("mul_mat", "the inner size is 0", a=a, b=b)
    check_result("mul_mat", (an[1], *bn[1:]))
    if not an[2] or not an[3] or bn[2] % an[2] or bn[3] % an[3]:
        raise op_error("mul_mat", "the leading sizes of b must be multiples of a's", a=a, b=b)
    if not (contiguous_rows(a) and contiguous_rows(b)) or a.nb[0] > a.nb[1]:
        raise op_error("mul_mat", "the rows of a and b must be contiguous (use cont)", a=a, b=b)
    half = b.dtype in _HALF and a.dtype in (b.dtype, Type.F32)
    if a.dtype in _INTEGERS or not (b.dtype is Type.F32 or half):
        raise op_error(
            "mul_mat", "a must be a float or quantized type, and b F32 (or half, if a is the same or F32)", a=a, b=b
        )
    n, m = an[1], bn[1]
    product = Head.unique(Type.F32, (n, m, *bn[2:]), (4, 4 * n, 4 * n * m, 4 * n * m * bn[2]), dense=True)
    if len(_products) >= _MOST_PRODUCTS:
        _products.clear()
    heads = _products[id(a.head), id(b.head)] = a.head, b.head, product
    return heads


def mul_mat(
    a: Tensor,
    b: Tensor,
    *,
    prec: Prec = Prec.DEFAULT,
    b_prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Multiply ``b @ a.T``: every row of ``b`` by every row of ``a``.

    Parameters
    ----------
    a
        ``(..., n, k)``, any float or quantized type, not transposed.
    b
        ``(..., m, k)``, F32; or F16 or BF16 if ``a`` is of that type or F32. Its leading sizes are multiples of those
        of ``a``, which is repeated.
    prec
        ``Prec.F32`` gives the accuracy of F32 on every device; see Notes. The default is that of the context, which is
        ``DEFAULT`` unless ``Session(precision="f32")`` or ``Context(precision="f32")`` says otherwise. ``BF16`` and
        ``F16`` allow sums in these types.
    b_prec
        Least precision that the backend may convert ``b`` to: ``Prec.F32``, ``BF16``, ``F16``, ``Q8`` or ``Q4``. A
        backend may convert to less than its default only if this allows it. It needs ggml 0.25.3.
    ctx
        Context of the result. Default: the youngest context of the operands.

    Returns
    -------
    Tensor
        ``(..., m, n)``, F32.

    Raises
    ------
    ValueError
        If the sizes or types do not fit.

    Notes
    -----
    **By default GPUs round F32 operands.** With more than 8 rows of ``b``, or rows of several matrices, Vulkan rounds
    both operands to F16: three digits remain, and values beyond 65504 become infinite. CUDA rounds them to TF32, with
    an error of about 3e-4. If ``a`` is F16, GPUs may also sum in F16, and the CPU rounds ``b`` to F16.

    With ``prec=Prec.F32``, the error of an element is below 1e-5 of the product of the norms of its two rows, usually
    below 1e-6, for operands of F32, F16 and BF16 up to 3.38e38. Infinite values give NaN. Below 1e-33 fewer bits of an
    operand count. On the CPU alone, and with at most 8 rows on Vulkan, the result is one product. Up to 128 rows of a
    matrix are multiplied in batches of 8 on Vulkan. Otherwise, if a device of the context rounds F32 operands, the
    result is the sum of six products of BF16 parts. Operands of F16 and BF16 are converted to F32 in each run.

    If ``a`` is quantized, ``prec=Prec.F32`` requests sums in F32 only: backends round ``b`` to 8 bits or to F16.
    ``mul_mat(cast(a, F32), b, prec=Prec.F32)`` does not.

    C: ``ggml_mul_mat``, ``ggml_prec_set_acc`` (``ggml_mul_mat_set_prec`` before ggml 0.25.3), ``ggml_prec_set_src``.
    """
    if not (ctx is None and a.__class__ is Tensor and b.__class__ is Tensor and a.context is b.context):
        ctx = result_context("mul_mat", a, b, ctx=ctx)
    known = _products.get((id(a._head), id(b._head)))
    if known is None:
        known = _check_product(a, b)
    ctx = ctx or a.context
    # Of BF16, ggml's Vulkan backend ends the process if there are few rows. No backend multiplies F32 by F16.
    if known[1].dtype is not Type.F32 and (known[1].dtype is Type.BF16 or known[0].dtype is Type.F32) and b.size:
        return mul_mat(a, decoded(b, ctx), prec=prec, b_prec=b_prec, ctx=ctx)
    prec = (prec if prec.__class__ is Prec else Prec(prec)) or ctx.prec
    if prec is Prec.F32 and _needs_f32(a, b, b_prec):
        return _mul_mat_f32(a, b, ctx)
    # If b is a vector, so is the result: (k,) -> (n,).
    ndim = a.ndim if 2 < a.ndim > b.ndim else b.ndim
    out = ctx.emit(c.ggml_mul_mat, ndim, known[2], a.ptr, b.ptr)
    if prec is not Prec.DEFAULT or b_prec is not Prec.DEFAULT:
        _set_precision("mul_mat", out, prec, b_prec)
    return out


def _needs_f32(a: Tensor, b: Tensor, b_prec: Prec) -> bool:
    """Return whether a product of full precision needs more than sums in F32."""
    return not is_quantized(a.dtype) and a.size > 0 and b.size > 0 and b_prec in (Prec.DEFAULT, Prec.F32)


def _mul_mat_f32(a: Tensor, b: Tensor, ctx: Context) -> Tensor:
    """Multiply as :func:`mul_mat` does, without rounding the operands."""

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        *_, head = _products.get((id(x.head), id(y.head))) or _check_product(x, y)
        out = ctx.emit(c.ggml_mul_mat, ndim, head, x.ptr, y.ptr)
        _set_precision("mul_mat", out, Prec.F32, Prec.DEFAULT)
        return out

    ndim = a.ndim if 2 < a.ndim > b.ndim else b.ndim
    if ctx.keeps_f32(b.ne[1], b.ne[2] * b.ne[3]):
        return multiply(decoded(a, ctx), decoded(b, ctx))
    if fits_batches(b, ctx):
        out = batched_product(multiply, decoded(a, ctx), decoded(b, ctx), ctx)
    else:
        out = split_product(multiply, a, b, ctx)
    ctx.products[out.ptr] = a.ptr, b.ptr
    return out


def _set_precision(op: str, out: Tensor, prec: Prec, b_prec: Prec) -> None:
    """Request a precision of the sums of a product, and of its second operand."""
    prec, b_prec = Prec(prec), Prec(b_prec)
    if prec in (Prec.Q8, Prec.Q4):
        raise ValueError(f"{op}: prec must be F32, BF16 or F16, not {prec.name}: sums are not quantized")
    if prec not in (Prec.DEFAULT, Prec.F32):
        library.require("ggml_prec_set_acc", f"{op} with prec {prec.name}")
    set_prec = c.ggml_prec_set_acc if library.provides("ggml_prec_set_acc") else c.ggml_mul_mat_set_prec
    set_prec(out.ptr, prec)
    if b_prec is not Prec.DEFAULT:
        c.ggml_prec_set_src(out.ptr, b_prec, 1)


def sum_in_f32(product: Tensor) -> Tensor:
    """Request sums in F32 of the result of :func:`mul_mat`, whose operands a device may round. Return the result.

    GPUs sum products of F16 in F16 by default, in which 65504 is the largest number. A product of full precision may be
    several nodes, each with sums in F32.

    C: ``ggml_prec_set_acc`` (``ggml_mul_mat_set_prec`` before ggml 0.25.3).
    """
    if product.op is Op.MUL_MAT:
        _set_precision("mul_mat", product, Prec.F32, Prec.DEFAULT)
    return product


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Apply a linear layer: ``x @ weight.T + bias``, as ``torch.nn.functional.linear`` does.

    Parameters
    ----------
    x
        ``(..., n_in)``, F32.
    weight
        ``(n_out, n_in)``, any float or quantized type.
    bias
        ``(n_out,)``, F32.
    prec
        As for :func:`mul_mat`: by default GPUs round F32 operands too.

    Returns
    -------
    Tensor
        ``(..., n_out)``, F32.

    C: ``ggml_mul_mat``, ``ggml_add``.
    """
    if isinstance(weight, Tensor) and weight.ndim != 2:
        raise op_error("linear", "weight must be a matrix", weight=weight)
    y = mul_mat(weight, x, prec=prec, ctx=ctx)
    if bias is None:
        return y
    if isinstance(bias, Tensor) and not bias.ne[0] == y.ne[0] == bias.size:
        raise op_error("linear", "bias must have one value for each row of weight", weight=weight, bias=bias)
    return add(y, bias, ctx=ctx)


def mul_mat_id(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    *,
    prec: Prec = Prec.DEFAULT,
    b_prec: Prec = Prec.DEFAULT,
    ctx: Context | None = None,
) -> Tensor:
    """Multiply each row of ``b`` by the matrix of its expert: ``b[t, e] @ a[ids[t, e]].T``.

    Parameters
    ----------
    a
        ``(n_experts, n, k)``, any float or quantized type, contiguous.
    b
        ``(n_tokens, n_used, k)``, F32, contiguous. Its middle size divides that of ``ids``: 1 for a row that all the
        experts of a token share.
    ids
        ``(n_tokens, n_used)``, I32 with contiguous rows: an input, or a result of argsort, such as that of the router's
        scores. Values must be 0 to ``n_experts - 1``; an input is checked when its values are set. No token may have
        the same expert twice: backends differ then.
    prec, b_prec
        As for :func:`mul_mat`. ``b_prec``, and ``prec`` other than F32, need ggml 0.25.3.

    Returns
    -------
    Tensor
        ``(n_tokens, n_used, n)``, F32.

    Raises
    ------
    ValueError
        If the shapes or types do not fit, or ``ids`` already holds values out of range.

    C: ``ggml_mul_mat_id``, ``ggml_prec_set_acc``, ``ggml_prec_set_src``.
    Source: Shazeer et al., Outrageously Large Neural Networks, 2017.
    """
    ctx = result_context("mul_mat_id", a, b, ids, ctx=ctx)
    an, bn, rn = a.ne, b.ne, ids.ne
    if a.dtype in _INTEGERS or b.dtype is not Type.F32 or ids.dtype is not Type.I32:
        raise op_error("mul_mat_id", "a must be a float or quantized type, b F32 and ids I32", a=a, b=b, ids=ids)
    if an[0] != bn[0] or not an[0]:
        raise op_error("mul_mat_id", "inner sizes differ, or are 0", a=a, b=b, ids=ids)
    if an[3] != 1 or bn[3] != 1 or rn[1:] != (bn[2], 1, 1) or not bn[1] or rn[0] % bn[1]:
        raise op_error("mul_mat_id", "ids must name a matrix of a for each row of b, or several", a=a, b=b, ids=ids)
    # GPUs read views with gaps between the matrices wrongly.
    if not (a.is_contiguous and b.is_contiguous and contiguous_rows(ids)):
        raise op_error("mul_mat_id", "a, b and the rows of ids must be contiguous (use cont)", a=a, b=b, ids=ids)
    if an[2] > MAX_GROUPS or rn[0] > MAX_GROUPS:
        raise op_error("mul_mat_id", f"more than {MAX_GROUPS} experts, or experts per token", a=a, b=b, ids=ids)
    limit_row_numbers("mul_mat_id", ids, an[2], "experts")
    check_result("mul_mat_id", (an[1], rn[0], bn[2], 1))
    prec = Prec(prec)
    if (prec or ctx.prec) is Prec.F32 and ids.size and _needs_f32(a, b, b_prec):
        return _mul_mat_id_f32(a, b, ids, ctx)
    if prec is not Prec.DEFAULT:
        library.require("ggml_prec_set_acc", "mul_mat_id with prec")
    elif library.provides("ggml_prec_set_acc"):
        prec = ctx.prec
    out = ctx.build(c.ggml_mul_mat_id, 3, a.ptr, b.ptr, ids.ptr)
    if prec is not Prec.DEFAULT or b_prec is not Prec.DEFAULT:
        _set_precision("mul_mat_id", out, prec, b_prec)
    return out


def _mul_mat_id_f32(a: Tensor, b: Tensor, ids: Tensor, ctx: Context) -> Tensor:
    """Multiply as :func:`mul_mat_id` does, without rounding the operands."""

    def multiply(x: Tensor, y: Tensor) -> Tensor:
        out = ctx.build(c.ggml_mul_mat_id, 3, x.ptr, y.ptr, ids.ptr)
        if library.provides("ggml_prec_set_acc"):
            _set_precision("mul_mat_id", out, Prec.F32, Prec.DEFAULT)
        return out

    if ctx.keeps_f32(ids.ne[1], 1):  # the kernels for few tokens take any number of experts
        return multiply(decoded(a, ctx), b)
    return split_product(multiply, a, b, ctx)


def out_prod(a: Tensor, b: Tensor, *, prec: Prec = Prec.DEFAULT, ctx: Context | None = None) -> Tensor:
    """Sum the outer products of the rows of ``b`` and ``a``: ``b.T @ a``.

    Parameters
    ----------
    a
        ``(..., k, n)``, F32, F16 or quantized, contiguous rows.
    b
        ``(..., k, m)``, F32. Its leading sizes equal those of ``a``, or are multiples of them if ``a`` is F32.
    prec
        As for :func:`mul_mat`, but ``DEFAULT`` or ``F32``.

    Returns
    -------
    Tensor
        ``(..., m, n)``, F32.

    Raises
    ------
    ValueError
        If the sizes or types do not fit.

    C: ``ggml_out_prod``.
    """
    ctx = result_context("out_prod", a, b, ctx=ctx)
    an, bn = a.ne, b.ne
    if (a.dtype not in (Type.F32, Type.F16) and not is_quantized(a.dtype)) or b.dtype is not Type.F32:
        raise op_error("out_prod", "a must be F32, F16 or quantized, and b F32", a=a, b=b)
    if an[1] != bn[1]:
        raise op_error("out_prod", "inner sizes differ", a=a, b=b)
    if not an[2] or not an[3] or bn[2] % an[2] or bn[3] % an[3]:
        raise op_error("out_prod", "the leading sizes of b must be multiples of a's", a=a, b=b)
    if a.dtype is not Type.F32 and an[2:] != bn[2:]:
        raise op_error("out_prod", f"a {a.dtype.name} a must have the leading sizes of b", a=a, b=b)
    if not contiguous_rows(a) or a.nb[0] > a.nb[1]:
        raise op_error("out_prod", "the rows of a must be contiguous (use cont)", a=a, b=b)
    check_result("out_prod", (an[0], bn[0], *bn[2:]))
    # Where products of one row keep F32, so do outer products of any size.
    if is_f32("out_prod", prec, ctx) and _needs_f32(a, b, Prec.DEFAULT) and not ctx.keeps_f32(1, 1):
        a, b = (cont(transpose(t, ctx=ctx), ctx=ctx) for t in (a, b))
        return mul_mat(a, b, prec=Prec.F32, ctx=ctx)
    return ctx.build(c.ggml_out_prod, max(a.ndim, b.ndim, 2), a.ptr, b.ptr)
