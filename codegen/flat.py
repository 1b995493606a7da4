"""The operations and constants of ``ggml_cffi.flat``, in C's names and order of arguments.

Most builders pass their arguments on unchanged. ``CALLS`` has the others: numpy's order of axes is reversed, and some
parameters of C do not exist in the checked operation. In the generated code ``to`` is :mod:`ggml_cffi.flat._args`.
"""

from __future__ import annotations

import keyword
import re

from codegen.declarations import Declarations
from codegen.emit import enum_name, sources
from codegen.headers import Function
from codegen.operations import builders, modules

#: Builders that are left out, each with its reason.
LEFT_OUT = {"ggml_flash_attn_back": "always ends the process: not adapted to the present ggml_flash_attn_ext"}

#: Builders that are written by hand in ``ggml_cffi/flat/``.
BY_HAND = {f"ggml_new_tensor{n}" for n in ("", "_1d", "_2d", "_3d", "_4d")} | {"ggml_dup_tensor"}

#: Enums whose members are exported under their C names.
ENUMS = (
    "ggml_type",
    "ggml_prec",
    "ggml_unary_op",
    "ggml_glu_op",
    "ggml_op_pool",
    "ggml_scale_mode",
    "ggml_scale_flag",
    "ggml_sort_order",
    "ggml_tri_type",
    "ggml_status",
    "ggml_backend_buffer_usage",
)

_OPTIONAL = {
    f"ggml_{op}": {"mask" if op.startswith(("soft", "flash")) else "c"}
    for op in (
        "soft_max_ext",
        "soft_max_ext_inplace",
        "flash_attn_ext",
        *(f"rope_{kind}{end}" for kind in ("ext", "multi") for end in ("", "_inplace", "_back")),
    )
} | {"ggml_dsv4_hc_post": {"comb"}}

_NE = {1: "(ne0,)", 2: "(ne1, ne0)", 3: "(ne2, ne1, ne0)", 4: "(ne3, ne2, ne1, ne0)"}
_WINDOW_2D = "(s1, s0), (p1, p0), (d1, d0)"
_WINDOW_3D = "(s2, s1, s0), (p2, p1, p0), (d2, d1, d0)"
_EITHER = "to.window(is_2D, s0, s1), to.window(is_2D, p0, p1), to.window(is_2D, d0, d1), is_2d=bool(is_2D)"
_ROPE = "n_dims=n_dims, mode=RopeMode(mode)"
_YARN = "".join(
    f", {n}={n}"
    for n in ("n_ctx_orig", "freq_base", "freq_scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow")
)
_PADS = "((lp3, rp3), (lp2, rp2), (lp1, rp1), (lp0, rp0))"
_PADS_AFTER = "((0, p3), (0, p2), (0, p1), (0, p0))"
_POOL = "op, (k1, k0), (s1, s0), (p1, p0)"
_TASKS = "n_tasks=to.tasks(n_tasks)"
_NO_DATA = "userdata=(userdata, None)"


def _same_rank(*names: str) -> str:
    """Return operands, each extended to the rank of the one with most axes."""
    return ", ".join(f"to.same_rank({n}, {', '.join(m for m in names if m != n)})" for n in names)


def _with_axes(**axes: int) -> str:
    return ", ".join(f"to.axes({name}, {n})" for name, n in axes.items())


