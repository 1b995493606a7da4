"""``ggml_cffi.flat``: the guide's functions, every builder in C's order of arguments, and what C gets wrong."""

import re

import numpy as np
import pytest

import ggml_cffi as ggml
from codegen import flat as generator
from codegen import headers, operations
from ggml_cffi import c, flat
from ggml_cffi.flat import *  # noqa: F403
from tests import cases
from tests.support import ROOT, run_python

GUIDE = """
ggml_vulkan_available ggml_vulkan_device_count ggml_vulkan_device_description ggml_vulkan_device_memory ggml_vulkan_init
ggml_vulkan_free ggml_backend_cpu_init ggml_backend_cpu_set_n_threads ggml_backend_name ggml_backend_free
ggml_backend_sched_new ggml_backend_sched_get_n_backends ggml_backend_sched_get_backend ggml_backend_sched_reserve
ggml_backend_sched_alloc_graph ggml_backend_sched_set_tensor_backend ggml_backend_sched_get_tensor_backend
ggml_backend_sched_graph_compute ggml_backend_sched_graph_compute_async ggml_backend_sched_synchronize
ggml_backend_sched_reset ggml_backend_sched_free ggml_init ggml_new_tensor_1d ggml_new_tensor_2d ggml_new_tensor_3d
ggml_new_tensor_4d ggml_mul_mat ggml_add ggml_relu ggml_sum ggml_build_forward_expand ggml_set_f32 ggml_get_f32
ggml_tensor_shape ggml_free GGML_TYPE_F32 GGML_TYPE_F16 GGML_TYPE_I32 GGML_TYPE_Q4_K
ggml_backend_sched_get_n_splits ggml_backend_sched_get_n_copies
""".split()  # noqa: SIM905

F32 = flat.GGML_TYPE_F32


def test_star_import_gives_every_name_of_the_guide():
    assert set(GUIDE) <= set(flat.__all__)
    assert all(name in globals() for name in flat.__all__)
    assert len(set(flat.__all__)) == len(flat.__all__)


def test_every_builder_is_there_or_left_out_with_a_reason():
    made = {f.name for f in operations.builders(headers.read())}
    assert set(generator.LEFT_OUT) | generator.BY_HAND <= made
    assert made - set(generator.LEFT_OUT) == made & set(flat.__all__)
    assert not set(generator.LEFT_OUT) & set(flat.__all__)
    assert set(generator.CALLS) <= made


def test_no_entry_of_the_table_is_what_would_be_generated_anyway():
    for f in generator.generated(headers.read()):
        names = ", ".join(name for name, _ in f.params[1:])
        assert generator.CALLS.get(f.name) != (f"{f.name.removeprefix('ggml_')}({names}",)


# ---------------------------------------------------------------------- builders, against what the operations call

NAMES = {getattr(c, name): name for name in c._LIBRARY if name in flat.__all__}
BY_OP = {}
for one in cases.CASES:
    BY_OP.setdefault(one.op, []).append(one)


class Recorder:
    """The builders that are called in C, with their arguments."""

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


def given(arg, ctx, four):
    """An argument of C as the flat function takes it."""
    if not isinstance(arg, c.ffi.CData):
        return arg
    if arg == c.NULL:
        return None
    if is_tensor(arg):
        return ggml.Tensor(ctx, arg, 4 if four else c.ggml_n_dims(arg))
    return tuple(arg)


def comparable(arg):
    """An argument of C by its value."""
    if is_tensor(arg):  # some are there for their sizes only, and made for each call
        return tuple(arg.ne) if arg.op == 0 and not arg.nb[0] else int(c.ffi.cast("uintptr_t", arg))
    return tuple(arg) if isinstance(arg, c.ffi.CData) and arg != c.NULL else arg


CUSTOM = {name for name in BY_OP if "custom" in name}


