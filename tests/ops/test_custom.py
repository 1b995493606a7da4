"""Operations written in Python: exceptions, tasks, and views that must not be kept."""

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import relative_error


@pytest.fixture
def ctx():
    with ggml.Context() as made:
        yield made


def run(y, devices, **values):
    with ggml.Scheduler(devices) as s, ggml.Graph(y) as g:
        s.alloc(g)
        for t, v in values.get("inputs", ()):
            t.set(v)
        s.compute(g)
        return y.numpy()


def test_the_result_may_have_any_shape(ctx, devices, rng):
    values = [rng.standard_normal((2, 3)), rng.standard_normal(5), np.arange(4)]
    tensors = [ctx.new_tensor(t, v.shape) for t, v in zip(("f32", "f16", "i32"), values, strict=True)]

    def outer(out, a, b, n):
        assert not a.flags.writeable
        out[...] = a.sum() * b[:, None] + n

    y = ggml.custom_4d(outer, tensors, (5, 4))
    got = run(ggml.scale(y, 2.0), devices, inputs=zip(tensors, values, strict=True))
    assert relative_error(got, 2 * (values[0].sum() * values[1][:, None] + values[2])) < 1e-3


@pytest.mark.parametrize("dtype", ["f32", "i32"])
def test_a_function_may_have_no_operands(ctx, devices, dtype):
    def count(out):
        out[...] = np.arange(out.size).reshape(out.shape)

    y = ggml.custom_4d(count, (), (2, 3), dtype, ctx=ctx)
    np.testing.assert_array_equal(run(y, devices), [[0, 1, 2], [3, 4, 5]])


def test_a_function_may_write_in_place(ctx, rng):
    values, more = rng.standard_normal((3, 4)), rng.standard_normal(4)
    x, b = ctx.new_tensor("f32", (3, 4)), ctx.new_tensor("f32", (4,))

    def increase(out, b):
        out += b

    y = ggml.custom_inplace(ggml.scale(x, 1.0), increase, [b])
    assert relative_error(run(y, ["CPU"], inputs=[(x, values), (b, more)]), values + more) < 1e-6


def test_an_exception_stops_the_run_and_is_raised(ctx, devices):
    x = ctx.new_tensor("f32", (4,))
    ran = []

    def fail(out, a):
        ran.append("fail")
        raise KeyError("mine")

    def never(out, a):
        ran.append("never")

    y = ggml.map_custom1(ggml.map_custom1(x, fail), never)
    with ggml.Scheduler(devices) as s, ggml.Graph(y) as g:
        s.alloc(g)
        for _ in range(2):
            with pytest.raises(KeyError, match="mine"):
                s.compute()
        assert ran == ["fail", "fail"]
        with pytest.raises(KeyError, match="mine"):
            s.compute_async()
        s.synchronize()
    with ggml.Graph(ggml.relu(x)) as g, ggml.Scheduler(devices) as s:
        s.compute(g)


def test_the_scheduler_works_after_an_exception(ctx):
    x = ctx.new_tensor("f32", (4,))
    wrong = [True]

    def sometimes(out, a):
        if wrong[0]:
            raise ValueError("not now")
        out[...] = a + 1

    y = ggml.map_custom1(x, sometimes)
    with ggml.Scheduler(["CPU"]) as s, ggml.Graph(y) as g:
        s.alloc(g)
        x.set([1, 2, 3, 4])
        with pytest.raises(ValueError, match="not now"):
            s.compute()
        wrong[0] = False
        s.compute()
        assert y.numpy().tolist() == [2, 3, 4, 5]


