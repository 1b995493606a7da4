"""State-space models and linear attention: recurrences over the tokens of a sequence."""

from __future__ import annotations

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.ops._operands import (
    check_result,
    check_start,
    need_axes,
    need_dense,
    need_elements,
    need_int,
    need_rows,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import INT_MAX, MAX_GROUPS, check_integer, check_real
from ggml_cffi.ops.rows import limit_row_numbers

__all__ = [
    "gated_delta_net",
    "gated_linear_attn",
    "rwkv_wkv6",
    "rwkv_wkv7",
    "solve_tri",
    "ssm_conv",
    "ssm_scan",
]


#: ggml unrolls its Vulkan shader for each size, which takes seconds; Mesa's software driver crashes at 80 rows.
_LARGEST_TRIANGLE = 64


def ssm_conv(sx: Tensor, weight: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Convolve each channel along time: ``out[s, t, i] = sum_j sx[s, i, t + j] * weight[i, j]``.

    Parameters
    ----------
    sx
        ``(n_seqs, d_inner, d_conv - 1 + n_tokens)``, or without the first axis: the last ``d_conv - 1`` inputs of each
        channel before the tokens, then the inputs of the tokens. F32; rows contiguous, without gaps between them.
    weight
        ``(d_inner, d_conv)``, contiguous F32.

    Returns
    -------
    Tensor
        ``(n_seqs, n_tokens, d_inner)``, with as many axes as ``sx``, F32: the axes of channels and time are swapped.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit.

    C: ``ggml_ssm_conv``.
    """
    ctx = result_context("ssm_conv", sx, weight, ctx=ctx)
    xn, wn = sx.ne, weight.ne
    if sx.ndim not in (2, 3) or weight.ndim != 2:
        raise op_error("ssm_conv", "sx must have two or three axes and weight two", sx=sx, weight=weight)
    if xn[1] != wn[1] or not wn[0] or xn[0] < wn[0] - 1:
        raise op_error(
            "ssm_conv", "sx needs the channels of weight, and d_conv - 1 inputs or more", sx=sx, weight=weight
        )
    need_rows("ssm_conv", sx=sx)
    if sx.nb[1] != 4 * xn[0]:
        raise op_error("ssm_conv", "sx must not have gaps between its rows (use cont)", sx=sx, weight=weight)
    need_dense("ssm_conv", weight=weight)
    need_int("ssm_conv", sx=sx, weight=weight)
    n_tokens = xn[0] - wn[0] + 1
    if xn[2] > MAX_GROUPS or n_tokens > 16 * MAX_GROUPS:
        raise op_error("ssm_conv", f"more than {MAX_GROUPS} sequences, or {16 * MAX_GROUPS} tokens in one", sx=sx)
    check_result("ssm_conv", (xn[1], n_tokens, xn[2]))
    check_start("ssm_conv", sx=sx, weight=weight)
    return ctx.build(c.ggml_ssm_conv, sx.ndim, sx.ptr, weight.ptr)


def ssm_scan(
    s: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803 - Mamba's names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    ids: Tensor,
    *,
    n_snapshots: int = 1,
    ctx: Context | None = None,
) -> Tensor:
    """Compute the selective scan of Mamba for each token, with ``d = softplus(dt[h])`` and ``g`` the group of head
    ``h``.

    ``state[h, i] = exp(d * A[h]) * state[h, i] + d * x[h, i] * B[g]`` and ``y[h, i] = state[h, i] @ C[g]``.

    Parameters
    ----------
    s
        ``(n, n_heads, head_size, d_state)``: initial states, contiguous F32.
    x
        ``(n_seqs, n_tokens, n_heads, head_size)``, F32; no gaps within a token.
    dt
        ``(n_seqs, n_tokens, n_heads)``, contiguous F32.
    A
        ``(n_heads, 1)`` for Mamba-2, or ``(n_heads, d_state)`` for Mamba-1; contiguous F32.
    B, C
        ``(n_seqs, n_tokens, n_groups, d_state)``, F32; no gaps within a token. Head ``h`` is of the group
        ``h // (n_heads // n_groups)``.
    ids
        ``(n_seqs,)``, contiguous I32, as the rows of ``get_rows``: index into ``s`` of each sequence's initial state.
        Values must be 0 to ``n - 1``; an input is checked when its values are set.
    n_snapshots
        Number of states of a sequence in the result: the last, the one before it, and so on; at most ``n_tokens``.
        Mamba-1 supports 1 only.

    Returns
    -------
    Tensor
        One axis, F32: first ``y``, of ``x``'s shape, then the states,
        ``(n_snapshots, n_seqs, n_heads, head_size, d_state)``, those after the last token first.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or ``ids`` already holds values out of range.

    C: ``ggml_ssm_scan``. Source: Gu & Dao, Mamba, 2023; Dao & Gu, Transformers are SSMs, 2024.
    """
    op = "ssm_scan"
    ctx = result_context(op, s, x, dt, A, B, C, ids, ctx=ctx)
    operands = {"s": s, "x": x, "dt": dt, "A": A, "B": B, "C": C}
    need_axes(op, 4, s=s, x=x, B=B, C=C)
    need_dense(op, s=s, dt=dt, A=A)
    need_rows(op, x=x, B=B, C=C)
    if any(t.nb[1] != 4 * t.ne[0] for t in (x, B, C)):
        raise op_error(op, "x, B and C must not have gaps within a token (use cont)", x=x, B=B, C=C)
    if ids.dtype is not Type.I32 or not ids.head.dense:
        raise op_error(op, "ids must be contiguous I32", ids=ids)
    head_size, n_heads, n_tokens, n_seqs = x.ne
    d_state, n_groups = B.ne[:2]
    if s.ne[:3] != (d_state, head_size, n_heads) or dt.shape != (n_seqs, n_tokens, n_heads):
        raise op_error(op, "s and dt do not fit x and B", **operands)
    if B.ne != C.ne or B.ne[2:] != (n_tokens, n_seqs) or ids.shape != (n_seqs,):
        raise op_error(op, "B, C and ids do not fit x", **operands, ids=ids)
    if A.shape not in ((n_heads, 1), (n_heads, d_state)):
        raise op_error(op, "A must be of shape (n_heads, 1) or (n_heads, d_state)", **operands)
    if not n_groups or n_heads % n_groups:
        raise op_error(op, "the groups of B and C must divide the heads", **operands)
    need_elements(op, **operands)
    n_snapshots = check_integer(op, "n_snapshots", n_snapshots, 1)
    if n_snapshots > n_tokens or (n_snapshots > 1 and A.ne[0] != 1):
        raise op_error(op, f"n_snapshots {n_snapshots} exceeds the number of tokens, or 1 for Mamba-1", x=x, A=A)
    _check_scan(op, n_snapshots, **operands)
    check_start(op, ids=ids)
    limit_row_numbers(op, ids, s.ne[3], "states")
    pointers = (t.ptr for t in (s, x, dt, A, B, C, ids))
    return ctx.build(c.ggml_ssm_scan, 1, *pointers, n_snapshots)


def _check_scan(op: str, n_snapshots: int, **operands: Tensor) -> None:
    need_int(op, **operands)
    check_start(op, **operands)
    s, x = operands["s"], operands["x"]
    state, channels = s.ne[0] * s.ne[1] * s.ne[2], x.ne[0] * x.ne[1]
    if x.size + n_snapshots * state * x.ne[3] > INT_MAX:
        raise op_error(op, "the result has more than 2**31 - 1 elements", **operands)
    if x.ne[3] > MAX_GROUPS or channels > MAX_GROUPS:
        raise op_error(op, f"there are more than {MAX_GROUPS} sequences, or heads times head_size", **operands)
    # A GPU workgroup computes several channels, and does not check where the last channel ends.
    d_state = s.ne[0]
    if d_state in (128, 256) and x.ne[0] % 16 == 0 and channels % (d_state // 4):
        raise op_error(op, f"heads times head_size must be a multiple of {d_state // 4} for this d_state", **operands)


def rwkv_wkv6(
    k: Tensor, v: Tensor, r: Tensor, tf: Tensor, td: Tensor, state: Tensor, *, ctx: Context | None = None
) -> Tensor:
    """Compute the time mixing of RWKV-6 for each token and head, with ``kv = outer(k, v)``.

    ``y = r @ (tf[:, None] * kv + S)``, then ``S = td[:, None] * S + kv``.

    Parameters
    ----------
    k, v, r
        Keys, values and receptances, ``(n_tokens, n_heads, 64)``, contiguous F32: all tokens of the first sequence,
        then those of the second; sequences have equal lengths.
    tf
        ``(n_heads, 64)``, contiguous F32: the bonus of the current token.
    td
        Decay, shaped as ``k``.
    state
        ``(n_seqs, n_heads * 64 * 64)``, contiguous F32: the matrices ``S[i, j]`` of each sequence and head, ``i`` along
        ``k`` and ``j`` along ``v``.

    Returns
    -------
    Tensor
        ``(n_tokens + 64 * n_seqs, n_heads * 64)``, F32: a row ``y`` for each token, then the states as in ``state``.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or the head size is not 64, which ggml's GPU code does not check.

    C: ``ggml_rwkv_wkv6``. Source: Peng et al., Eagle and Finch, 2024.
    """
    op = "rwkv_wkv6"
    ctx = result_context(op, k, v, r, tf, td, state, ctx=ctx)
    _check_heads(op, state, 64, k=k, v=v, r=r, td=td)
    need_dense(op, tf=tf)
    check_start(op, tf=tf)
    if tf.shape != k.shape[1:]:
        raise op_error(op, "tf must be of shape (n_heads, head_size)", k=k, tf=tf)
    return ctx.build(c.ggml_rwkv_wkv6, 2, k.ptr, v.ptr, r.ptr, tf.ptr, td.ptr, state.ptr)


def rwkv_wkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, *, ctx: Context | None = None
) -> Tensor:
    """Compute the time mixing of RWKV-7: for each token and head ``S = S * w + outer(v, k) + outer(S @ a, b)``, then
    ``y = S @ r``.

    Parameters
    ----------
    r, w, k, v, a, b
        ``(n_tokens, n_heads, 64)``, contiguous F32: all tokens of the first sequence, then those of the second;
        sequences have equal lengths. ``w`` is the decay.
    state
        ``(n_seqs, n_heads * 64 * 64)``, contiguous F32: the matrices ``S[i, j]`` of each sequence and head, ``i`` along
        ``v`` and ``j`` along ``k``: the transpose of the states of :func:`rwkv_wkv6`.

    Returns
    -------
    Tensor
        ``(n_tokens + 64 * n_seqs, n_heads * 64)``, F32: a row ``y`` for each token, then the states as in ``state``.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit, or the head size is not 64, which ggml does not check.

    C: ``ggml_rwkv_wkv7``. Source: Peng et al., RWKV-7 "Goose", 2025.
    """
    op = "rwkv_wkv7"
    ctx = result_context(op, r, w, k, v, a, b, state, ctx=ctx)
    _check_heads(op, state, 64, r=r, w=w, k=k, v=v, a=a, b=b)
    return ctx.build(c.ggml_rwkv_wkv7, 2, r.ptr, w.ptr, k.ptr, v.ptr, a.ptr, b.ptr, state.ptr)


def gated_linear_attn(
    k: Tensor, v: Tensor, q: Tensor, g: Tensor, state: Tensor, *, scale: float, ctx: Context | None = None
) -> Tensor:
    """Compute gated linear attention: for each token and head ``S = g[:, None] * S + outer(k, v)``, then ``y = scale *
    q @ S``.

    Parameters
    ----------
    k, v, q, g
        Keys, values, queries and gates, ``(n_tokens, n_heads, head_size)``, contiguous F32: all tokens of the first
        sequence, then those of the second; sequences have equal lengths.
    state
        ``(n_seqs, n_heads * head_size * head_size)``, contiguous F32: the matrices ``S[i, j]`` of each sequence and
        head, ``i`` along ``k`` and ``j`` along ``v``.
    scale
        Factor of the queries.

    Returns
    -------
    Tensor
        ``(n_tokens + head_size * n_seqs, n_heads * head_size)``, F32: a row ``y`` for each token, then the states as in
        ``state``.

    Raises
    ------
    ValueError
        If shapes, types, layouts or ``scale`` do not fit.

    C: ``ggml_gated_linear_attn``. Source: Yang et al., Gated Linear Attention Transformers, 2024.
    """
    op = "gated_linear_attn"
    ctx = result_context(op, k, v, q, g, state, ctx=ctx)
    _check_heads(op, state, None, k=k, v=v, q=q, g=g)
    return ctx.build(c.ggml_gated_linear_attn, 2, k.ptr, v.ptr, q.ptr, g.ptr, state.ptr, check_real(op, "scale", scale))


def _check_heads(op: str, state: Tensor, only: int | None, **operands: Tensor) -> None:
    """Check a recurrence with a square state per head; the tokens of all sequences follow one another."""
    need_dense(op, **operands, state=state)
    first, *others = operands.values()
    size, heads, tokens, _ = first.ne
    if first.ndim != 3 or any(t.shape != first.shape for t in others):
        raise op_error(op, "all operands but the state must have one shape, (n_tokens, n_heads, head_size)", **operands)
    need_elements(op, **operands, state=state)
    check_start(op, **operands, state=state)
    if only is not None and size != only:
        raise op_error(op, f"head_size must be {only}", **operands)
    n_seqs = state.ne[1]
    if state.shape != (n_seqs, size * size * heads):
        raise op_error(op, "state must be of shape (n_seqs, n_heads * head_size**2)", **operands, state=state)
    if tokens % n_seqs:
        raise op_error(op, "the sequences must have the same number of tokens", **operands, state=state)
    if size * heads * (tokens + size * n_seqs) > INT_MAX or n_seqs * heads > MAX_GROUPS:
        raise op_error(op, f"there are more than 2**31 - 1 results, or {MAX_GROUPS} heads of all sequences", **operands)


def gated_delta_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    n_snapshots: int = 1,
    ctx: Context | None = None,
) -> Tensor:
    """Compute the gated delta rule for each token and head.

    First ``S = exp(g) * S``, next ``S = S + outer(beta * (v - S @ k), k)``, then ``y = S @ q / sqrt(head_size)``.

    Parameters
    ----------
    q, k
        ``(n_seqs, n_tokens, n_k_heads, head_size)``, F32, contiguous rows, both with the same strides. Head ``h`` of
        ``v`` uses head ``h % n_k_heads``.
    v
        ``(n_seqs, n_tokens, n_heads, head_size)``, F32, contiguous rows.
    g
        ``(n_seqs, n_tokens, n_heads, 1)``, or with ``head_size`` gates, one for each column of ``S``; contiguous F32.
    beta
        ``(n_seqs, n_tokens, n_heads, 1)``, contiguous F32.
    state
        ``(n_seqs, n_heads, head_size, head_size)``, contiguous F32: the matrices ``S[i, j]``, ``i`` along ``v`` and
        ``j`` along ``k``.
    n_snapshots
        Number of states in the result: the last, the one before it, and so on; at most ``n_tokens``.

    Returns
    -------
    Tensor
        ``(n_seqs * n_tokens + n_snapshots * n_seqs * head_size, n_heads * head_size)``, F32: a row ``y`` for each
        token, then the states, ``(n_snapshots, *state.shape)``, those after the last token first.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit.

    C: ``ggml_gated_delta_net``. Source: Yang et al., Gated Delta Networks, 2025.
    """
    op = "gated_delta_net"
    ctx = result_context(op, q, k, v, g, beta, state, ctx=ctx)
    operands = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    need_axes(op, 4, **operands)
    need_rows(op, q=q, k=k, v=v)
    need_dense(op, g=g, beta=beta, state=state)
    size, heads, tokens, n_seqs = v.ne
    if q.ne != k.ne or q.nb != k.nb:  # the GPU uses q's strides for both
        raise op_error(op, "q and k must have the same shape and strides (use cont)", **operands)
    if (q.ne[0], *q.ne[2:]) != (size, tokens, n_seqs) or not q.ne[1] or heads % q.ne[1]:
        raise op_error(op, "q and k must have v's shape, or fewer heads, which divide v's", **operands)
    if g.ne[0] not in (1, size) or g.ne[1:] != v.ne[1:] or beta.ne != (1, *v.ne[1:]):
        raise op_error(op, "g and beta must have one element per head (g may have head_size)", **operands)
    if state.ne != (size, size, heads, n_seqs):
        raise op_error(op, "state must be of shape (n_seqs, n_heads, head_size, head_size)", **operands)
    need_elements(op, **operands)
    n_snapshots = check_integer(op, "n_snapshots", n_snapshots, 1)
    if n_snapshots > tokens:
        raise op_error(op, f"n_snapshots {n_snapshots} is more than the number of tokens", **operands)
    need_int(op, **operands)
    check_start(op, **operands)
    if v.size + n_snapshots * state.size > INT_MAX or max(n_seqs, heads) > MAX_GROUPS:
        raise op_error(op, f"there are more than 2**31 - 1 results, or {MAX_GROUPS} heads or sequences", **operands)
    return ctx.build(c.ggml_gated_delta_net, 2, *(t.ptr for t in operands.values()), n_snapshots)


def solve_tri(a: Tensor, b: Tensor, *, ctx: Context | None = None) -> Tensor:
    """Solve ``a @ x = b`` for a lower triangular ``a``, by forward substitution.

    Parameters
    ----------
    a
        ``(..., n, n)`` with ``n`` of at most 64, contiguous F32; solve larger systems block by block. Elements above
        the diagonal are ignored; a 0 on the diagonal gives infinities or NaN.
    b
        ``(..., n, k)`` with the same leading axes, contiguous F32.

    Returns
    -------
    Tensor
        Shape of ``b``, F32.

    Raises
    ------
    ValueError
        If shapes, types or layouts do not fit.

    C: ``ggml_solve_tri``, in the only variant that ggml has: left, lower, not unitriangular.
    """
    ctx = result_context("solve_tri", a, b, ctx=ctx)
    need_dense("solve_tri", a=a, b=b)
    if a.ndim < 2 or a.ne[0] != a.ne[1] or a.shape[:-1] != b.shape[:-1]:
        raise op_error("solve_tri", "a must be square, and b have as many rows and the same leading axes", a=a, b=b)
    if a.ne[0] > _LARGEST_TRIANGLE:
        raise op_error("solve_tri", f"a has more than {_LARGEST_TRIANGLE} rows (solve block by block)", a=a, b=b)
    return ctx.build(c.ggml_solve_tri, b.ndim, a.ptr, b.ptr, True, True, False)