@pytest.mark.parametrize("op", sorted(set(BY_OP) - CUSTOM))
def test_builder_calls_what_the_operation_calls(op, monkeypatch, rng):
    """The arguments that an operation gives to C, given to the flat function of that name, come out as they were."""
    recorder = Recorder(monkeypatch)
    for i, case in enumerate(BY_OP[op]):
        with ggml.Context() as ctx:
            result, inputs = case.build(ctx)
            name, args = recorder.calls[-1]
            if name is None or name in generator.BY_HAND:
                assert op.startswith(("rope", "opt_step")) or case.op == "linear", f"{op} calls no builder of ggml.h"
                continue
            for four in (False, True):
                again = getattr(flat, name)(ctx, *(given(arg, ctx, four) for arg in args))
                calls = recorder.calls[-1]
                assert (calls[0], [*map(comparable, calls[1])]) == (name, [*map(comparable, args)])
                assert again.ne == result.ne
            special = {"prec", "sinks"} & {k for k, v in case.arguments.items() if v is not None}
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


def fields(t):
    p = t.ptr
    sources = [int(c.ffi.cast("uintptr_t", s)) for s in p.src]
    return p.op, p.type, [*p.ne], [*p.nb], [*p.op_params], sources, p.view_offs, p.view_src


# Builders behind which the checked operations call a wider one: beside C's own.
SAME = {
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


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("axes", [3, 4])
def test_builder_makes_what_c_makes(name, axes):
    with ggml.Context() as ctx:
        a = flat.ggml_new_tensor_4d(ctx, F32, 4, 3, 2, 1) if axes == 4 else flat.ggml_new_tensor_3d(ctx, F32, 4, 3, 2)
        b = flat.ggml_new_tensor_2d(ctx, F32, 6, 4)
        args = SAME[name](a, b)
        ours = getattr(flat, name)(ctx, *args)
        theirs = ctx.build(getattr(c, name), 4, *(x.ptr if isinstance(x, ggml.Tensor) else x for x in args), n=2)
        assert fields(ours) == fields(theirs)


def test_builder_makes_what_the_operation_makes():
    """Those whose operation calls C in a roundabout way."""
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
            assert theirs is None or fields(ours) == fields(theirs)
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
def test_rope_makes_what_c_makes(name, args):
    with ggml.Context() as ctx:
        a, rows = flat.ggml_new_tensor_3d(ctx, F32, 4, 3, 2), flat.ggml_new_tensor_1d(ctx, flat.GGML_TYPE_I32, 2)
        ours = getattr(flat, name)(ctx, a, rows, *args)
        theirs = ctx.build(getattr(c, name), 3, a.ptr, rows.ptr, *(c.NULL if x is None else x for x in args), n=2)
        assert fields(ours) == fields(theirs)


def evaluate(*outputs):
    """Flat arrays of tensors, computed on the CPU."""
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
        ("no permutation of the axes 0 to 3", lambda ctx, a: flat.ggml_permute(ctx, a, 0, 1, 1, 3)),
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
        ("is not of integers", lambda ctx, a: flat.ggml_get_i32(a)),
        ("n_threads must be 1 to 512", lambda ctx, a: flat.ggml_backend_cpu_set_n_threads(CPU(), 0)),
        ("at least one backend", lambda ctx, a: flat.ggml_backend_sched_new([])),
    ],
)  # fmt: skip
def test_wrong_values(message, call):
    with ggml.Context() as ctx, pytest.raises(ValueError, match=re.escape(message)):
        call(ctx, flat.ggml_new_tensor_2d(ctx, F32, 4, 3))


CPU = flat.ggml_backend_cpu_init


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
def test_wrong_types(call):
    with pytest.raises((TypeError, ValueError)):
        call()


# ---------------------------------------------------------------------- the guide's functions


