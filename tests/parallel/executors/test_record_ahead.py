"""Work that ggml's Vulkan backend records, and submits on request.

These tests depend on internals of the backend. They fail if another version of ggml changes these.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Timer

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c, ops, parallel
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.parallel.executors import polling, record_ahead
from ggml_cffi.parallel.program import ParallelProgram
from ggml_cffi.parallel.rank import Rank
from tests.support import relative_error, run_python
from tests.support.ranks import DIM, chain, expected

pytestmark = pytest.mark.usefixtures("vulkan")


@pytest.fixture
def gpu(two_gpus):
    return two_gpus[0]


@pytest.fixture
def weight(rng):
    return (rng.standard_normal((DIM, DIM)) / 8).astype(np.float32)


@pytest.mark.parametrize("n", [1, 8, 20, 21, 22, 33, 34, 80])
def test_recorded_work_waits_until_it_is_submitted(gpu, weight, n, rng):
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel([gpu]) as group:
        function = chain(group.weight(weight), n)
        with ParallelProgram(group, [Rank(0, 1)], function, [(x.shape, ggml.Type.F32)], ahead=True) as program:
            executor, ((step,),) = group.executor, program.steps
            assert step.deferred
            assert bool(step.immediate) == (1 + 3 * n > record_ahead.FIRST_PART)  # with the copy of the inputs
            program.record()  # does nothing before the first run
            for k in (1.0, 2.0, 3.0):
                program.input_arrays[0][...] = x
                program.output_arrays[0][0][...] = k
                if k == 1.0:
                    program.compute()
                else:
                    program.input_arrays[0][...] = 0
                    program.record()
                    time.sleep(0.02)
                    assert (program.output_arrays[0][0] == k).all()
                    program.input_arrays[0][...] = x  # the input for this run
                    if k == 2.0:
                        program.compute()
                    else:
                        program.submit_and_poll(lambda: None)
                        executor.finish()
                assert relative_error(program.result(), expected(x, weight, n)) < 1e-2
            assert executor.steps_computed == [3]


def test_recorded_work_that_is_given_up(gpu, weight, rng):
    """A wait for the device computes it, and the next run records its own work."""
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel([gpu]) as group:
        function = chain(group.weight(weight), 3)
        with ParallelProgram(group, [Rank(0, 1)], function, [(x.shape, ggml.Type.F32)], ahead=True) as program:
            program.input_arrays[0][...] = 0
            program.compute()
            program.record()
            group.executor.finish()
            program.input_arrays[0][...] = x
            program.compute()
            assert relative_error(program.result(), expected(x, weight, 3)) < 1e-2


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(10)


def test_a_thread_holds_the_device_while_work_is_recorded(gpu, weight, rng):
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel([gpu]) as group:
        function = chain(group.weight(weight), 3)
        with ParallelProgram(group, [Rank(0, 1)], function, [(x.shape, ggml.Type.F32)], ahead=True) as program:
            executor, lock = group.executor, group.backends[0].lock

            def is_free():
                return in_a_thread(lambda: lock.acquire(blocking=False) and (lock.release() or True))

            program.input_arrays[0][...] = x
            for _ in range(2):
                program.compute()
                program.record()
                assert not is_free()
                in_a_thread(lambda: executor.finish(if_free=True))  # the device is not free
                assert not is_free()
                program.compute()
                assert is_free()
                program.record()
                executor.finish()
                assert is_free()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(lock.acquire).result()
                program.record()  # does nothing: another thread uses the device
                pool.submit(lock.release).result()
            assert is_free()
            program.compute()
            assert relative_error(program.result(), expected(x, weight, 3)) < 1e-2


def test_a_long_graph_is_divided_before_products(gpu, weight):
    """The first part is deferred, and each other part is submitted in one piece."""
    with parallel.TensorParallel([gpu]) as group:
        function = chain(group.weight(weight), 100)
        with ParallelProgram(group, [Rank(0, 1)], function, [((1, DIM), ggml.Type.F32)], ahead=True) as program:
            ((step,),) = program.steps
            *deferred, empty = step.deferred[::-1]
            assert step.immediate[::2] == (empty,) * (len(step.immediate) // 2)
            parts = [
                [c.ggml_graph_node(graph, i).op for i in range(c.ggml_graph_n_nodes(graph))]
                for graph in (*deferred, *step.immediate[1::2])
            ]
            counts = [
                sum(op in (ggml.Op.MUL_MAT, ggml.Op.UNARY, ggml.Op.RMS_NORM, ggml.Op.CPY) for op in part)
                for part in parts
            ]
            assert sum(counts) == 301
            assert all(most - 3 < n <= most for n, most in zip(counts[:-1], (64, 100, 100), strict=True))
            assert [part[0] for part in parts[1:]] == 3 * [ggml.Op.MUL_MAT]
            assert parts[0][-1] == ggml.Op.SUM  # the node without memory


@pytest.mark.parametrize("n", [2, 60])
def test_long_steps_of_several_devices_are_not_deferred(two_gpus, weight, n, rng):
    """Steps with more operations than ggml records at a time are not deferred, and their sums are not polled."""
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        function = chain(group.weight(weight), n)
        f = group.compile(lambda rank, x: function(rank, rank.all_reduce(function(rank, x))))
        want = expected(2 * expected(x, weight, n), weight, n)
        for _ in range(20):
            assert relative_error(f(x), want) < 1e-2
        (program,) = f.programs
        assert {bool(step.deferred) for own in program.steps for step in own} == {n == 2}
        assert (program.polled_sums is None) == (n == 60)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_only_short_steps_are_deferred(two_gpus, weight, rows, rng):
    x = rng.standard_normal((rows, DIM)).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        function = chain(group.weight(weight), 2)
        f = group.compile(lambda rank, x: rank.all_reduce(function(rank, x)))
        for _ in range(3):
            assert relative_error(f(x), 2 * expected(x, weight, 2)) < 1e-2
        assert [bool(own[0].deferred) for own in f.programs[0].steps] == 2 * [rows < 17]


def test_late_sums_do_not_submit_the_next_step(two_gpus, weight, rng, monkeypatch):
    """The wait must not compute recorded steps: they would use sums of the previous run."""
    monkeypatch.setattr(polling, "TIMEOUT", 0.0)
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        function = chain(group.weight(weight), 20)

        def run(rank, x):
            for _ in range(4):
                x = rank.all_reduce(function(rank, x))
            return x

        f = group.compile(run)
        f(x)
        (program,) = f.programs
        program.polled_sums.timeout = 0.0
        want = x
        for _ in range(4):
            want = 2 * expected(want, weight, 20)
        for _ in range(5):
            assert relative_error(f(x), want) < 1e-2
        assert program.polled_sums.n_timeouts > 5


def test_an_interrupted_run_computes_with_complete_sums(two_gpus, weight, rng, monkeypatch):
    """The interruption computes recorded steps, but not from the mark of unwritten numbers, which is a NaN."""
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        function = chain(group.weight(weight), 20)
        f = group.compile(lambda rank, x: function(rank, rank.all_reduce(function(rank, x))))
        want = f(x)
        (program,) = f.programs
        monkeypatch.setattr(program.polled_sums, "wait", lambda k, _: (_ for _ in ()).throw(KeyboardInterrupt))
        for _ in range(10):
            program.output_arrays[0][0][...] = 0
            with pytest.raises(KeyboardInterrupt):
                f(x)
            assert relative_error(program.output_arrays[0][0], want) < 1e-5


def test_no_part_ends_after_a_norm(gpu, weight, rng):
    """ggml may clear the sum of squares that a norm reads with the next graph, without waiting."""
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel([gpu]) as group:
        w, scale = group.weight(weight), group.weight(np.ones(DIM, np.float32))

        def run(rank, x):
            for i in range(60):
                h = ops.mul(ops.rms_norm(x, 1e-5), scale[rank])
                x = ops.linear(h if i % 7 else ops.relu(h), w[rank])
            return x

        with ParallelProgram(group, [Rank(0, 1)], run, [(x.shape, ggml.Type.F32)], ahead=True) as program:
            ((step,),) = program.steps
            parts = [step.deferred[-1], *step.immediate[1::2]]
            ends = [[c.ggml_graph_node(g, i).op for i in range(c.ggml_graph_n_nodes(g))] for g in parts]
            assert len(parts) > 2
            for ops_of in ends[:-1]:
                computing = [op for op in ops_of if op not in (*VIEWS, ggml.Op.SUM)]
                assert computing[-1] == ggml.Op.UNARY


def test_a_run_after_an_interrupted_one(two_gpus, weight, rng, monkeypatch):
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        function = chain(group.weight(weight), 3)
        f = group.compile(lambda rank, x: rank.all_reduce(function(rank, rank.all_reduce(function(rank, x)))))
        want = 2 * expected(2 * expected(x, weight, 3), weight, 3)
        f(x)
        (program,) = f.programs

        def interrupt(k, _synchronize):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(program.polled_sums, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                f(x)
        assert relative_error(f(x), want) < 1e-2


def test_the_first_run_waits_after_each_graph(two_gpus, weight, monkeypatch):
    """ggml may submit recorded work if it needs more memory than for earlier graphs."""
    called = []
    with parallel.TensorParallel(two_gpus) as group:
        function = chain(group.weight(weight), 2)
        f = group.compile(lambda rank, x: rank.all_reduce(function(rank, x)))
        for name in ("run_first", "run"):
            real = getattr(group.executor, name)
            monkeypatch.setattr(group.executor, name, lambda *a, n=name, real=real: (called.append(n), real(*a))[1])
        for _ in range(3):
            f(np.ones((1, DIM)))
        f(np.ones((2, DIM)))
    assert called == ["run_first", "run", "run", "run_first"]


def test_the_empty_graph_computes_nothing(gpu):
    """The test runs it alone, before any other graph."""
    with ggml.Backend(gpu) as backend, ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (4,))
        ctx.alloc(backend.buffer_type)
        x.set(np.ones(4))
        assert c.ggml_backend_graph_compute(backend.ptr, record_ahead.empty_graph()) == 0
        assert c.ggml_graph_n_nodes(record_ahead.empty_graph()) == 1
        np.testing.assert_array_equal(x.numpy(), np.ones(4))


CODE = """
import json
import numpy as np
import ggml_cffi as ggml
from ggml_cffi import ops, parallel
gpus = [d.name for d in ggml.devices() if not d.is_cpu][:2]
x = np.arange(64, dtype=np.float32)[None]
with parallel.TensorParallel(gpus) as group:
    w = group.weight(2 * np.eye(64, dtype=np.float32))
    def run(rank, x):
        for _ in range(3):
            x = rank.all_reduce(ops.linear(ops.relu(ops.linear(x, w[rank])), w[rank]))
        return x
    f = group.compile(run)
    right = all((f(x) == 512 * x).all() for _ in range(20))
    program = f.programs[0]
    deferred = [bool(s.deferred) for own in program.steps for s in own]
    print(json.dumps([bool(right), any(deferred), all(deferred), program.polled_sums is not None]))
