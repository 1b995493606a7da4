"""The scheduler: assignment of nodes, memory, and cases in which plain ggml fails."""

import threading

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.scheduler.held_graph import HeldGraph
from tests.support import bound_of_products, relative_error
from tests.support.chain import Chain


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 32))


def test_nodes_run_where_their_weights_are(devices, x):
    with Chain(devices, depth=4) as chain, ggml.Scheduler(devices) as s:
        s.alloc(chain.graph)
        chain.x.set(x)
        s.compute()
        assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(devices, 1e-3)
        names = [backend.name for _, backend in s.assignment()]
        assert names == [devices[i * len(devices) // 4] for i in range(4)]
        assert s.n_splits == len(devices)
        assert [s.backend_of(t).name for t in chain.layers] == names
        assert s.n_copies == 1
        assert s.graph is chain.graph
        sizes = s.buffer_sizes()
        assert list(sizes) == list(s.backends)
        assert sizes[s.backends[0]] > 0


def test_inputs_keep_their_values(devices, x):
    """In plain ggml the first run overwrites its inputs, so the second computes with wrong values."""
    with Chain(devices) as chain, ggml.Scheduler(devices) as s:
        s.alloc(chain.graph)
        chain.x.set(x)
        for _ in range(3):
            s.compute(chain.graph)
            assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(devices, 1e-3)
            np.testing.assert_array_equal(chain.x.numpy(), x.astype(np.float32))


def test_a_graph_can_be_reserved_allocated_released_and_allocated_again(devices, x):
    """In plain ggml every round on two devices is wrong: operands still point to the copies of the last round."""
    with Chain(devices) as chain, ggml.Scheduler(devices) as s:
        for _ in range(3):
            sizes = s.reserve(chain.graph)
            assert sum(sizes.values()) > 0
            assert s.graph is None
            s.alloc(chain.graph)
            chain.x.set(x)
            s.compute()
            s.compute_async()
            s.synchronize()
            assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(devices, 1e-3)
            s.reset()
            with pytest.raises(ValueError, match="no memory"):
                chain.y.numpy()
            np.testing.assert_array_equal(chain.x.numpy(), x.astype(np.float32))


def test_plain_ggml_reuses_stale_operands(two_gpus, x):
    """Show, through the C API, the failure that the test above excludes."""
    with (
        Chain(two_gpus) as chain,
        ggml.Backend(two_gpus[0]) as a,
        ggml.Backend(two_gpus[1]) as b,
        ggml.Backend("CPU") as cpu,
    ):
        chain.work.alloc(two_gpus[0], [chain.x])
        chain.x.set(x)
        backends = c.ffi.new("ggml_backend_t[]", [a.ptr, b.ptr, cpu.ptr])
        s = c.ggml_backend_sched_new(backends, c.NULL, 3, 256, False, True)
        graph = chain.graph
        held = HeldGraph(graph, [])
        assert c.ggml_backend_sched_reserve(s, graph.ptr)
        rewritten = [p.src[1] for p in graph.node_pointers()]
        held.restore()
        assert rewritten != [p.src[1] for p in graph.node_pointers()]
        c.ggml_backend_sched_free(s)


def test_an_input_mark_moves_no_work_to_the_cpu(devices, x):
    """Plain ggml assigns a flagged input to the CPU, and with it a graph without weights."""
    with ggml.Context() as ctx, ggml.Scheduler(devices) as s:
        a, b = ctx.new_tensor("f32", (4, 32)), ctx.new_tensor("f32", (4, 32))
        y = ggml.mul_mat(a, b)
        with ggml.Graph(y) as graph:
            s.alloc(graph)
            assert s.backend_of(y).name == devices[0]
            a.set(x)
            b.set(x)
            s.compute()
            assert relative_error(y.numpy(), x @ x.T) < bound_of_products(devices, 1e-3)


def test_placement_is_kept(two_gpus, x):
    """In plain ggml a reservation, or a run without an allocation, removes the placement."""
    with Chain(two_gpus[:1]) as chain, ggml.Scheduler(two_gpus) as s:
        middle = chain.layers[1]
        s.place(middle, two_gpus[1].lower())
        for _ in range(2):
            s.reserve(chain.graph)
            s.compute(chain.graph)
            assert s.backend_of(middle).name == two_gpus[1]
            assert s.backend_of(chain.layers[0]).name == two_gpus[0]
            s.reset()
        s.place(middle, s.backends[-1])
        s.alloc(chain.graph)
        assert s.backend_of(middle).name == "CPU"
        chain.x.set(x)
        s.compute()
        assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(two_gpus, 1e-3)
        s.unplace(middle)
        s.alloc(chain.graph)
        assert s.backend_of(middle).name == two_gpus[0]
        s.place(middle, "CPU")
        s.unplace()
        s.alloc(chain.graph)
        assert s.backend_of(middle).name == two_gpus[0]


def test_placed_inputs_live_where_they_were_placed(two_gpus):
    with Chain(two_gpus) as chain, ggml.Scheduler(two_gpus) as s:
        s.place(chain.x, "CPU")
        s.alloc(chain.graph)
        assert chain.x.buffer_type == ggml.BufferType.of("CPU")


def test_impossible_placements_raise(two_gpus):
    with Chain(two_gpus) as chain, ggml.Scheduler(two_gpus[:1]) as s:
        with pytest.raises(ValueError, match=f"not one of this scheduler's: {two_gpus[0]}, CPU"):
            s.place(chain.y, two_gpus[1])
        w = chain.weights.tensors()[-1]
        with pytest.raises(ValueError, match=f"has memory in {two_gpus[1]}"):
            s.place(w, two_gpus[0])


def test_another_graph_is_refused(devices, x):
    """Plain ggml computes the held graph instead, and reports success."""
    with Chain(devices) as one, Chain(devices) as two, ggml.Scheduler(devices) as s:
        s.alloc(one.graph)
        with pytest.raises(ValueError, match=r"holds <Graph 3 nodes>, not <Graph 3 nodes>: call alloc\(\)"):
            s.compute(two.graph)
        s.alloc(two.graph)
        two.x.set(x)
        s.compute(two.graph)
        assert relative_error(two.y.numpy(), two.want(x)) < bound_of_products(devices, 1e-3)
        with pytest.raises(ValueError, match="no memory"):
            one.y.numpy()


def test_a_scheduler_without_a_graph_raises():
    with ggml.Scheduler(["CPU"]) as s:
        for use in (s.compute, s.assignment, lambda: s.n_splits):
            with pytest.raises(ValueError, match=r"holds no graph: call alloc\(graph\)"):
                use()
        assert s.buffer_sizes() == dict.fromkeys(s.backends, 0)
        s.reset()
        s.synchronize()


def test_backend_of_a_tensor_of_another_graph_raises(devices):
    with Chain(devices) as chain, ggml.Scheduler(devices) as s:
        s.alloc(chain.graph)
        with pytest.raises(ValueError, match="not part of the graph"):
            s.backend_of(ggml.relu(chain.y))


def test_out_of_memory_raises_and_leaves_the_scheduler_usable(devices, x):
    """Plain ggml crashes, and so does the next allocation of any graph."""
    with ggml.Context() as ctx, ggml.Scheduler(devices) as s, Chain(devices) as chain:
        a, b = ctx.new_tensor("f32", (2**23, 1)), ctx.new_tensor("f32", (2**23, 1))
        with ggml.Graph(ggml.sum_rows(ggml.mul_mat(a, b))) as graph:  # 256 TiB: more than a process can address
            for use in (s.alloc, s.reserve):
                with pytest.raises((ggml.OutOfMemoryError, ggml.UnsupportedOpError)):
                    use(graph)
        s.alloc(chain.graph)
        chain.x.set(x)
        s.compute()
        assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(devices, 1e-3)


def test_the_scheduler_grows_with_the_graph(devices):
    with ggml.Context() as ctx, ggml.Scheduler(devices, graph_size=4) as s:
        x = y = ctx.new_tensor("f32", (8,))
        for _ in range(300):
            y = ggml.scale(y, 1.01)
        with ggml.Graph(y) as graph:
            assert len(graph) == 300
            s.alloc(graph)
            x.set(np.ones(8))
            s.compute()
            assert relative_error(y.numpy(), np.full(8, 1.01**300)) < 1e-4


def test_a_graph_deeper_than_the_stack_can_be_built():
    """Plain ggml recurses along the operands, and overruns the stack."""
    with ggml.Context() as ctx:
        y = ctx.new_tensor("f32", (1,))
        for _ in range(150_000):
            y = ggml.relu(y)
        with ggml.Graph(y) as graph:
            assert len(graph) == 150_000


def test_intermediates_cannot_be_read(devices, x):
    """Plain ggml returns whatever values the memory of the intermediate holds after the run."""
    with Chain(devices[:1]) as chain, ggml.Scheduler(devices) as s:
        s.alloc(chain.graph)
        chain.x.set(x)
        s.compute()
        with pytest.raises(ValueError, match="intermediate of a graph: name it as an output"):
            chain.layers[0].numpy()
        s.reset()
        with ggml.Graph(chain.y, chain.layers[0]) as graph:
            s.alloc(graph)
            s.compute()
            assert relative_error(chain.layers[0].numpy(), x @ chain.values[0].T) < bound_of_products(devices, 1e-3)


def test_closing_a_held_graph_keeps_tensors_sound(devices, x):
    with Chain(devices) as chain, ggml.Scheduler(devices) as s:
        s.alloc(chain.graph)
        chain.graph.close()
        with pytest.raises(ggml.ClosedError):
            s.compute()
        with pytest.raises(ValueError, match=r"holds <Graph closed> with some of these tensors: call its reset"):
            ggml.Graph(chain.y)
        s.reset()
        with ggml.Graph(chain.y) as again:
            s.alloc(again)
            chain.x.set(x)
            s.compute()
            assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(devices, 1e-3)


@pytest.mark.parametrize(
    ("backends", "error", "message"),
    [
        ([], ValueError, "at least one backend"),
        ("CPU", TypeError, "put the one backend in a list"),
        (["CPU", "CPU"], ValueError, "the CPU comes last"),
        (["Vulkan99"], ValueError, "there is no device"),
    ],
)
def test_impossible_lists_of_backends_raise(backends, error, message):
    with pytest.raises(error, match=message):
        ggml.Scheduler(backends)


def test_closed_and_repeated_backends_raise(two_gpus):
    with ggml.Backend(two_gpus[0]) as gpu, pytest.raises(ValueError, match="listed twice"):
        ggml.Scheduler([gpu, gpu])
    with pytest.raises(ValueError, match="the CPU comes last"):
        ggml.Scheduler(["CPU", two_gpus[0]])
    with pytest.raises(ValueError, match="graph_size"):
        ggml.Scheduler(["CPU"], graph_size=0)


def test_sixteen_backends_are_the_most():
    from contextlib import ExitStack

    with ExitStack() as stack:
        cpus = [stack.enter_context(ggml.Backend("CPU", n_threads=1)) for _ in range(17)]
        with pytest.raises(ValueError, match="the CPU comes last"):
            ggml.Scheduler(cpus)


def test_a_node_that_no_backend_can_compute_raises(two_gpus, x):
    """The node has memory on a GPU that cannot compute it; plain ggml ends the process."""
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
        a = ctx.new_tensor("f32", (4, 32))
        y = ggml.norm(a)
        s.place(y, two_gpus[1])
        c.ggml_set_name(y.ptr, b"y")
        y.ptr.op = c.GGML_OP_WIN_PART  # an operation that GPUs do not have
        message = f"cannot be computed on {two_gpus[1]}"
        with ggml.Graph(y) as graph, pytest.raises(ggml.UnsupportedOpError, match=message):
            s.alloc(graph)


def test_a_tensor_larger_than_a_device_can_read_raises(two_gpus):
    """Some GPUs read 128 MiB of a tensor at most; plain ggml ends the process."""
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
        table = ctx.new_tensor("q8_0", (262144, 544))  # 144 MiB
        ctx.alloc(s.backends[0].buffer_type, [table])
        rows = ctx.new_tensor("i32", (1,))
        y = ggml.get_rows(table, rows)
        reads = c.ggml_backend_dev_supports_op(s.backends[0].device.ptr, y.ptr)
        with ggml.Graph(y) as graph:
            if reads:
                s.alloc(graph)
            else:
                with pytest.raises(ggml.UnsupportedOpError, match="is larger than what its device can read"):
                    s.alloc(graph)


def test_an_in_place_node_away_from_its_memory_raises(two_gpus, x):
    """In plain ggml the CPU writes to the GPU's memory, and the process crashes."""
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
        a = ctx.new_tensor("f32", (4, 32))
        doubled = ggml.scale(a, 2)
        y = ggml.relu_inplace(doubled)
        with ggml.Graph(y) as graph:
            s.place(doubled, two_gpus[0])
            s.place(y, "CPU")
            message = f"writes to {two_gpus[0]} but runs on CPU: place both"
            with pytest.raises(ggml.UnsupportedOpError, match=message):
                s.alloc(graph)
            s.unplace()
            s.alloc(graph)
            a.set(x)
            s.compute()
            assert relative_error(y.numpy(), np.maximum(2 * x, 0)) < 1e-5


def test_parallel_keeps_four_copies(two_gpus):
    with Chain(two_gpus) as chain, ggml.Scheduler(two_gpus, parallel=True) as s:
        assert s.n_copies == 4
        s.alloc(chain.graph)
        s.compute()


def test_threads_share_a_backend(devices, x):
    """Schedulers in several threads on the same backends, and one scheduler from several threads."""
    with ggml.Backend(devices[0]) as backend, ggml.Scheduler([backend]) as one, ggml.Scheduler([backend]) as two:
        failures = []

        def work(scheduler, chain):
            try:
                for _ in range(20):
                    with scheduler.lock:
                        scheduler.compute(chain.graph)
                        got = chain.y.numpy()
                    assert relative_error(got, chain.want(x)) < bound_of_products(devices, 1e-3)
            except BaseException as error:
                failures.append(error)

        with Chain(devices[:1]) as a, Chain(devices[:1]) as b:
            jobs = []
            for scheduler, chain in ((one, a), (two, b), (two, b)):
                if scheduler.graph is None:
                    scheduler.alloc(chain.graph)
                    chain.x.set(x)
                jobs.append(threading.Thread(target=work, args=(scheduler, chain)))
            for job in jobs:
                job.start()
            for job in jobs:
                job.join()
    assert not failures


def test_graphs_have_nodes_leaves_and_outputs():
    with pytest.raises(ValueError, match="at least one output"):
        ggml.Graph()
    with pytest.raises(TypeError, match="outputs are tensors, not int"):
        ggml.Graph(1)
    with ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (2,))
        y, z = ggml.relu(x), ggml.silu(x)
        with ggml.Graph(y, z) as graph:
            assert graph.nodes == [y, z]
            assert graph.leaves == [x]
            assert x in graph
            assert ggml.gelu(x) not in graph
            assert graph.n_tensors == 3
            assert graph.outputs == (y, z)


def test_two_schedulers_cannot_hold_the_same_tensors(devices, x):
    with Chain(devices) as chain, ggml.Scheduler(devices) as one, ggml.Scheduler(devices) as two:
        one.alloc(chain.graph)
        one.alloc(chain.graph)
        with ggml.Graph(ggml.relu(chain.x)) as other:
            two.alloc(other)  # a common input is no conflict
            with pytest.raises(ValueError, match="a scheduler holds"):
                ggml.Graph(ggml.relu(chain.layers[0]))
        one.reset()
        two.alloc(chain.graph)
        with pytest.raises(ValueError, match="a scheduler holds"):
            one.alloc(chain.graph)


def test_compute_allocates_the_graph_first(devices, x):
    with Chain(devices) as chain, ggml.Scheduler(devices) as s:
        s.compute(chain.graph)
        assert not chain.y.numpy().any()  # inputs are zero at first


@pytest.mark.parametrize("operate", [ggml.relu, ggml.neg, lambda t: ggml.add(t, t)])
def test_an_empty_node_after_a_graph_without_memory(devices, operate):
    # ggml keeps the buffer of the previous graph, which has no memory yet in which an empty tensor could be put.
    with ggml.Scheduler(devices) as s, ggml.Context() as ctx:
        a = ctx.new_tensor("f32", (4,))
        ctx.alloc(devices[0], [a])
        a.set(np.array([-1, 2, -3, 4]))
        for _ in range(2):
            with ggml.Graph(ggml.relu_inplace(a)) as graph:
                s.alloc(graph)
                s.compute()
            np.testing.assert_array_equal(a.numpy(), [0, 2, 0, 4])
            nothing = operate(ctx.new_tensor("f32", (0, 3)))
            with ggml.Graph(nothing) as graph:
                s.alloc(graph)
                s.compute()
                assert nothing.numpy().shape == (0, 3)
            something = operate(a)
            with ggml.Graph(something) as graph:
                s.alloc(graph)
                s.compute()
                assert something.numpy().shape == (4,)


@pytest.mark.parametrize("through", [False, True], ids=["itself", "a view of it"])
def test_operands_that_are_read_again_are_not_overwritten(devices, rng, through):
    # ggml would write these results over their second operand, and then read the operand.
    def computed(t):
        made = ggml.scale(t, 1.0)
        return made.reshape((t.size,)).reshape(t.shape) if through else made

    grad, y, b = (rng.uniform(0.1, 1, (4, 8)).astype(np.float32) for _ in range(3))
    wanted = [3, 2, 1, 0]
    for operate, want in (
        (lambda g, y, b, i: ggml.soft_max_ext_back(g, computed(y)), y * (grad - (y * grad).sum(-1, keepdims=True))),
        (lambda g, y, b, i: ggml.add_id(g, computed(b), i), grad + b[wanted]),
    ):
        with ggml.Context() as ctx, ggml.Scheduler(devices) as s:
            tensors = [ctx.new_tensor("f32", (4, 8)) for _ in range(3)]
            ids = ctx.new_tensor("i32", (4,))
            result = operate(*tensors, ids)
            with ggml.Graph(result) as graph:
                s.alloc(graph)
                for t, values in zip(tensors, (grad, y, b), strict=True):
                    if t.is_allocated:
                        t.set(values)
                if ids.is_allocated:
                    ids.set(np.array(wanted))
                s.compute()
                assert relative_error(result.numpy(), want) < 1e-5


def test_a_graph_cannot_be_computed_by_two_schedulers(devices):
    with ggml.Context() as ctx, ggml.Scheduler(devices) as first, ggml.Scheduler(devices) as second:
        nothing = ggml.cont(ctx.new_tensor("f16", (5, 0)))
        for s in (first, second, first):
            with ggml.Graph(nothing) as graph:
                s.alloc(graph)
                s.compute()
                s.reset()
            with ggml.Graph(ggml.neg(nothing)) as graph:
                s.alloc(graph)
                s.compute()
                s.reset()