def test_sizes_are_in_the_order_of_c():
    ctx = flat.ggml_init(16 * 1024 * 1024)
    t = flat.ggml_new_tensor_3d(ctx, F32, 5, 3, 2)
    assert flat.ggml_tensor_shape(t) == (5, 3, 2, 1)
    assert t.shape == (2, 3, 5)
    assert flat.ggml_n_dims(t) == 3
    assert flat.ggml_nelements(t) == 30
    assert flat.ggml_nbytes(t) == 120
    assert flat.ggml_tensor_shape(flat.ggml_new_tensor(ctx, F32, 2, [7, 6])) == (7, 6, 1, 1)
    assert flat.ggml_get_name(flat.ggml_set_name(t, "weights")) == "weights"
    flat.ggml_free(ctx)


def test_vulkan_devices_are_counted_from_0(two_gpus):
    assert flat.ggml_vulkan_available() is True
    n = flat.ggml_vulkan_device_count()
    assert n >= 2
    assert flat.ggml_vulkan_device_description(n - 1)
    free, total = memory = flat.ggml_vulkan_device_memory(0)
    assert 0 < free == memory.free <= total == memory.total
    assert flat.ggml_backend_name(flat.ggml_vulkan_init(1)) == "Vulkan1"
    for i in (-1, n, 2**70):
        with pytest.raises(IndexError, match=f"this machine has {n}, counted from 0"):
            flat.ggml_vulkan_init(i)


def test_status_lists_the_devices(two_gpus, capsys):
    flat.ggml_vulkan_status()
    assert capsys.readouterr().out.startswith("Vulkan0: ")


def test_without_a_gpu():
    code = """
        from ggml_cffi.flat import *
        assert ggml_vulkan_device_count() == 0
        ggml_vulkan_status()
        try: ggml_vulkan_init(0)
        except IndexError as error: print(error)
    """
    out = run_python(re.sub(r"^ {8}", "", code, flags=re.M), GGML_VK_VISIBLE_DEVICES="99").stdout
    assert out == "no Vulkan device\nthere is no Vulkan device 0: this machine has 0, counted from 0\n"


def backends(devices):
    return [flat.ggml_vulkan_init(int(d.removeprefix("Vulkan"))) if d != "CPU" else CPU() for d in devices]


class Guide:
    """``sum(relu(w2 @ relu(w1 @ x)))``: a graph to put on several devices."""

    def __init__(self, rng):
        self.ctx = flat.ggml_init(16 * 1024 * 1024)
        self.w1 = flat.ggml_new_tensor_2d(self.ctx, F32, 16, 24)
        self.w2 = flat.ggml_new_tensor_2d(self.ctx, F32, 24, 8)
        self.x = flat.ggml_new_tensor_2d(self.ctx, F32, 16, 4)
        self.h = flat.ggml_relu(self.ctx, flat.ggml_mul_mat(self.ctx, self.w1, self.x))
        self.y = flat.ggml_relu(self.ctx, flat.ggml_mul_mat(self.ctx, self.w2, self.h))
        self.values = [rng.standard_normal(t.shape).astype(np.float32) for t in (self.w1, self.w2, self.x)]
        self.graph = flat.ggml_build_forward_expand(self.ctx, self.y)

    def set(self):
        for t, values in zip((self.w1, self.w2, self.x), self.values, strict=True):
            flat.ggml_set_f32(t, values.reshape(-1))

    def set_x(self, rng):
        self.values[2] = rng.standard_normal(self.x.shape).astype(np.float32)
        flat.ggml_set_f32(self.x, self.values[2])

    def check(self):
        w1, w2, x = (v.astype(np.float64) for v in self.values)
        want = np.maximum(np.maximum(x @ w1.T, 0) @ w2.T, 0)
        np.testing.assert_allclose(flat.ggml_get_f32(self.y), want.reshape(-1), rtol=1e-2, atol=1e-2)


