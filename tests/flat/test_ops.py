"""Generated operations: each builder, with arguments in C's order, against the checked operations and against C."""

import re

import numpy as np
import pytest

import ggml_cffi as ggml
from codegen import flat as generator
from ggml_cffi import c, flat
from tests import cases
from tests.support.flat_guide import CPU, F32

NAMES = {getattr(c, name): name for name in dir(c) if name in flat.__all__ and name.startswith("ggml_")}

BY_OP = {case.op: [same for same in cases.CASES if same.op == case.op] for case in cases.CASES}


class Recorder:
    """A recorder of the builders that Python calls in C, with their arguments."""

    def __init__(self, monkeypatch):
        self.calls = []
        build = ggml.Context.build

        def recorded(ctx, function, ndim, *args, **options):
            self.calls.append((NAMES.get(function), args))
            return build(ctx, function, ndim, *args, **options)

        emit = ggml.Context.emit

        def emitted(ctx, function, ndim, head, *args):
            self.calls.append((NAMES.get(function), args))
            return emit(ctx, function, ndim, head, *args)

        monkeypatch.setattr(ggml.Context, "build", recorded)
        monkeypatch.setattr(ggml.Context, "emit", emitted)


def is_tensor(arg):
    return isinstance(arg, c.ffi.CData) and c.ffi.typeof(arg) is c.ffi.typeof("struct ggml_tensor *")


def as_flat_argument(arg, ctx, four):
    """Return an argument of C as the flat function takes it."""
    if not isinstance(arg, c.ffi.CData):
        return arg
    if arg == c.NULL:
        return None
    if is_tensor(arg):
        return ggml.Tensor(ctx, arg, 4 if four else c.ggml_n_dims(arg))
    return tuple(arg)


def comparable(arg):
    """Return an argument of C by its value."""
    if is_tensor(arg):  # a tensor that is made for each call, for its sizes only
        return tuple(arg.ne) if arg.op == 0 and not arg.nb[0] else int(c.ffi.cast("uintptr_t", arg))
    return tuple(arg) if isinstance(arg, c.ffi.CData) and arg != c.NULL else arg


CUSTOM = {name for name in BY_OP if "custom" in name}


@pytest.mark.parametrize("op", sorted(set(BY_OP) - CUSTOM))
def test_a_builder_passes_the_same_arguments_to_c_as_the_operation(op, monkeypatch, rng):
    """The flat function, called with the arguments that the operation passed to C, passes the same arguments on."""
    recorder = Recorder(monkeypatch)
    for i, case in enumerate(BY_OP[op]):
        with ggml.Context() as ctx:
            try:
                result, inputs = case.build(ctx)
            except ggml.LibraryMismatchError:  # for a newer version of ggml
                continue
            name, args = recorder.calls[-1]
            if name is None or name in generator.BY_HAND:
                assert op.startswith(("rope", "opt_step")) or case.op == "linear", f"{op} calls no builder of ggml.h"
                continue
            for four in (False, True):
                again = getattr(flat, name)(ctx, *(as_flat_argument(arg, ctx, four) for arg in args))
                calls = recorder.calls[-1]
                assert (calls[0], [*map(comparable, calls[1])]) == (name, [*map(comparable, args)])
                assert again.ne == result.ne
            special = {"prec", "b_prec", "sinks", "offset"} & {k for k, v in case.arguments.items() if v is not None}
            if i == 0 and not result.ptr.view_src and not special:
                compare(ctx, case, inputs, result, again, rng)


def compare(ctx, case, inputs, result, again, rng):
    with ggml.Graph(result, again) as graph, ggml.Scheduler(["CPU"]) as scheduler:
        scheduler.alloc(graph)
        for name, base in inputs.items():
            spec = case.operands()[name]
            spec.store(base, spec.draw(rng))
        scheduler.compute(graph)
        got = again.numpy()
        np.testing.assert_array_equal(got.reshape(-1), result.numpy().reshape(-1))


def tensor_fields(t):
    p = t.ptr
    sources = [int(c.ffi.cast("uintptr_t", s)) for s in p.src]
    return p.op, p.type, [*p.ne], [*p.nb], [*p.op_params], sources, p.view_offs, p.view_src