#: For each builder the lines before its last call, and that call without ``ops.`` and ``ctx``.
CALLS: dict[str, tuple[str, ...]] = {
    "ggml_view_tensor": ("view(src, to.shape_of(src), strides=to.all_strides(src)",),
    "ggml_transpose": ("transpose(to.at_least(a, 2)",),
    "ggml_permute": (
        "t, axes = to.permute_axes(a, (axis0, axis1, axis2, axis3))",
        "permute(t, axes",
    ),
    "ggml_concat": (
        "n = to.n_axes_to_concat(a, b, dim)",
        "concat(to.axes(a, n), to.axes(b, n), n - 1 - dim",
    ),
    "ggml_repeat": ("repeat(a, to.shape_of(b, a)",),
    "ggml_repeat_4d": (f"repeat(a, {_NE[4]}",),
    "ggml_repeat_back": ("repeat_back(a, to.shape_of(b)",),
    **{f"ggml_cont_{n}d": (f"cont(a, {_NE[n]}",) for n in _NE},
    **{f"ggml_reshape_{n}d": (f"reshape(a, {_NE[n]}",) for n in _NE},
    "ggml_view_1d": ("view(a, (ne0,), offset=offset",),
    "ggml_view_2d": (f"view(a, {_NE[2]}, strides=(nb1, to.unit(a)), offset=offset",),
    "ggml_view_3d": (f"view(a, {_NE[3]}, strides=(nb2, nb1, to.unit(a)), offset=offset",),
    "ggml_view_4d": (f"view(a, {_NE[4]}, strides=(nb3, nb2, nb1, to.unit(a)), offset=offset",),
    **{
        f"ggml_{op}": (f"{op}(a, b, strides=to.strides(b, nb1, nb2, nb3), offset=offset",)
        for op in ("acc", "acc_inplace", "set", "set_inplace")
    },
    **{f"ggml_set_1d{end}": (f"set{end}(a, b, offset=offset",) for end in ("", "_inplace")},
    **{
        f"ggml_set_2d{end}": (f"set{end}(a, b, strides=to.strides(b, nb1, *to.tensor(a).nb[2:]), offset=offset",)
        for end in ("", "_inplace")
    },
    "ggml_leaky_relu": ("leaky_relu(a, negative_slope, inplace=bool(inplace)",),
    "ggml_argmax": ("argmax(to.at_most(a, 2)",),
    "ggml_count_equal": (f"count_equal({_with_axes(a=2, b=2)}",),
    "ggml_silu_back": (f"silu_back({_same_rank('a', 'b')}",),
    "ggml_rms_norm_back": (f"rms_norm_back({_same_rank('a', 'b')}, eps",),
    **{
        f"ggml_soft_max_ext{end}": (f"soft_max_ext{end}(a, mask, scale=scale, max_bias=max_bias",)
        for end in ("", "_inplace")
    },
    **{
        f"ggml_soft_max_ext_back{end}": (
            f'to.check_fixed("ggml_soft_max_ext_back{end}", max_bias=(max_bias, 0.0))',
            f"soft_max_ext_back{end}({_same_rank('a', 'b')}, scale=scale",
        )
        for end in ("", "_inplace")
    },
    "ggml_get_rows_back": (
        'n = to.n_rows("ggml_get_rows_back", a, c)',
        f"get_rows_back({_with_axes(a=2, b=1)}, n",
    ),
    **{f"ggml_rope{end}": (f"rope{end}(a, b, {_ROPE}",) for end in ("", "_inplace")},
    **{f"ggml_rope_ext{end}": (f"rope_ext{end}(a, b, c, {_ROPE}{_YARN}",) for end in ("", "_inplace", "_back")},
    **{
        f"ggml_rope_multi{end}": (f"rope_multi{end}(a, b, c, sections=sections, {_ROPE}{_YARN}",)
        for end in ("", "_inplace", "_back")
    },
    **{f"ggml_rope_custom{end}": (f"rope_ext{end}(a, b, None, {_ROPE}{_YARN}",) for end in ("", "_inplace")},
    **{
        f"ggml_add1{end}": (f'to.check_scalar("ggml_add1{end}", b)', f"add{end}(a, b") for end in ("", "_inplace")
    },
    "ggml_im2col": (f"im2col(a, b, {_EITHER}, dtype=dst_type",),
    "ggml_im2col_back": (f"im2col_back(a, b, tuple(ne)[::-1], {_EITHER}",),
    "ggml_im2col_3d": (f"im2col_3d(a, b, IC, {_WINDOW_3D}, dtype=dst_type",),
    "ggml_col2im_1d": ("col2im_1d(a, oc, s0, p0",),
    # In C the kernel comes first.
    **{f"ggml_{op}": (f"{op}(b, a, s0, p0, d0",) for op in ("conv_1d", "conv_1d_dw")},
    "ggml_conv_1d_ph": ("conv_1d_ph(b, a, s, d",),
    "ggml_conv_1d_dw_ph": ("conv_1d_dw_ph(b, a, s0, d0",),
    **{f"ggml_{op}": (f"{op}(b, a, {_WINDOW_2D}",) for op in ("conv_2d", "conv_2d_dw", "conv_2d_direct")},
    **{f"ggml_{op}": (f"{op}(b, a",) for op in ("conv_2d_sk_p0", "conv_2d_s1_ph")},
    "ggml_conv_2d_dw_direct": (
        "conv_2d_dw_direct(b, a, (stride1, stride0), (pad1, pad0), (dilation1, dilation0)",
    ),
    "ggml_conv_3d": (f"conv_3d(b, a, IC, {_WINDOW_3D}",),
    "ggml_conv_3d_direct": (
        "to.check_volumes(a, b, n_channels, n_batch, n_channels_out)",
        f"conv_3d_direct(b, a, n_channels, {_WINDOW_3D}",
    ),
    "ggml_conv_transpose_1d": (
        'to.check_fixed("ggml_conv_transpose_1d", p0=(p0, 0), d0=(d0, 1))',
        "conv_transpose_1d(b, a, s0",
    ),
    "ggml_conv_transpose_2d_p0": ("conv_transpose_2d_p0(b, a, stride",),
    "ggml_pool_2d": (f"pool_2d(a, {_POOL}",),
    "ggml_pool_2d_back": (f"pool_2d_back(a, af, {_POOL}",),
    "ggml_interpolate": (f"interpolate(to.axes(a, 4), {_NE[4]}, *to.scaling(mode)",),
    "ggml_upscale_ext": (f"interpolate(to.axes(a, 4), {_NE[4]}, mode",),
    "ggml_pad": (f"pad(to.axes(a, 4), {_PADS_AFTER}",),
    "ggml_pad_circular": (f"pad_circular(to.axes(a, 4), {_PADS_AFTER}",),
    "ggml_pad_ext": (f"pad(to.axes(a, 4), {_PADS}",),
    "ggml_pad_ext_circular": (f"pad_circular(to.axes(a, 4), {_PADS}",),
    "ggml_pad_reflect_1d": ("pad_reflect_1d(a, (p0, p1)",),
    "ggml_roll": ("roll(to.axes(a, 4), (shift3, shift2, shift1, shift0), (0, 1, 2, 3)",),
    "ggml_flash_attn_ext": (
        "flash_attn_ext(q, k, v, mask, scale=scale, max_bias=max_bias, logit_softcap=logit_softcap",
    ),
    "ggml_win_unpart": (
        'to.check_fixed("ggml_win_unpart", w=(w, to.tensor(a).ne[1]))',
        "win_unpart(a, (h0, w0)",
    ),
    "ggml_ssm_conv": (f"ssm_conv({_with_axes(sx=3, c=2)}",),
    "ggml_ssm_scan": (f"ssm_scan({_with_axes(s=4, x=4, dt=3, A=2, B=4, C=4, ids=1)}, n_snapshots=K",),
    "ggml_rwkv_wkv6": (f"rwkv_wkv6({_with_axes(k=3, v=3, r=3, tf=2, td=3, state=2)}",),
    "ggml_rwkv_wkv7": (f"rwkv_wkv7({_with_axes(r=3, w=3, k=3, v=3, a=3, b=3, state=2)}",),
    "ggml_gated_linear_attn": (f"gated_linear_attn({_with_axes(k=3, v=3, q=3, g=3, state=2)}, scale=scale",),
    "ggml_gated_delta_net": (f"gated_delta_net({_with_axes(q=4, k=4, v=4, g=4, beta=4, state=4)}, n_snapshots=K",),
    "ggml_solve_tri": (
        'to.check_fixed("ggml_solve_tri", left=(left, True), lower=(lower, True), uni=(uni, False))',
        f"solve_tri({_with_axes(a=4, b=4)}",
    ),
    "ggml_lightning_indexer": (f"lightning_indexer({_with_axes(q=4, k=4, weights=4, mask=4)}",),
    "ggml_dsv4_hc_comb": (f"dsv4_hc_comb({_with_axes(mixes=2, scale=1, base=1)}, eps=eps, n_iter=n_iter",),
    "ggml_dsv4_hc_pre": (f"dsv4_hc_pre({_with_axes(x=3, weights=2)}",),
    "ggml_dsv4_hc_pre_gated": (f"dsv4_hc_pre_gated({_with_axes(x=3, gate=3)}, scale",),
    "ggml_dsv4_hc_post": (f"dsv4_hc_post({_with_axes(x=2, residual=3, post=2)}, to.optional_axes(comb, 3)",),
    "ggml_cross_entropy_loss": (f"cross_entropy_loss({_same_rank('a', 'b')}",),
    "ggml_cross_entropy_loss_back": (f"cross_entropy_loss_back(a, {_same_rank('b', 'c')}",),
    "ggml_opt_step_adamw": (
        f"opt_step_adamw({_same_rank('a', 'grad', 'm', 'v')}, to.axes(adamw_params, 1)",
    ),
    "ggml_opt_step_sgd": (f"opt_step_sgd({_same_rank('a', 'grad')}, to.axes(sgd_params, 1)",),
    **{
        f"ggml_map_custom{n}{end}": (
            f'to.check_fixed("ggml_map_custom{n}{end}", {_NO_DATA})',
            f"map_custom{n}{end}({', '.join('abc'[:n])}, fun, {_TASKS}",
        )
        for n in (1, 2, 3)
        for end in ("", "_inplace")
    },
    "ggml_custom_4d": (
        f'to.check_fixed("ggml_custom_4d", n_args=(n_args, len(args)), {_NO_DATA})',
        f"custom_4d(fun, args, {_NE[4]}, type, {_TASKS}",
    ),
    "ggml_custom_inplace": (
        f'to.check_fixed("ggml_custom_inplace", n_args=(n_args, len(args)), {_NO_DATA})',
        f"custom_inplace(a, fun, args, {_TASKS}",
    ),
}  # fmt: skip