def spread(guide, sched):
    """The two products on the first and the second backend."""
    for i, tensors in enumerate(((guide.w1, guide.h.ptr.src[0]), (guide.w2, guide.y.ptr.src[0]))):
        for t in tensors:
            t = t if isinstance(t, ggml.Tensor) else ggml.Tensor(guide.ctx, t, 2)
            backend = flat.ggml_backend_sched_get_backend(sched, min(i, len(sched.backends) - 1))
            flat.ggml_backend_sched_set_tensor_backend(sched, t, backend)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("when", ["first", "after reserve", "after alloc"])
def test_values_may_be_set_at_any_point(devices, rng, when, parallel):
    guide = Guide(rng)
    sched = flat.ggml_backend_sched_new(backends(devices), parallel)
    if when == "first":
        guide.set()
        np.testing.assert_array_equal(flat.ggml_get_f32(guide.w1), guide.values[0].reshape(-1))
    spread(guide, sched)
    assert flat.ggml_backend_sched_reserve(sched, guide.graph)
    if when == "after reserve":
        guide.set()
    assert flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    if when == "after alloc":
        guide.set()
    for _ in range(2):
        assert flat.ggml_backend_sched_graph_compute(sched, guide.graph) == flat.GGML_STATUS_SUCCESS == 0
        guide.check()
    guide.set_x(rng)
    flat.ggml_backend_sched_graph_compute_async(sched, guide.graph)
    guide.check()  # waits
    flat.ggml_backend_sched_synchronize(sched)
    used = {b.name for _, b in sched.assignment()}
    assert used == (set(devices) if len(devices) > 1 else {devices[0], "CPU"})
    flat.ggml_backend_sched_reset(sched)
    guide.set_x(rng)
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)  # allocates again, placed as before
    guide.check()
    assert flat.ggml_backend_sched_get_n_splits(sched) >= len(used) - 1
    assert flat.ggml_backend_sched_get_n_copies(sched) in (1, 4)


def test_inputs_move_to_where_they_are_placed_after_a_reservation(two_gpus, rng):
    guide = Guide(rng)
    sched = flat.ggml_backend_sched_new(backends(two_gpus))
    guide.set()
    flat.ggml_backend_sched_reserve(sched, guide.graph)
    assert guide.w2.buffer_type.name == "Vulkan0"
    spread(guide, sched)
    flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    assert [t.buffer_type.name for t in (guide.w1, guide.w2, guide.x)] == ["Vulkan0", "Vulkan1", "Vulkan0"]
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    guide.check()
    for t in (guide.w1, guide.w2, guide.x):  # back, all of them: the other buffers are given up
        flat.ggml_backend_sched_set_tensor_backend(sched, t, flat.ggml_backend_sched_get_backend(sched, 1))
    flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    guide.check()
    assert {t.buffer_type.name for t in guide.ctx.tensors() if t.is_leaf} == {"Vulkan1"}
    assert len(guide.ctx.buffers) == 2


def test_a_second_scheduler_on_another_device_moves_the_inputs(two_gpus, rng):
    guide = Guide(rng)
    guide.set()
    for device in (*two_gpus, "CPU"):
        sched = flat.ggml_backend_sched_new(backends([device]))
        flat.ggml_backend_sched_graph_compute(sched, guide.graph)
        guide.check()
        flat.ggml_backend_sched_free(sched)


def test_an_input_that_another_scheduler_reads_stays(two_gpus, rng):
    guide = Guide(rng)
    first, second = (flat.ggml_backend_sched_new(backends([d])) for d in two_gpus)
    guide.set()
    flat.ggml_backend_sched_graph_compute(first, guide.graph)
    other = flat.ggml_build_forward_expand(guide.ctx, flat.ggml_neg(guide.ctx, guide.x))
    with pytest.raises(ValueError, match="none of Vulkan1, CPU can read"):
        flat.ggml_backend_sched_graph_compute(second, other)
    flat.ggml_backend_sched_graph_compute(first, guide.graph)
    guide.check()


