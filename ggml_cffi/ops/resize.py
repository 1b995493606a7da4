"""Resampling, padding, shifting and triangles; ranges and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ggml_cffi import c
from ggml_cffi.core.context import Context
from ggml_cffi.core.shapes import check_shape, ne_of
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import ScaleFlag, ScaleMode, TriType, Type
from ggml_cffi.ops._operands import (
    check_groups,
    check_result,
    check_sizes,
    check_start,
    contiguous_rows,
    is_contiguous,
    op_error,
    result_context,
)
from ggml_cffi.ops._parameters import INT_MAX, MAX_GROUPS, check_integer, check_member, check_real

__all__ = [
    "arange",
    "fill",
    "fill_inplace",
    "interpolate",
    "pad",
    "pad_circular",
    "pad_reflect_1d",
    "roll",
    "timestep_embedding",
    "tri",
    "upscale",
]

_LONGEST = 2**22  # with longer axes, rounding in single precision leads the kernels to rows that do not exist
_LONGEST_SHIFT = 2**15 - 1  # limit of the GPUs' kernel


def _f32(op: str, a: Tensor) -> None:
    if a.dtype is not Type.F32:
        raise op_error(op, "a must be F32", a=a)
    check_sizes(op, a=a)


def _check_ne(op: str, ne: Sequence[int], a: Tensor) -> None:
    """Raise ``ValueError`` unless the kernels can count the elements of a result."""
    check_result(op, tuple(ne))
    if np.prod(ne, dtype=object) > INT_MAX:
        raise op_error(op, "the result would have 2**31 elements or more", a=a)


# ---------------------------------------------------------------------- interpolation


def _interpolated(op: str, a: Tensor, ne: Sequence[int], mode: ScaleMode, flags: ScaleFlag) -> int:
    """Check an interpolation, and return the number of its mode in C."""
    kind = check_member(op, ScaleMode, mode)
    bits = check_integer(op, "flags", flags, 0, ScaleFlag.ALIGN_CORNERS | ScaleFlag.ANTIALIAS)
    if bits & 0xFF:
        raise ValueError(f"{op}: flags must be of ScaleFlag, not {flags!r}")
    if bits & ScaleFlag.ANTIALIAS and kind is not ScaleMode.BILINEAR:
        raise ValueError(f"{op}: ggml supports ANTIALIAS with BILINEAR only")
    if bits & ScaleFlag.ALIGN_CORNERS and kind is ScaleMode.NEAREST:  # single precision rounds whole numbers down
        raise ValueError(f"{op}: ALIGN_CORNERS has no meaning for NEAREST")
    if bits & ScaleFlag.ANTIALIAS and bits & ScaleFlag.ALIGN_CORNERS:  # ggml's filter misses the pixel to the right
        raise ValueError(f"{op}: ggml's ANTIALIAS is wrong with ALIGN_CORNERS")
    _f32(op, a)
    if min(ne) < 1 or max(*ne, *a.ne) > _LONGEST:
        raise op_error(op, f"sizes must be 1 to {_LONGEST}, before and after", a=a)
    _check_ne(op, ne, a)
    return int(kind) | int(bits)


def interpolate(
    a: Tensor,
    shape: Sequence[int],
    mode: ScaleMode = ScaleMode.NEAREST,
    flags: ScaleFlag | int = 0,
    *,
    ctx: Context | None = None,
) -> Tensor:
    """Resample ``a`` to another shape.

    The last two axes are interpolated. Along the other axes, the result takes elements as ``NEAREST`` does.

    Parameters
    ----------
    a
        F32.
    shape
        One size per axis of ``a``.
    mode
        ``NEAREST`` takes element ``floor(i * old / new)``; ``BILINEAR`` and ``BICUBIC`` (``a = -0.75``) interpolate
        between the centres of elements.
    flags
        ``ALIGN_CORNERS`` keeps the first and the last elements in their places. ``ANTIALIAS``, for ``BILINEAR`` only,
        widens the filter if the result is smaller.

    Raises
    ------
    ValueError
        If sizes, type or mode do not fit.

    C: ``ggml_interpolate``. Source: Keys, Cubic convolution interpolation for digital image processing, 1981.
    """
    ctx = result_context("interpolate", a, ctx=ctx)
    sizes = check_shape(shape)
    if len(sizes) != a.ndim:
        raise op_error("interpolate", f"{sizes} has a different number of axes", a=a)
    ne = ne_of(sizes)
    bits = _interpolated("interpolate", a, ne, mode, flags)  # type: ignore[arg-type]
    return ctx.build(c.ggml_interpolate, a.ndim, a.ptr, *ne, bits)


def upscale(a: Tensor, factor: int, mode: ScaleMode = ScaleMode.NEAREST, *, ctx: Context | None = None) -> Tensor:
    """Enlarge the last two axes by ``factor``, as :func:`interpolate` does.

    Parameters
    ----------
    a
        ``(..., h, w)``, F32.
    factor
        2 or more.
    mode
        As for :func:`interpolate`.

    Raises
    ------
    ValueError
        If ``factor``, type or sizes do not fit.

    C: ``ggml_upscale``.
    """
    ctx = result_context("upscale", a, ctx=ctx)
    n = check_integer("upscale", "factor", factor, 2)
    bits = _interpolated("upscale", a, (a.ne[0] * n, a.ne[1] * n, *a.ne[2:]), mode, ScaleFlag(0))
    return ctx.build(c.ggml_upscale, max(a.ndim, 2), a.ptr, n, bits)


# ---------------------------------------------------------------------- padding


def _pair(op: str, value: Any) -> tuple[int, int]:
    """Return the numbers of elements before and after an axis."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        n = check_integer(op, "pad_width", value, 0)
        return n, n
    if len(value) != 2:
        raise ValueError(f"{op}: pad_width is an integer or (before, after), not {value!r}")
    return check_integer(op, "pad_width", value[0], 0), check_integer(op, "pad_width", value[1], 0)


