"""Failures of plain ggml: each is reproduced through the C layer in a child process.

``TRAPS`` names, for each, the test that shows the right behaviour of ggml_cffi. ``python -m tests.scheduler.test_traps
NAME`` reproduces one failure and prints the outcome; many end the process.
"""

import importlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from tests.support import PATIENCE, ROOT, need, relative_error

N = 32
RNG = np.random.default_rng(3)
X, W, V = (RNG.standard_normal((N, N)).astype(np.float32) for _ in range(3))


class Plain:
    """A context and a scheduler by the C API. Nothing is freed: the process ends."""

    def __init__(self, gpus=("Vulkan0", "Vulkan1"), graph_size=256):
        self.names = [*gpus, "CPU"]
        self.backends = [c.ggml_backend_dev_init(ggml.device(name).ptr, c.NULL) for name in self.names]
        self.sched = self.scheduler(self.backends, graph_size)
        self.ctx = c.ggml_init({"mem_size": 1 << 20, "mem_buffer": c.NULL, "no_alloc": True})

    def scheduler(self, backends, graph_size=256):
        array = c.ffi.new("ggml_backend_t[]", backends)
        return c.ggml_backend_sched_new(array, c.NULL, len(backends), graph_size, False, True)

    def tensor(self, ne0=N, ne1=N):
        return c.ggml_new_tensor_2d(self.ctx, c.GGML_TYPE_F32, ne0, ne1)

    def input(self):
        t = self.tensor()
        c.ggml_set_input(t)
        return t

    def weight(self, values, backend=0):
        """A tensor in a buffer of its own."""
        ctx, self.ctx = self.ctx, c.ggml_init({"mem_size": 4096, "mem_buffer": c.NULL, "no_alloc": True})
        t = self.tensor()
        buffer = c.ggml_backend_alloc_ctx_tensors(self.ctx, self.backends[backend])
        c.ggml_backend_buffer_set_usage(buffer, c.GGML_BACKEND_BUFFER_USAGE_WEIGHTS)
        self.ctx = ctx
        put(t, values)
        return t

    def product(self, w, x):
        return c.ggml_mul_mat(self.ctx, w, x)

    def graph(self, y, size=2048):
        c.ggml_set_output(y)
        g = c.ggml_new_graph_custom(self.ctx, size, False)
        c.ggml_build_forward_expand(g, y)
        return g

    def place(self, t, backend):
        c.ggml_backend_sched_set_tensor_backend(self.sched, t, self.backends[backend])

    def where(self, t):
        return self.names[self.backends.index(c.ggml_backend_sched_get_tensor_backend(self.sched, t))]

    def reset(self):
        c.ggml_backend_sched_reset(self.sched)

    def reserve(self, g):
        assert c.ggml_backend_sched_reserve(self.sched, g)

    def alloc(self, g):
        assert c.ggml_backend_sched_alloc_graph(self.sched, g)

    def compute(self, g):
        assert c.ggml_backend_sched_graph_compute(self.sched, g) == 0  # C reports success


def put(t, values):
    c.ggml_backend_tensor_set(t, c.ffi.from_buffer(values), 0, values.nbytes)


def verdict(t, want):
    got = np.empty((N, N), np.float32)
    c.ggml_backend_tensor_get(t, c.ffi.from_buffer(got), 0, got.nbytes)
    return "right" if relative_error(got, want) < 1e-2 else "wrong"


# ---------------------------------------------------------------------- the traps


def reserve_then_alloc():
    """After a reservation, operands point to copies that no longer exist."""
    p = Plain()
    x = p.weight(X)
    y = p.product(p.weight(V, 1), p.product(p.weight(W), x))
    g = p.graph(y)
    p.reserve(g)
    p.alloc(g)
    p.compute(g)
    return verdict(y, X @ W.T @ V.T)