def test_nodes_run_where_weights_are(two_gpus, rng):
    guide, (gpu0, gpu1) = Guide(rng), backends(two_gpus)
    ctx = flat.ggml_init()
    w3 = flat.ggml_new_tensor_2d(ctx, F32, 8, 8)
    buffers = flat.ggml_backend_alloc_ctx_tensors(ctx, gpu1)
    flat.ggml_backend_buffer_set_usage(buffers, flat.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
    with pytest.raises(ValueError, match="usage must be ANY or WEIGHTS"):
        flat.ggml_backend_buffer_set_usage(buffers, flat.GGML_BACKEND_BUFFER_USAGE_COMPUTE)
    flat.ggml_set_f32(w3, np.eye(8))
    guide.set()
    result = flat.ggml_mul_mat(guide.ctx, w3, guide.y)
    graph = flat.ggml_build_forward_expand(guide.ctx, result)
    sched = flat.ggml_backend_sched_new([gpu0, gpu1])
    flat.ggml_backend_sched_graph_compute(sched, graph)
    assert flat.ggml_backend_sched_get_tensor_backend(sched, result) is gpu1
    guide.y = result
    guide.check()
    flat.ggml_backend_buffer_free(buffers)
    with pytest.raises(ggml.ClosedError):
        flat.ggml_backend_sched_alloc_graph(sched, graph)


def test_placement_is_told_before_and_after_allocation(rng):
    guide = Guide(rng)
    sched = flat.ggml_backend_sched_new([CPU()])
    cpu = flat.ggml_backend_sched_get_backend(sched, 0)
    assert flat.ggml_backend_sched_get_n_backends(sched) == 1
    assert flat.ggml_backend_sched_get_tensor_backend(sched, guide.h) is None
    flat.ggml_backend_sched_set_tensor_backend(sched, guide.h, cpu)
    assert flat.ggml_backend_sched_get_tensor_backend(sched, guide.h) is cpu
    assert flat.ggml_backend_sched_get_n_splits(sched) == 0
    flat.ggml_backend_sched_alloc_graph(sched, guide.graph)
    assert flat.ggml_backend_sched_get_tensor_backend(sched, guide.y) is cpu
    assert flat.ggml_backend_sched_get_buffer_size(sched, cpu) > 0
    with pytest.raises(ValueError, match="is not one of"):
        flat.ggml_backend_sched_get_buffer_size(sched, CPU())
    with pytest.raises(IndexError, match="has 1 backends"):
        flat.ggml_backend_sched_get_backend(sched, 1)


def test_objects_of_the_other_ways_are_taken(rng):
    with ggml.Context() as ctx, ggml.Scheduler(["CPU"]) as sched:
        a = flat.ggml_new_tensor_1d(ctx, F32, 3)
        flat.ggml_set_f32(a, [1, 2, 3])
        out = flat.ggml_neg(ctx, a)
        with ggml.Graph(out) as graph:
            assert flat.ggml_backend_sched_get_tensor_backend(sched, out) is None
            flat.ggml_backend_sched_graph_compute_async(sched, graph)
            flat.ggml_backend_sched_synchronize(sched)
            assert flat.ggml_backend_sched_get_tensor_backend(sched, out) is sched.backends[0]
            assert [*flat.ggml_get_f32(out)] == [-1, -2, -3]


def test_threads():
    cpu = CPU()
    flat.ggml_backend_cpu_set_n_threads(cpu, 3)
    assert cpu.n_threads == 3
    flat.ggml_backend_free(cpu)


def test_a_second_graph_is_refused_where_c_would_compute_the_first(rng):
    guide = Guide(rng)
    guide.set()
    sched = flat.ggml_backend_sched_new([CPU()])
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    other = flat.ggml_build_forward_expand(guide.ctx, flat.ggml_neg(guide.ctx, guide.x))
    with pytest.raises(ValueError, match="the scheduler holds"):
        flat.ggml_backend_sched_graph_compute(sched, other)
    flat.ggml_backend_sched_reset(sched)
    flat.ggml_backend_sched_graph_compute(sched, other)
    np.testing.assert_array_equal(flat.ggml_get_f32(other.outputs[0]), -guide.values[2].reshape(-1))


def test_graphs_as_in_c():
    ctx = flat.ggml_init()
    a = flat.ggml_new_tensor_1d(ctx, F32, 3)
    flat.ggml_set_input(a)
    flat.ggml_set_f32(a, 2)  # one value for all
    graph = flat.ggml_new_graph(ctx)
    double, square = flat.ggml_scale(ctx, a, 2.0), flat.ggml_sqr(ctx, a)
    flat.ggml_build_forward_expand(graph, double)
    flat.ggml_build_forward_expand(graph, square)
    assert flat.ggml_graph_n_nodes(graph) == 2
    sched = flat.ggml_backend_sched_new([CPU()])
    for _ in range(2):
        flat.ggml_backend_sched_graph_compute(sched, graph)
        assert [*flat.ggml_get_f32(double)] == [*flat.ggml_get_f32(square)] == [4, 4, 4]


def test_temporaries_are_not_read_unless_they_are_outputs(rng):
    guide = Guide(rng)
    guide.set()
    sched = flat.ggml_backend_sched_new([CPU()])
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    with pytest.raises(ValueError, match="is a temporary"):
        flat.ggml_get_f32(guide.h)
    with pytest.raises(ValueError, match="is allocated already"):
        flat.ggml_set_output(guide.h)
    flat.ggml_backend_sched_reset(sched)
    flat.ggml_set_output(guide.h)
    flat.ggml_backend_sched_graph_compute(sched, guide.graph)
    want = np.maximum(guide.values[2] @ guide.values[0].T, 0)
    np.testing.assert_allclose(flat.ggml_get_f32(guide.h), want.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "I32"])