def _widths(op: str, a: Tensor, pad_width: Any) -> list[tuple[int, int]]:
    """Return the numbers of elements before and after each of the four axes, in ggml's order."""
    given = pad_width
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not any(_is_pair(v) for v in given):
        pairs = [_pair(op, given)] * a.ndim
    elif len(given) == a.ndim:
        pairs = [_pair(op, v) for v in given]
    else:
        raise op_error(op, f"pad_width {given!r} needs one pair per axis", a=a)
    widths = [*reversed(pairs), *[(0, 0)] * (4 - a.ndim)]
    _check_ne(op, [n + before + after for n, (before, after) in zip(a.ne, widths, strict=True)], a)
    return widths


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def pad(a: Tensor, pad_width: int | Sequence[int] | Sequence[Sequence[int]], *, ctx: Context | None = None) -> Tensor:
    """Pad ``a`` with zeros, as ``numpy.pad(a, pad_width)`` does.

    Parameters
    ----------
    a
        F32.
    pad_width
        One number for all sides, one pair ``(before, after)`` for all axes, or one pair per axis.

    Raises
    ------
    ValueError
        If type or widths do not fit.

    C: ``ggml_pad``, ``ggml_pad_ext``.
    """
    ctx = result_context("pad", a, ctx=ctx)
    _f32("pad", a)
    widths = _widths("pad", a, pad_width)
    return ctx.build(c.ggml_pad_ext, a.ndim, a.ptr, *(n for pair in widths for n in pair))


def pad_circular(
    a: Tensor, pad_width: int | Sequence[int] | Sequence[Sequence[int]], *, ctx: Context | None = None
) -> Tensor:
    """Pad ``a`` with elements from its other end, as ``numpy.pad(a, pad_width, mode="wrap")`` does.

    Parameters
    ----------
    a
        F32.
    pad_width
        As for :func:`pad`; the padding before an axis is at most the size of the axis.

    Raises
    ------
    ValueError
        If type or widths do not fit.

    C: ``ggml_pad_circular``, ``ggml_pad_ext_circular``.
    """
    ctx = result_context("pad_circular", a, ctx=ctx)
    _f32("pad_circular", a)
    widths = _widths("pad_circular", a, pad_width)
    if any(before > n for n, (before, _) in zip(a.ne, widths, strict=True)):
        raise op_error("pad_circular", "the padding before an axis must not exceed its size", a=a)
    return ctx.build(c.ggml_pad_ext_circular, a.ndim, a.ptr, *(n for pair in widths for n in pair))