"""


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({}, [True, True, True, True]),
        ({"GGML_VK_MAX_NODES_PER_SUBMIT": "3"}, [True, True, False, False]),
        ({"GGML_VK_MAX_NODES_PER_SUBMIT": "4"}, [True, True, True, True]),
        ({"GGML_VK_PERF_LOGGER": "1"}, [True, False, False, False]),
        ({"GGML_VK_SERIALIZE_SUBMISSIONS": "1"}, [True, False, False, False]),
        ({"GGML_VK_DISABLE_ASYNC": "1"}, [True, False, False, False]),
        ({"GGML_VK_DISABLE_FUSION": "1"}, [True, True, True, True]),
    ],
)
@pytest.mark.usefixtures("two_gpus")
def test_settings_of_ggml_under_which_nothing_is_deferred(env, want):
    assert json.loads(run_python(CODE, **env).stdout.splitlines()[-1]) == want


def test_polling_beside_other_work(two_gpus, weight, rng):
    """Other backends of the same devices compute and transfer while steps are recorded."""
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    big = rng.standard_normal((64, 64)).astype(np.float32)
    stopped = False
    errors = []
    with parallel.TensorParallel(two_gpus) as group, ggml.Backend(two_gpus[0]) as other, ggml.Context() as ctx:
        t = ctx.new_tensor("f32", big.shape)
        ctx.alloc(other.buffer_type)

        def transfer():
            while not stopped:
                t.set(big)
                if not (t.numpy() == big).all():
                    errors.append("differs")

        function = chain(group.weight(weight), 3)
        f = group.compile(lambda rank, x: rank.all_reduce(function(rank, rank.all_reduce(function(rank, x)))))
        want = 2 * expected(2 * expected(x, weight, 3), weight, 3)
        f(x)
        timer = Timer(0, transfer)
        timer.start()
        try:
            for _ in range(100):
                assert relative_error(f(x), want) < 1e-2
        finally:
            stopped = True
            timer.join()
    assert not errors


def test_a_short_graph_ends_with_views(two_gpus, rng):
    """The backend polls during the last fifth of a graph: see ``_append_views``."""
    nodes = {}
    with parallel.TensorParallel(two_gpus[:1]) as group:

        def run(rank, x):
            for _ in range(12):
                x = ops.linear(ops.view(ops.relu(x), x.shape), w[rank])
            return x

        values = rng.standard_normal((DIM, DIM)).astype(np.float32) / 8
        w = group.weight(values)
        f = group.compile(run)
        for rows in (1, 17):
            x = want = rng.standard_normal((rows, DIM)).astype(np.float32)
            for _ in range(12):
                want = np.maximum(want.astype(np.float64), 0) @ values.T
            assert relative_error(f(x), want) < 1e-2
            (plan,) = f.programs[-1].step_graphs
            (step,) = plan.steps
            assert not step.deferred
            (graph,) = step.immediate
            nodes[rows] = len(plan.node_pointers()), ggml.c.ggml_graph_n_nodes(graph)
    (n, short), (m, long) = nodes[1], nodes[17]
    assert n == m == long
    assert (short - n) + 1 >= short // 5  # ggml's rule for the last node that computes
    assert short - n < n / 3