def compute_twice():
    """The first run overwrites its inputs."""
    p = Plain(gpus=())
    x, found = p.input(), []
    y = c.ggml_relu(p.ctx, p.product(p.weight(V), p.product(p.weight(W), c.ggml_scale(p.ctx, x, 2))))
    g = p.graph(y)
    p.alloc(g)
    put(x, X)
    for _ in range(2):
        p.compute(g)
        found.append(verdict(y, np.maximum(2 * X @ W.T @ V.T, 0)))
    return ", ".join(found)


def flagged_input():
    """Flagged inputs are assigned to the last backend, and so are the nodes that use them."""
    p = Plain()
    y = p.product(p.input(), p.input())
    p.alloc(p.graph(y))
    return p.where(y)


def placement():
    """An allocation keeps placements; a reservation, and a run without an allocation, remove them."""
    p, found = Plain(), []
    w, x = p.weight(W), p.weight(X)
    for calls in ([p.alloc], [p.reserve, p.alloc], [p.compute]):
        y = p.product(w, x)
        g = p.graph(y)
        p.reset()
        p.place(y, 1)
        for call in calls:
            call(g)
        found.append(p.where(y))
    return ", ".join(found)


def second_graph():
    """A run ignores the graph that it is given, and computes the allocated one."""
    p = Plain()
    x = p.weight(X)
    one, two = p.product(p.weight(W), x), p.product(p.weight(V), x)
    g, other = p.graph(one), p.graph(two)
    p.alloc(g)
    p.compute(other)
    return f"first {verdict(one, X @ W.T)}, second {'computed' if two.buffer else 'untouched'}"


def reset_with_weights():
    """After a reset the operand still points to the copy of the weight, which is not made again."""
    p, found = Plain(), []
    w = p.weight(W)
    y = p.product(w, p.weight(X, 1))
    g = p.graph(y)
    for values in (W, V):
        put(w, values)
        p.reset()
        p.place(y, 1)
        p.alloc(g)
        p.compute(g)
        found.append(verdict(y, X @ values.T))
    return ", ".join(found)


def out_of_memory():
    """An allocation ignores the failure of the reservation inside it."""
    p = Plain(gpus=())
    a, b = p.tensor(1, 1 << 23), p.tensor(1, 1 << 23)
    # An intermediate of 256 TiB: more than a process can address, also where the system promises more than it has.
    g = p.graph(c.ggml_sum_rows(p.ctx, p.product(a, b)))
    return c.ggml_backend_sched_alloc_graph(p.sched, g)


def closing_order():
    """The scheduler calls a backend that was freed."""
    p = Plain(gpus=())
    g = p.graph(c.ggml_relu(p.ctx, p.weight(X)))
    p.alloc(g)
    c.ggml_backend_free(p.backends[0])
    p.compute(g)


def seventeen_backends():
    p = Plain(gpus=())
    p.scheduler([c.ggml_backend_dev_init(ggml.device("CPU").ptr, c.NULL) for _ in range(17)])


def large_graph():
    """The hash table does not grow beyond the size that the scheduler was made with."""
    p = Plain(gpus=(), graph_size=4)
    y = p.tensor()
    for _ in range(300):
        y = c.ggml_scale(p.ctx, y, 1.01)
    p.alloc(p.graph(y))


def one_task():
    """A custom operation is called on every thread that the run has."""
    p, calls = Plain(gpus=()), []

    @c.ffi.callback("ggml_custom1_op_t")
    def count(out, a, part, parts, data):
        calls.append(part)

    c.ggml_backend_cpu_set_n_threads(p.backends[0], 4)
    x = p.weight(X)
    g = p.graph(c.ggml_map_custom1(p.ctx, p.product(x, x), count, 1, c.NULL))
    p.alloc(g)
    p.compute(g)
    return f"{len(calls)} calls"