def pad_reflect_1d(a: Tensor, pad_width: int | Sequence[int], *, ctx: Context | None = None) -> Tensor:
    """Pad the last axis with its mirror image, as ``numpy.pad(..., mode="reflect")`` does.

    Parameters
    ----------
    a
        Contiguous F32.
    pad_width
        One number for both ends or ``(before, after)``, less than the size of the axis.

    Raises
    ------
    ValueError
        If type, layout or widths do not fit.

    C: ``ggml_pad_reflect_1d``.
    """
    ctx = result_context("pad_reflect_1d", a, ctx=ctx)
    before, after = _pair("pad_reflect_1d", pad_width)
    if a.dtype is not Type.F32 or not is_contiguous(a):
        raise op_error("pad_reflect_1d", "a must be contiguous F32 (use cont)", a=a)
    check_sizes("pad_reflect_1d", a=a)
    if max(before, after) >= a.ne[0]:
        raise op_error("pad_reflect_1d", "the last axis must be longer than the padding before and after it", a=a)
    _check_ne("pad_reflect_1d", (a.ne[0] + before + after, *a.ne[1:]), a)
    return ctx.build(c.ggml_pad_reflect_1d, max(a.ndim, 1), a.ptr, before, after)


# ---------------------------------------------------------------------- shifts and triangles


