"""Handles closed in any order, twice, never, at interpreter exit, and after a fork."""

import gc
import itertools
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core.handle import live
from tests.support import need, run_python


def open_all(device):
    """Open one object of each class, connected by a graph that is computed."""
    backend = ggml.Backend(device)
    weights, work = ggml.Context(), ggml.Context()
    w = weights.new_tensor(ggml.F32, (4, 8))
    (buffer,) = weights.alloc(device, usage=ggml.Usage.WEIGHTS)
    w.set(np.ones((4, 8)))
    x = work.new_tensor(ggml.F32, (2, 8))
    y = ggml.linear(x, w)
    graph = ggml.Graph(y)
    scheduler = ggml.Scheduler([backend])
    scheduler.alloc(graph)
    x.set(np.ones((2, 8)))
    scheduler.compute()
    assert np.all(y.numpy() == 8)
    return [backend, buffer, weights, work, graph, scheduler]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["CPU", "Vulkan0"])
def test_objects_can_be_closed_in_any_order(device):
    (device,) = need((device,))
    before = live()
    orders = itertools.permutations(range(6)) if device == "CPU" else itertools.permutations(range(6), 6)
    for order in itertools.islice(orders, 0, None, 1 if device == "CPU" else 37):
        handles = open_all(device)
        for i in order:
            handles[i].close()
            handles[i].close()
            assert handles[i].closed
        del handles
        assert live() == before


def test_use_after_close_raises():
    handles = open_all("CPU")
    for handle in handles:
        handle.close()
        with pytest.raises(ggml.ClosedError, match=f"{type(handle).__name__} is closed"):
            handle.ptr  # noqa: B018
        with pytest.raises(ggml.ClosedError), handle:
            pass
        assert "closed" in repr(handle)
    assert issubclass(ggml.ClosedError, ggml.GgmlError)


def test_tensors_die_with_their_context():
    with ggml.Context() as ctx:
        t = ctx.new_tensor(ggml.F32, (2,))
    for use in (lambda: t.shape, lambda: t.numpy(), lambda: ggml.relu(t), lambda: ggml.Graph(t)):
        with pytest.raises(ggml.ClosedError, match="Context is closed"):
            use()
    assert repr(t) == "<Tensor of a closed context>"


def test_the_scheduler_keeps_its_tensors_alive():
    """A closed buffer is freed only once the scheduler releases it, and later use raises instead of crashing."""
    with ggml.Context() as weights, ggml.Context() as work, ggml.Scheduler(["CPU"]) as scheduler:
        w = weights.new_tensor(ggml.F32, (4, 8))
        (buffer,) = weights.alloc("CPU", usage=ggml.Usage.WEIGHTS)
        x = work.new_tensor(ggml.F32, (2, 8))
        y = ggml.linear(x, w)
        with ggml.Graph(y) as graph:
            scheduler.alloc(graph)
            buffer.close()
            scheduler.compute()
            with pytest.raises(ValueError, match="no memory"):
                w.numpy()
            with pytest.raises(ggml.ClosedError, match="buffer"):
                scheduler.alloc(graph)
            weights.close()
            with pytest.raises(ggml.ClosedError):
                scheduler.compute(graph)


def test_a_handle_that_is_never_closed_warns_and_is_freed():
    before = live()
    with pytest.warns(ResourceWarning, match="Context was never closed"):
        ggml.Context()
    gc.collect()
    assert live() == before


def test_closed_handles_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ggml.Context().close()
        gc.collect()


@pytest.mark.parametrize("device", ["CPU", "Vulkan0"])
def test_objects_open_at_interpreter_exit_are_freed(device):
    (device,) = need((device,))
    done = run_python(
        "import numpy as np\nfrom tests.core.test_handle import open_all\n"
        f"handles = open_all({device!r})\n"
        "class Late:\n"
        "    def __init__(self, handles): self.handles = handles\n"
        "    def __del__(self):\n"
        "        for handle in self.handles: handle.close()\n"
        "late = Late(handles)\n"
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_hundreds_of_rounds_leave_nothing_behind():
    def rounds(n):
        for _ in range(n):
            for handle in reversed(open_all("CPU")):
                handle.close()

    rounds(50)
    gc.collect()
    before, made = resident(), live()
    rounds(400)
    gc.collect()
    assert live() == made
    assert resident() - before < 3 * 2**20


def resident():
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_gpu_objects_in_a_forked_child_raise():
    code = """
import os, sys, numpy as np, ggml_cffi as ggml
backend = ggml.Backend({device!r})
ctx = ggml.Context()
t = ctx.new_tensor(ggml.F32, (2,))
pid = os.fork()
if pid == 0:
    try:
        backend.synchronize()
    except ggml.ClosedError as error:
        print(error, flush=True)
    assert t.shape == (2,)
    if {device!r} != "CPU":
        try:
            ggml.Backend({device!r})
        except ggml.GgmlError as error:
            print(error, flush=True)
    os._exit(0)  # as multiprocessing does: at exit, Mesa 26 waits for threads that this process lacks
assert os.waitpid(pid, 0)[1] == 0
backend.synchronize()
backend.close()
ctx.close()
"""
    for device in ("CPU", *need(("Vulkan0",))):
        done = run_python("import warnings; warnings.simplefilter('ignore')\n" + code.format(device=device))
        assert "opened before a fork" in done.stdout, done
        assert (device == "CPU") != ('get_context("spawn")' in done.stdout)