# The checked operations call a more general builder for these: they are compared with C's own builders.
CALLS_IN_C = {
    "ggml_view_1d": lambda a, b: (a, 5, 8),
    "ggml_view_2d": lambda a, b: (a, 2, 3, a.nb[1], 4),
    "ggml_view_3d": lambda a, b: (a, 2, 3, 1, a.nb[1], a.nb[2], 4),
    "ggml_view_4d": lambda a, b: (a, 2, 3, 2, 1, a.nb[1], a.nb[2], a.nb[3], 0),
    "ggml_reshape": lambda a, b: (a, b),
    "ggml_reshape_1d": lambda a, b: (a, 24),
    "ggml_reshape_2d": lambda a, b: (a, 12, 2),
    "ggml_reshape_3d": lambda a, b: (a, 2, 3, 4),
    "ggml_reshape_4d": lambda a, b: (a, 2, 3, 2, 2),
    "ggml_cont": lambda a, b: (a,),
    "ggml_cont_1d": lambda a, b: (a, 24),
    "ggml_cont_2d": lambda a, b: (a, 12, 2),
    "ggml_cont_3d": lambda a, b: (a, 2, 3, 4),
    "ggml_cont_4d": lambda a, b: (a, 2, 3, 2, 2),
    "ggml_permute": lambda a, b: (a, 2, 0, 1, 3),
    "ggml_transpose": lambda a, b: (a,),
    "ggml_repeat_4d": lambda a, b: (a, 8, 3, 2, 5),
    "ggml_pad": lambda a, b: (a, 1, 2, 3, 4),
    "ggml_pad_ext": lambda a, b: (a, 1, 2, 3, 4, 5, 6, 7, 8),
    "ggml_pad_circular": lambda a, b: (a, 1, 2, 0, 1),
    "ggml_pad_ext_circular": lambda a, b: (a, 1, 2, 3, 0, 1, 1, 0, 1),
    "ggml_roll": lambda a, b: (a, 1, -1, 0, 0),
    "ggml_interpolate": lambda a, b: (a, 8, 9, 2, 1, 1 | flat.GGML_SCALE_FLAG_ALIGN_CORNERS),
    "ggml_upscale_ext": lambda a, b: (a, 8, 9, 2, 1, flat.GGML_SCALE_MODE_NEAREST),
    "ggml_concat": lambda a, b: (a, a, 3),
    "ggml_unary": lambda a, b: (a, flat.GGML_UNARY_OP_SILU),
    "ggml_unary_inplace": lambda a, b: (a, flat.GGML_UNARY_OP_NEG),
    "ggml_glu": lambda a, b: (a, flat.GGML_GLU_OP_GEGLU, True),
    "ggml_glu_split": lambda a, b: (a, a, flat.GGML_GLU_OP_SWIGLU),
    "ggml_dup_tensor": lambda a, b: (a,),
    "ggml_new_tensor_1d": lambda a, b: (F32, 5),
    "ggml_new_tensor_2d": lambda a, b: (F32, 5, 4),
    "ggml_new_tensor_3d": lambda a, b: (F32, 5, 4, 3),
    "ggml_new_tensor_4d": lambda a, b: (F32, 5, 4, 3, 2),
}


@pytest.mark.parametrize("name", CALLS_IN_C)
@pytest.mark.parametrize("axes", [3, 4])
def test_a_builder_makes_the_same_tensor_as_c(name, axes):
    with ggml.Context() as ctx:
        a = flat.ggml_new_tensor_4d(ctx, F32, 4, 3, 2, 1) if axes == 4 else flat.ggml_new_tensor_3d(ctx, F32, 4, 3, 2)
        b = flat.ggml_new_tensor_2d(ctx, F32, 6, 4)
        args = CALLS_IN_C[name](a, b)
        ours = getattr(flat, name)(ctx, *args)
        theirs = ctx.build(getattr(c, name), 4, *(x.ptr if isinstance(x, ggml.Tensor) else x for x in args), n=2)
        assert tensor_fields(ours) == tensor_fields(theirs)


def test_a_builder_makes_the_same_tensor_as_the_operation():
    """Builders are compared by their result where the operation calls other functions of C."""
    with ggml.Context() as ctx:
        a, b = flat.ggml_new_tensor_2d(ctx, F32, 4, 3), flat.ggml_new_tensor_2d(ctx, F32, 2, 2)
        v, numbers = flat.ggml_new_tensor_1d(ctx, F32, 2), flat.ggml_new_tensor_1d(ctx, F32, 7)
        m, n, grad, two = (flat.ggml_dup_tensor(ctx, t) for t in (a, a, a, v))
        wide, nb = flat.ggml_new_tensor_3d(ctx, F32, 8, 3, 2), a.nb[1]
        ctx.alloc("CPU", [a, m, n])
        column = flat.ggml_view_2d(ctx, a, 1, 3, nb, 4)
        for ours, theirs in (
            (flat.ggml_repeat(ctx, a, wide), ggml.repeat(a, (2, 3, 8))),
            (flat.ggml_view_tensor(ctx, column), ggml.view(column, (3, 1), strides=(nb, 4))),
            (flat.ggml_set_inplace(ctx, a, b, *a.nb[1:], 4), ggml.set_inplace(a, b, strides=(nb, 4), offset=4)),
            (flat.ggml_set_1d_inplace(ctx, a, v, 16), ggml.set_inplace(a, v, offset=16)),
            (flat.ggml_set_2d_inplace(ctx, a, b, nb, 4), ggml.set_inplace(a, b, strides=(nb, 4), offset=4)),
            (flat.ggml_add1_inplace(ctx, a, flat.ggml_view_1d(ctx, v, 1, 0)), None),
            (flat.ggml_opt_step_adamw(ctx, a, grad, m, n, numbers), ggml.opt_step_adamw(a, grad, m, n, numbers)),
            (flat.ggml_opt_step_sgd(ctx, a, grad, two), ggml.opt_step_sgd(a, grad, two)),
        ):
            assert theirs is None or tensor_fields(ours) == tensor_fields(theirs)
            assert ours.ptr.view_src in (c.NULL, a.ptr)