def test_a_function_is_called_once_per_task(ctx):
    """Count the calls; ggml itself calls a custom operation on every thread."""
    called = []
    x = ctx.new_tensor("f32", (4,))
    with ggml.Backend("CPU", n_threads=4) as cpu, ggml.Scheduler([cpu]) as s:
        cpu.follows_load = False
        for n, want in (
            (1, [()]),
            (2, [(0, 2), (1, 2)]),
            (8, [(i, 4) for i in range(4)]),
            (None, [(i, 4) for i in range(4)]),
        ):
            called.clear()
            with ggml.Graph(ggml.map_custom1(x, lambda out, a, *part: called.append(part), n_tasks=n)) as g:
                s.alloc(g)
                s.compute(g)
                assert sorted(called) == want


def test_a_function_must_not_keep_a_view(ctx):
    kept = []
    y = ggml.map_custom1(ctx.new_tensor("f32", (4,)), lambda out, a: kept.append(a[1:]))
    with pytest.raises(RuntimeError, match="map_custom1: the function kept a view of ggml's memory: keep a copy"):
        run(y, ["CPU"])
    kept.clear()
    y = ggml.map_custom1(ctx.new_tensor("f32", (4,)), lambda out, a: kept.append(a.copy()))
    run(y, ["CPU"])
    assert len(kept) == 1


def test_operands_are_read_only(ctx):
    def write(out, a):
        a[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        run(ggml.map_custom1(ctx.new_tensor("f32", (4,)), write), ["CPU"])


def test_wrong_arguments_are_refused(ctx):
    x, q = ctx.new_tensor("f32", (32,)), ctx.new_tensor("q4_0", (32,))
    for n in (0, -1, 513):
        with pytest.raises(ValueError, match="n_tasks must be 1 to 512, or None for all threads"):
            ggml.map_custom1(x, print, n_tasks=n)
    for wrong in (lambda: ggml.map_custom1(x, 3), lambda: ggml.map_custom2(x, x, None)):
        with pytest.raises(TypeError, match="a function is needed"):
            wrong()
    with pytest.raises(ValueError, match="map_custom2: numpy has no Q4_0: cast it to F32 first"):
        ggml.map_custom2(x, q, print)
    with pytest.raises(TypeError, match="numpy has no Q4_0: make the result F32"):
        ggml.custom_4d(print, [x], (32,), "q4_0")
    with pytest.raises(TypeError, match="without operands, ctx is required"):
        ggml.custom_4d(print, (), (2,))
    with pytest.raises(ValueError, match="at most 9 operands, not 10"):
        ggml.custom_4d(print, [x] * 10, (2,))
    with pytest.raises(ValueError, match="at most 8 operands, not 9"):
        ggml.custom_inplace(x, print, [x] * 9)
    with pytest.raises(TypeError, match="operands must be a sequence"):
        ggml.custom_4d(print, x, (2,))
    for wrong in (lambda i: ggml.map_custom1_inplace(i, print), lambda i: ggml.custom_inplace(i, print)):
        with pytest.raises(TypeError, match="integers, which may be checked row numbers"):
            wrong(ctx.new_tensor("i32", (3,)))
    with pytest.raises(TypeError, match="take tensors, not list"):
        ggml.map_custom1([1.0], print)


def test_abort_stops_a_run(ctx):
    cpu = ggml.Backend("CPU")
    steps = []

    def step(out, a):
        steps.append(1)
        if len(steps) == 3:
            cpu.abort()

    y = ctx.new_tensor("f32", (4,))
    for _ in range(10):
        y = ggml.map_custom1(y, step)
    with cpu, ggml.Scheduler([cpu]) as s, ggml.Graph(y) as g:
        cpu.abort()  # without effect, since nothing runs
        s.alloc(g)
        with pytest.raises(ggml.AbortedError, match="the run was stopped"):
            s.compute()
        assert len(steps) == 3
        s.compute()
        assert len(steps) == 13


def test_only_the_cpu_can_be_stopped(two_gpus):
    message = f"only the CPU can stop a run, not {two_gpus[0]}"
    with ggml.Backend(two_gpus[0]) as gpu, pytest.raises(ValueError, match=message):
        gpu.abort()