def test_values_before_memory_are_those_after(dtype, rng):
    ctx = flat.ggml_init()
    a = flat.ggml_new_tensor_2d(ctx, getattr(flat, f"GGML_TYPE_{dtype}"), 32, 2)
    values = rng.integers(-9, 9, (2, 32)) if dtype == "I32" else rng.standard_normal((2, 32))
    flat.ggml_set_f32(a, values)
    before = flat.ggml_get_f32(a)
    assert before.shape == (64,)
    assert before.dtype == np.float32
    np.testing.assert_allclose(before, values.reshape(-1), rtol=1e-2, atol=2e-2)
    flat.ggml_set_f32(flat.ggml_view_1d(ctx, a, 32, a.nb[1]), values[0])  # part of it
    ctx.alloc("CPU")
    np.testing.assert_array_equal(flat.ggml_get_f32(a), np.tile(before[:32], 2))
    np.testing.assert_array_equal(flat.ggml_get_f32(flat.ggml_view_1d(ctx, a, 32, a.nb[1])), before[:32])


def test_integers():
    ctx = flat.ggml_init()
    a = flat.ggml_new_tensor_1d(ctx, flat.GGML_TYPE_I32, 3)
    flat.ggml_set_i32(a, [1, 2, 2**24 + 1])
    assert [*flat.ggml_get_i32(a)] == [1, 2, 2**24 + 1]
    assert [*flat.ggml_get_i32(flat.ggml_new_i32(ctx, 7))] == [7]