#: Builders that choose an operation by a number: the table, and the operands.
_CHOICES = {
    "ggml_unary": 'to.choose("ggml_unary", _UNARY, op)(a',
    "ggml_unary_inplace": 'to.choose("ggml_unary_inplace", _UNARY_INPLACE, op)(a',
    "ggml_glu": 'to.choose("ggml_glu", _GLU_SWAPPED if swapped else _GLU, op)(a',
    "ggml_glu_split": 'to.choose("ggml_glu_split", _GLU_SPLIT, op)(a, b',
}


def generated(declared: Declarations) -> list[Function]:
    """Return the builders that are generated."""
    return [f for f in builders(declared) if f.name not in LEFT_OUT and f.name not in BY_HAND]


def operations(declared: Declarations) -> str:
    """Return the text of ``ggml_cffi/flat/_ops.py``."""
    functions = generated(declared)
    enums = sorted({"UnaryOp", "GluOp", *(enum_name(name) for name in ENUMS)})
    lines = [
        f"# Generated by `python -m codegen` from the headers of ggml {sources(declared)}. Do not edit.",
        "# ruff: noqa: A002, E501, I001, N803, RUF022",
        "# fmt: off",
        '"""C\'s names for the operations and constants: see :mod:`ggml_cffi.flat`."""',
        "",
        "from __future__ import annotations",
        "",
        "from collections.abc import Callable, Sequence",
        "",
        "from ggml_cffi import ops",
        "from ggml_cffi.core.context import Context",
        "from ggml_cffi.core.tensor import Tensor",
        f"from ggml_cffi.enums import {', '.join(enums)}",
        "from ggml_cffi.flat import _args as to",
        "from ggml_cffi.ops.rope import RopeMode",
        "",
    ]
    constants = _constants(declared)
    lines += [f"{name} = {value}" for name, value in constants.items()]
    lines += ["", *_tables(declared)]
    for f in functions:
        lines += ["", "", *_function(f)]
    names = sorted([*constants, *(f.name for f in functions)], key=lambda name: (not name.isupper(), name))
    lines += ["", "", "__all__ = [", *(f'    "{name}",' for name in names), "]", ""]
    return "\n".join(lines)