#: Function above; outcome in plain ggml (its result, or the signals that may end it); test of the right behaviour.
TRAPS = [
    (
        reserve_then_alloc,
        "wrong",
        "scheduler.test_scheduler.test_a_graph_can_be_reserved_allocated_released_and_allocated_again",
    ),
    (compute_twice, "right, wrong", "scheduler.test_scheduler.test_inputs_keep_their_values"),
    (flagged_input, "CPU", "scheduler.test_scheduler.test_an_input_mark_moves_no_work_to_the_cpu"),
    (placement, "Vulkan1, Vulkan0, Vulkan0", "scheduler.test_scheduler.test_placement_is_kept"),
    (second_graph, "first right, second untouched", "scheduler.test_scheduler.test_another_graph_is_refused"),
    (reset_with_weights, "right, wrong", "scheduler.test_traps.test_weights_may_change_between_resets"),
    # From ggml 0.25 on, plain ggml reports it; the next allocation still reads the buffer that is not there.
    (
        out_of_memory,
        "False" if c.library.provides("ggml_swiglu_clamp") else {"SIGSEGV"},
        "scheduler.test_scheduler.test_out_of_memory_raises_and_leaves_the_scheduler_usable",
    ),
    (closing_order, {"SIGSEGV", "SIGBUS"}, "core.test_handle.test_objects_can_be_closed_in_any_order"),
    (seventeen_backends, {"SIGABRT"}, "scheduler.test_traps.test_sixteen_backends_with_the_cpu"),
    (large_graph, {"SIGABRT"}, "scheduler.test_scheduler.test_the_scheduler_grows_with_the_graph"),
    (one_task, "4 calls", "ops.test_custom.test_a_function_is_called_once_per_task"),
]
NEED_GPUS = {reserve_then_alloc, flagged_input, placement, second_graph, reset_with_weights}


@pytest.mark.parametrize(("trap", "outcome", "ours"), TRAPS, ids=[trap.__name__ for trap, *_ in TRAPS])
def test_the_trap_catches_plain_ggml(vulkan, trap, outcome, ours):
    module, _, name = ours.rpartition(".")
    assert callable(getattr(importlib.import_module(f"tests.{module}"), name))
    if trap in NEED_GPUS:
        need(("Vulkan0", "Vulkan1"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.scheduler.test_traps", trap.__name__],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        cwd=ROOT,
        # Freed memory is overwritten, so that its use shows; a failed assertion starts no debugger.
        env={**os.environ, "MALLOC_PERTURB_": "165", "GGML_NO_BACKTRACE": "1"},
    )
    if isinstance(outcome, str):
        assert (done.returncode, done.stdout.strip()) == (0, outcome), done.stderr
    else:
        assert done.returncode < 0, done
        assert signal.Signals(-done.returncode).name in outcome


# ---------------------------------------------------------------------- right behaviour that no other test shows


def test_weights_may_change_between_resets(two_gpus):
    with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
        w, x = ctx.new_tensor("f32", W.shape), ctx.new_tensor("f32", X.shape)
        ctx.alloc(two_gpus[0], [w], usage=ggml.Usage.WEIGHTS)
        ctx.alloc(two_gpus[1], [x], usage=ggml.Usage.WEIGHTS)
        x.set(X)
        y = ggml.mul_mat(w, x)
        s.place(y, two_gpus[1])
        with ggml.Graph(y) as graph:
            for values in (W, V):
                w.set(values)
                s.reset()
                s.compute(graph)
                assert [(t, b.name) for t, b in s.copies] == [(w, two_gpus[1])]
                assert relative_error(y.numpy(), X @ values.T) < 1e-2
                np.testing.assert_array_equal(w.numpy(), values)


def test_sixteen_backends_with_the_cpu(two_gpus):
    backends = [ggml.Backend(two_gpus[0]) for _ in range(16)]
    try:
        with pytest.raises(ValueError, match="17 backends with the CPU; a scheduler has at most 16"):
            ggml.Scheduler(backends)
        with ggml.Scheduler(backends[:15]) as s:
            assert len(s.backends) == 16
    finally:
        for backend in backends:
            backend.close()


if __name__ == "__main__":
    sys.stdout.write(f"{globals()[sys.argv[1]]()}\n")
    sys.stdout.flush()
    os._exit(0)  # without finalizers, since nothing was freed