ROPE = (4, flat.GGML_ROPE_TYPE_NEOX, 128, 10000.0, 0.5, 0.0, 1.0, 32.0, 1.0)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ggml_rope", ROPE[:2]),
        ("ggml_rope_inplace", ROPE[:2]),
        ("ggml_rope_custom", ROPE),
        ("ggml_rope_custom_inplace", ROPE),
        ("ggml_rope_ext", (None, *ROPE)),
        ("ggml_rope_ext_inplace", (None, *ROPE)),
        ("ggml_rope_ext_back", (None, *ROPE)),
    ],
)
def test_rope_makes_the_same_tensor_as_c(name, args):
    with ggml.Context() as ctx:
        a, rows = flat.ggml_new_tensor_3d(ctx, F32, 4, 3, 2), flat.ggml_new_tensor_1d(ctx, flat.GGML_TYPE_I32, 2)
        ours = getattr(flat, name)(ctx, a, rows, *args)
        theirs = ctx.build(getattr(c, name), 3, a.ptr, rows.ptr, *(c.NULL if x is None else x for x in args), n=2)
        assert tensor_fields(ours) == tensor_fields(theirs)


def evaluate(*outputs):
    """Compute tensors on the CPU, and return their values as flat arrays."""
    with ggml.Graph(*outputs) as graph, flat.ggml_backend_sched_new([flat.ggml_backend_cpu_init()]) as sched:
        flat.ggml_backend_sched_graph_compute(sched, graph)
        return [flat.ggml_get_f32(t) for t in outputs]


def test_parts_are_written_where_c_writes_them():
    ctx = flat.ggml_init()
    a, b = flat.ggml_new_tensor_2d(ctx, F32, 4, 3), flat.ggml_new_tensor_2d(ctx, F32, 2, 2)
    v = flat.ggml_new_tensor_1d(ctx, F32, 2)
    flat.ggml_set_f32(a, np.arange(12))
    flat.ggml_set_f32(b, [10, 20, 30, 40])
    flat.ggml_set_f32(v, [-1, -2])
    got = evaluate(
        flat.ggml_set(ctx, a, b, *a.nb[1:], 4),
        flat.ggml_acc(ctx, a, b, *a.nb[1:], 4),
        flat.ggml_set_1d(ctx, a, v, 20),
        flat.ggml_set_2d(ctx, a, b, 16, 16),
        flat.ggml_add1(ctx, a, flat.ggml_new_f32(ctx, 0.5)),
    )
    want = np.tile(np.arange(12, dtype=np.float32).reshape(3, 4), (5, 1, 1))
    values = np.array([[10, 20], [30, 40]])
    want[0, :2, 1:3] = values
    want[1, :2, 1:3] += values
    want[2, 1, 1:3] = -1, -2
    want[3, 1:, :2] = values
    want[4] += 0.5
    np.testing.assert_array_equal(got, want.reshape(5, 12))
    flat.ggml_free(ctx)