def test_row_numbers_are_checked_before_and_after_memory():
    ctx = flat.ggml_init()
    table, rows = flat.ggml_new_tensor_2d(ctx, F32, 4, 3), flat.ggml_new_tensor_1d(ctx, flat.GGML_TYPE_I32, 2)
    flat.ggml_set_i32(rows, [0, 3])
    out = flat.ggml_get_rows(ctx, table, rows)
    sched = flat.ggml_backend_sched_new([CPU()])
    graph = flat.ggml_build_forward_expand(ctx, out)
    with pytest.raises(ValueError, match="row numbers of a tensor with 3 rows"):
        flat.ggml_backend_sched_graph_compute(sched, graph)
    with pytest.raises(ValueError, match="row numbers of a tensor with 3 rows"):
        flat.ggml_set_i32(rows, [0, -1])
    flat.ggml_set_i32(rows, [0, 2])
    flat.ggml_set_f32(table, np.arange(12))
    flat.ggml_backend_sched_graph_compute(sched, graph)
    assert [*flat.ggml_get_f32(out)] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_values_outlive_an_allocation_that_fails():
    with ggml.Context() as ctx:
        small, huge = ctx.constant([1, 2]), ctx.new_tensor(F32, (2**50,))
        with pytest.raises(ggml.OutOfMemoryError):
            ctx.alloc("CPU")
        ctx.alloc("CPU", [small])
        assert [*small.numpy()] == [1, 2]
        assert not huge.is_allocated


# ---------------------------------------------------------------------- freeing

SETUP = """
import gc, itertools, sys
from ggml_cffi.flat import *
from ggml_cffi.core.handle import live
def run(devices):
    gpus = [ggml_vulkan_init(i) for i in range(devices)]
    cpu = ggml_backend_cpu_init()
    sched = ggml_backend_sched_new([*gpus, cpu])
    ctx = ggml_init(1024)
    a = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8)
    ggml_set_f32(a, range(8))
    b = ggml_scale(ctx, a, 2.0)
    graph = ggml_build_forward_expand(ctx, ggml_sum(ctx, b))
    return gpus, cpu, sched, ctx, graph, b
def compute(made):
    ggml_backend_sched_graph_compute_async(made[2], made[4])
"""


def quietly(code):
    done = run_python(SETUP + code)
    assert done.stderr == ""
    return done.stdout


def test_objects_may_be_freed_in_any_order_and_twice():
    code = """
for order in itertools.permutations(range(4)):
    made = gpus, cpu, sched, ctx, graph, b = run(1)
    compute(made)
    free = [lambda: [ggml_vulkan_free(g) for g in gpus], lambda: ggml_backend_free(cpu),
            lambda: ggml_backend_sched_free(sched), lambda: ggml_free(ctx)]
    for i in (*order, *order): free[i]()
    assert not live(), (order, live())
    for use in (lambda: ggml_get_f32(b), lambda: ggml_backend_sched_graph_compute(sched, graph),
                lambda: ggml_backend_sched_reserve(sched, graph), lambda: ggml_neg(ctx, b)):
        try: use()
        except Exception as error: assert "closed" in str(error), error
        else: raise AssertionError(use)
ggml_free(None), ggml_backend_free(None), ggml_backend_sched_free(None)
print("done")
"""
    need_one = "import sys\nif not ggml_vulkan_device_count(): print('done'); sys.exit()\n"
    assert quietly(need_one + code) == "done\n"


def test_what_is_forgotten_is_freed_without_a_word():
    assert (
        quietly("""
for _ in range(2):
    made = run(0)
    compute(made)
    del made
    gc.collect()
    assert not live(), live()
kept = run(0)
compute(kept)
""")
        == ""
    )


def test_a_failed_init_leaves_nothing():
    assert (
        quietly("""
for call in (lambda: ggml_backend_sched_new([]), lambda: ggml_backend_sched_new(["nothing"]),
             lambda: ggml_build_forward_expand(ggml_init(1), ggml_new_tensor_1d(ggml_init(1), GGML_TYPE_F32, 1))):
    try: call()
    except ValueError: pass
gc.collect()
assert not live(), live()
""")
        == ""
    )


def test_the_docstring_runs():
    import doctest

    failed, tried = doctest.testmod(flat)
    assert tried >= 8
    assert not failed


def test_the_generated_file_says_so():
    text = (ROOT / "ggml_cffi" / "_flat_ops.py").read_text()
    assert text.startswith("# Generated by `python -m codegen`")