def _constants(declared: Declarations) -> dict[str, str]:
    found = {}
    for c_name in ENUMS:
        kind, members = enum_name(c_name), declared.enums[c_name]
        found |= {name: f"{kind}({value})" for name, value in members.items() if not name.endswith("_COUNT")}
    for name in declared.macros:
        if name.startswith("GGML_ROPE_TYPE_"):
            found[name] = f"RopeMode({declared.macros[name]})"
    found["GGML_N_TASKS_MAX"] = "-1"
    return found


def _tables(declared: Declarations) -> list[str]:
    """Return the tables from members of an enum to operations that take operands only."""
    known = {name for module in modules() for name in module.exported}
    lines = []
    for table, kind, end in (
        ("_UNARY", "unary", ""),
        ("_UNARY_INPLACE", "unary", "_inplace"),
        ("_GLU", "glu", ""),
        ("_GLU_SWAPPED", "glu", "_swapped"),
        ("_GLU_SPLIT", "glu", "_split"),
    ):
        lines.append(f"{table}: dict[int, Callable[..., Tensor]] = {{")
        for member in declared.enums[f"ggml_{kind}_op"]:
            name = member.removeprefix(f"GGML_{kind.upper()}_OP_").lower()
            if name + end in known and name not in ("xielu", "swiglu_oai"):
                lines.append(f"    {kind.capitalize()}Op.{name.upper()}: ops.{name}{end},")
        lines.append("}")
    return lines