def roll(a: Tensor, shift: int | Sequence[int], axis: int | Sequence[int], *, ctx: Context | None = None) -> Tensor:
    """Shift elements along axes; those beyond one end return at the other, as ``numpy.roll(a, shift, axis)`` does.

    Parameters
    ----------
    a
        F32, contiguous rows.
    shift
        Distance of the shift, negative towards the start: one for each of ``axis``, or one for all. At most 32767 in
        the shorter direction.
    axis
        One axis or several.

    Raises
    ------
    ValueError
        If type, axes or shifts do not fit.

    C: ``ggml_roll``.
    """
    op = "roll"
    ctx = result_context(op, a, ctx=ctx)
    many = [isinstance(v, Sequence) and not isinstance(v, str | bytes) for v in (shift, axis)]
    given = list(axis) if many[1] else [axis]  # type: ignore[arg-type]
    axes = [check_integer(op, "axis", i, -a.ndim, a.ndim - 1) for i in given]
    shifts = list(shift) if many[0] else [shift] * len(axes)  # type: ignore[arg-type]
    if many[0] and not many[1]:
        axes *= len(shifts)
    if len(axes) != len(shifts):
        raise ValueError(f"{op}: {len(shifts)} shifts for {len(axes)} axes")
    _f32(op, a)
    if not contiguous_rows(a):
        raise op_error(op, "the rows of a must be contiguous (use cont)", a=a)
    total = [0, 0, 0, 0]
    for n, i in zip(shifts, axes, strict=True):
        total[a.ndim - 1 - i % a.ndim] += check_integer(op, "shift", n, -INT_MAX)
    for i, n in enumerate(a.ne):
        total[i] = (total[i] + n // 2) % n - n // 2  # a shift in the shorter direction
        if abs(total[i]) > _LONGEST_SHIFT:
            raise op_error(op, f"a shift by {total[i]} is more than {_LONGEST_SHIFT}", a=a)
    return ctx.build(c.ggml_roll, a.ndim, a.ptr, *total)


def tri(a: Tensor, kind: TriType, *, ctx: Context | None = None) -> Tensor:
    """Keep one triangle of each matrix, and zero the other, as ``numpy.tril`` and ``numpy.triu`` do.

    Parameters
    ----------
    a
        ``(..., n, n)``, contiguous F32.
    kind
        ``LOWER_DIAG`` is ``tril``, ``UPPER_DIAG`` is ``triu``; ``LOWER`` and ``UPPER`` exclude the diagonal.

    Raises
    ------
    ValueError
        If ``a`` does not fit.

    C: ``ggml_tri``.
    """
    ctx = result_context("tri", a, ctx=ctx)
    triangle = check_member("tri", TriType, kind)
    if a.dtype is not Type.F32 or not is_contiguous(a) or a.ne[0] != a.ne[1]:
        raise op_error("tri", "a must be contiguous F32 (use cont), with square matrices", a=a)
    check_sizes("tri", a=a)
    return ctx.build(c.ggml_tri, a.ndim, a.ptr, triangle)


# ---------------------------------------------------------------------- constants


def _fill(op: str, function: Callable[..., Any], a: Tensor, value: float, ctx: Context | None) -> Tensor:
    ctx = result_context(op, a, ctx=ctx)
    x = check_real(op, "value", value, infinite=True)
    if a.dtype not in (Type.F32, Type.F16) or not is_contiguous(a):
        raise op_error(op, "a must be contiguous F32 or F16", a=a)
    if a.dtype is Type.F16 and 65520 <= abs(x) < float("inf"):
        raise op_error(op, f"F16 cannot hold {x}", a=a)
    check_groups(op, "elements", a.size, 512)
    if op == "fill_inplace":
        check_start(op, a=a)
    return ctx.build(function, a.ndim, a.ptr, x)


def fill(a: Tensor, value: float, *, ctx: Context | None = None) -> Tensor:
    """Create a tensor of ``a``'s shape and type with one value everywhere, as ``numpy.full_like`` does.

    Parameters
    ----------
    a
        Contiguous F32 or F16, of at most 33,553,920 elements, the limit of some GPUs.
    value
        A number, possibly infinite.

    Raises
    ------
    ValueError
        If ``a`` does not fit, or its type cannot hold ``value``.

    C: ``ggml_fill``.
    """
    return _fill("fill", c.ggml_fill, a, value, ctx)


def fill_inplace(a: Tensor, value: float, *, ctx: Context | None = None) -> Tensor:
    """Compute :func:`fill` in place: write the result over ``a``. C: ``ggml_fill_inplace``."""
    return _fill("fill_inplace", c.ggml_fill_inplace, a, value, ctx)


def arange(start: float, stop: float | None = None, step: float = 1.0, *, ctx: Context) -> Tensor:
    """Create ``start, start + step, ...`` up to but without ``stop``, as ``numpy.arange`` does, in F32.

    Parameters
    ----------
    start, stop
        Limits, with ``stop`` above ``start``. A single number is the stop of a range from 0.
    step
        Distance of the elements, above 0. The length, ``ceil((stop - start) / step)``, is computed in F32 too.
    ctx
        Context of the result, required because there are no operands.

    Raises
    ------
    ValueError
        If there would be no element, or more than 33,553,920.

    C: ``ggml_arange``.
    """
    if ctx is None:
        raise TypeError("arange: ctx is required, since there are no operands")
    ctx = result_context("arange", ctx=ctx)
    ends = (0.0, start) if stop is None else (start, stop)
    first, last = (np.float32(check_real("arange", name, x)) for name, x in zip(("start", "stop"), ends, strict=True))
    by = np.float32(check_real("arange", "step", step))
    if not (last > first and by > 0):
        raise ValueError(f"arange: stop must be above start and step above 0, not {first}, {last}, {by}")
    with np.errstate(over="ignore", under="ignore"):
        count = np.ceil((last - first) / by)
    if not 1 <= count <= MAX_GROUPS * 512:
        raise ValueError(f"arange: the number of elements must be 1 to {MAX_GROUPS * 512}, not {count}")
    return ctx.build(c.ggml_arange, 1, float(first), float(last), float(by))


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000, *, ctx: Context | None = None) -> Tensor:
    """Embed times as cosines, then sines, at ``dim // 2`` frequencies from 1 down to almost ``1 / max_period``.

    ``cos(t * max_period**(-i / (dim // 2)))``

    Parameters
    ----------
    timesteps
        ``(n,)``, F32.
    dim
        Size of an embedding. If it is odd, the last element is 0.
    max_period
        Longest period, at least 1.

    Returns
    -------
    Tensor
        ``(n, dim)``, F32.

    Raises
    ------
    ValueError
        If ``timesteps`` or the parameters do not fit.

    C: ``ggml_timestep_embedding``. Source: Vaswani et al., Attention is all you need, 2017; Ho et al., Denoising
    diffusion probabilistic models, 2020.
    """
    op = "timestep_embedding"
    ctx = result_context(op, timesteps, ctx=ctx)
    n, period = check_integer(op, "dim", dim, 2, MAX_GROUPS * 256), check_integer(op, "max_period", max_period, 1)
    if timesteps.dtype is not Type.F32 or not contiguous_rows(timesteps) or timesteps.ne[1:] != (1, 1, 1):
        raise op_error(op, "timesteps must be an F32 vector", timesteps=timesteps)
    check_sizes(op, timesteps=timesteps)
    check_start(op, timesteps=timesteps)
    check_groups(op, "times", timesteps.ne[0])
    check_result(op, (n, timesteps.ne[0]))
    return ctx.build(c.ggml_timestep_embedding, 2, timesteps.ptr, n, period)