def test_operations_written_in_python():
    ctx = flat.ggml_init()
    a, b = (flat.ggml_new_tensor_1d(ctx, F32, 3) for _ in range(2))
    flat.ggml_set_f32(a, [1, 2, 3])
    flat.ggml_set_f32(b, [4, 5, 6])

    def total(out, *operands):
        out[...] = sum(operands)

    ops = [
        flat.ggml_map_custom1(ctx, a, total, 1, None),
        flat.ggml_map_custom2(ctx, a, b, total, 1),
        flat.ggml_map_custom3(ctx, a, b, b, total, 1),
        flat.ggml_custom_4d(ctx, F32, 3, 1, 1, 1, [a, b], 2, total, 1, None),
        flat.ggml_map_custom1(ctx, a, lambda out, x, i, n: total(out[i::n], x[i::n]), flat.GGML_N_TASKS_MAX),
    ]
    np.testing.assert_array_equal(evaluate(*ops), [[1, 2, 3], [5, 7, 9], [9, 12, 15], [5, 7, 9], [1, 2, 3]])
    with pytest.raises(ValueError, match="userdata must be None"):
        flat.ggml_map_custom1(ctx, a, total, 1, 5)
    with pytest.raises(ValueError, match="n_args must be 1, not 2"):
        flat.ggml_custom_4d(ctx, F32, 3, 1, 1, 1, [a], 2, total, 1, None)
    for inplace in (
        lambda x: flat.ggml_map_custom1_inplace(ctx, x, lambda out, x: None, 1),
        lambda x: flat.ggml_map_custom2_inplace(ctx, x, b, lambda out, *_: None, 1),
        lambda x: flat.ggml_map_custom3_inplace(ctx, x, b, b, lambda out, *_: None, 1),
        lambda x: flat.ggml_custom_inplace(ctx, x, [b], 1, lambda out, *_: None, 1),
    ):
        assert inplace(a).ptr.view_src == a.ptr
    flat.ggml_free(ctx)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("is not a permutation of the axes 0 to 3", lambda ctx, a: flat.ggml_permute(ctx, a, 0, 1, 1, 3)),
        ("dim must be 0 to 3", lambda ctx, a: flat.ggml_concat(ctx, a, a, 4)),
        ("there is no operation 99", lambda ctx, a: flat.ggml_unary(ctx, a, 99)),
        ("takes operands only", lambda ctx, a: flat.ggml_unary(ctx, a, flat.GGML_UNARY_OP_XIELU)),
        ("uni must be False, not True", lambda ctx, a: flat.ggml_solve_tri(ctx, a, a, True, True, True)),
        ("p0 must be 0, not 1", lambda ctx, a: flat.ggml_conv_transpose_1d(ctx, a, a, 1, 1, 1)),
        ("max_bias must be 0.0", lambda ctx, a: flat.ggml_soft_max_ext_back(ctx, a, a, 1.0, 8.0)),
        ("must have one element", lambda ctx, a: flat.ggml_add1(ctx, a, a)),
        ("c must be a matrix", lambda ctx, a: flat.ggml_get_rows_back(ctx, a, a, flat.ggml_reshape_1d(ctx, a, 12))),
        ("n_channels * n_channels_out", lambda ctx, a: flat.ggml_conv_3d_direct(ctx, a, a, *[1] * 9, 2, 2, 2)),
        ("inner sizes differ", lambda ctx, a: flat.ggml_mul_mat(ctx, a, flat.ggml_transpose(ctx, a))),
        ("n_dims must be 1 to 4", lambda ctx, a: flat.ggml_new_tensor(ctx, F32, 5, [1] * 5)),
        ("n_dims must be 1 to 4", lambda ctx, a: flat.ggml_new_tensor(ctx, F32, 3, [1])),
        ("mem_size must be", lambda ctx, a: flat.ggml_init(-1)),
        ("takes 12 values", lambda ctx, a: flat.ggml_set_f32(a, [1, 2])),
        ("takes 12 values", lambda ctx, a: flat.ggml_set_f32(a, np.zeros((4, 3)))),
        ("has no memory", lambda ctx, a: flat.ggml_get_f32(a)),
        ("has no memory", lambda ctx, a: flat.ggml_set_f32(flat.ggml_neg(ctx, a), 1)),
        ("is not an integer tensor", lambda ctx, a: flat.ggml_get_i32(a)),
        ("n_threads must be 1 to 512", lambda ctx, a: flat.ggml_backend_cpu_set_n_threads(CPU(), 0)),
        ("at least one backend", lambda ctx, a: flat.ggml_backend_sched_new([])),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_with_the_rule(message, call):
    with ggml.Context() as ctx, pytest.raises(ValueError, match=re.escape(message)):
        call(ctx, flat.ggml_new_tensor_2d(ctx, F32, 4, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: flat.ggml_free(1),
        lambda: flat.ggml_backend_free("CPU"),
        lambda: flat.ggml_backend_sched_free(object()),
        lambda: flat.ggml_backend_name(None),
        lambda: flat.ggml_new_tensor_1d(None, F32, 1),
        lambda: flat.ggml_set_f32(None, 1),
        lambda: flat.ggml_add(None, None, None),
        lambda: flat.ggml_view_tensor(None, None),
        lambda: flat.ggml_win_unpart(None, None, 1, 1, 1),
        lambda: flat.ggml_repeat(None, None, 1),
        lambda: flat.ggml_init("16MB"),
        lambda: flat.ggml_backend_sched_new(CPU()),
        lambda: flat.ggml_backend_sched_new(["no", None]),
        lambda: flat.ggml_vulkan_init("0"),
        lambda: flat.ggml_backend_sched_reserve(None, None),
    ],
)
def test_wrong_types_are_refused(call):
    with pytest.raises((TypeError, ValueError)):
        call()