def _function(f: Function) -> list[str]:
    names = [f"{name}_" if keyword.iskeyword(name) else name for name, _ in f.params]
    types = [_type(f.name, name, text) for name, text in f.params]
    params = ", ".join(
        f"{name}: {kind}{' = None' if name == 'userdata' else ''}" for name, kind in zip(names, types, strict=True)
    )
    operation = f.name.removeprefix("ggml_")
    if f.name in _CHOICES:
        before, call = (), _CHOICES[f.name]
        summary = "Apply the operation with the number ``op``"
    else:
        *before, last = CALLS.get(f.name, (f"{operation}({', '.join(names[1:])}",))
        call = f"ops.{last}"
        summary = f"See :func:`ggml_cffi.ops.{re.match(r'[a-z0-9_]+', last)[0]}`"  # type: ignore[index]
    separator = "" if call.endswith("(") else ", "
    return [
        f"def {f.name}({params}) -> Tensor:",
        f'    """{summary}. C: ``{f.name}``."""',
        *(f"    {line}" for line in before),
        f"    return {call}{separator}ctx=ctx)",
    ]


def _type(function: str, name: str, text: str) -> str:
    text = text.removeprefix("const ")
    if text == "struct ggml_context *":
        return "Context"
    if text == "struct ggml_tensor *":
        return "Tensor | None" if name in _OPTIONAL.get(function, ()) else "Tensor"
    if text.startswith("struct ggml_tensor *"):
        return "Sequence[Tensor]"
    if text.startswith("enum "):
        return enum_name(text.removeprefix("enum "))
    if text in ("int [4]", "int64_t *"):
        return "Sequence[int]"
    if text.endswith("_op_t"):
        return "Callable[..., object]"
    return {"float": "float", "_Bool": "bool", "void *": "object"}.get(text, "int")
