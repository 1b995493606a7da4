"""A graph that a scheduler allocates again is not checked again, unless something changed that the checks look at."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.scheduler import allocation
from tests.support import bound_of_products, relative_error
from tests.support.chain import Chain


@pytest.fixture
def x(rng):
    return rng.standard_normal((4, 32))


@pytest.fixture
def checked(monkeypatch):
    """Return the list of the graphs that are checked."""
    found, real = [], allocation.check_ops
    monkeypatch.setattr(allocation, "check_ops", lambda graph, *args: (found.append(graph), real(graph, *args))[1])
    return found


def check_result(devices, scheduler, chain, x):
    chain.x.set(x)
    scheduler.compute(chain.graph)
    assert relative_error(chain.y.numpy(), chain.want(x)) < bound_of_products(devices, 1e-3)


def test_graphs_in_turns_are_checked_once(devices, x, checked):
    with Chain(devices) as large, Chain(devices, n=16) as small, ggml.Scheduler(devices) as s:
        for _ in range(3):
            for chain, values in ((large, x), (small, x[:, :16])):
                s.alloc(chain.graph)
                check_result(devices, s, chain, values)
        assert checked == [large.graph, small.graph]
        s.reset()


def test_a_placement_and_a_larger_graph_are_checked_again(two_gpus, x, checked):
    with Chain(two_gpus[:1]) as chain, Chain(two_gpus, n=256) as larger, ggml.Scheduler(two_gpus) as s:
        s.alloc(chain.graph)
        s.place(chain.layers[1], two_gpus[1])
        s.alloc(chain.graph)
        assert s.backend_of(chain.layers[1]).name == two_gpus[1]
        check_result(two_gpus, s, chain, x)
        s.unplace()
        s.alloc(chain.graph)
        assert s.backend_of(chain.layers[1]).name == two_gpus[0]
        check_result(two_gpus, s, chain, x)
        assert len(checked) == 3
        s.alloc(larger.graph)  # it replaces the compute buffers, in which the first graph fitted
        s.alloc(chain.graph)
        assert len(checked) == 5
        check_result(two_gpus, s, chain, x)
        s.reserve_size(larger.graph)  # it frees the compute buffers
        s.alloc(chain.graph)
        assert len(checked) == 7
        check_result(two_gpus, s, chain, x)
        s.reset()


def test_two_schedulers_allocate_one_graph_in_turns(devices, x, checked):
    with Chain(devices) as chain, ggml.Scheduler(devices) as a, ggml.Scheduler(devices) as b:
        for s in (a, b, a, b):
            s.alloc(chain.graph)
            check_result(devices, s, chain, x)
            s.reset()
        assert len(checked) == 2
        a.alloc(chain.graph)
        with pytest.raises(ValueError, match=r"a scheduler holds .* call its reset\(\) first"):
            b.alloc(chain.graph)
        check_result(devices, a, chain, x)
        a.reset()


def test_closed_memory_is_found_in_a_graph_that_was_checked(devices, x):
    with Chain(devices) as chain, ggml.Scheduler(devices) as s:
        s.alloc(chain.graph)
        s.reset()
        chain.weights.buffers[0].close()
        with pytest.raises(ggml.ClosedError, match=r"the buffer of .* was closed"):
            s.alloc(chain.graph)
        assert s.graph is None
        chain.weights.close()
        with pytest.raises(ggml.ClosedError):
            s.alloc(chain.graph)


def test_a_graph_is_allocated_while_another_one_is_computed(devices, x):
    """Results that were asked for before arrive, and the memory of the first graph is kept until then."""
    with Chain(devices) as first, Chain(devices) as second, ggml.Scheduler(devices) as s:
        for chain in (second, first):
            s.alloc(chain.graph)
            check_result(devices, s, chain, x)
        for one, other in ((first, second), (second, first)):
            out = np.empty(one.y.shape, np.float32)
            one.x.set(2 * x)
            s.compute_async(one.graph)
            one.y.get_async(out, s.backend_of(one.y))
            s.alloc(other.graph, wait=False)
            assert s.graph is other.graph
            s.synchronize()
            assert relative_error(out, one.want(2 * x)) < bound_of_products(devices, 1e-3)
            check_result(devices, s, other, x)
        s.compute_async(first.graph)
        s.alloc(second.graph, wait=False)
        s.reset()  # it waits for the first graph
        assert s.graph is None
