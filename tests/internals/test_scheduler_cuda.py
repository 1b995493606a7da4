"""The scheduler's choices for CUDA devices, on Vulkan devices that count as such: most machines have no CUDA."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import c
from ggml_cffi.core import cuda
from ggml_cffi.scheduler.spread import find_spread, supports_copied
from tests.support import need, relative_error


@pytest.fixture
def gpus(monkeypatch):
    monkeypatch.setattr(cuda, "_BUILT_FROM_CUDA", frozenset({"CUDA", "Vulkan"}))
    return need(("Vulkan0", "Vulkan1"))


def on(ctx, device, values, usage=ggml.Usage.ANY):
    t = ctx.new_tensor("f32", values.shape)
    ctx.alloc(device, [t], usage=usage)
    t.set(values)
    return t


def test_nodes_with_operands_on_two_devices_are_computed_with_copies(gpus, rng):
    """The backend of a node is that of its memory, else of its first weight, else of its first operand."""
    x, w = (rng.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    with ggml.Context() as ctx, ggml.Scheduler(gpus) as s:
        first, second = on(ctx, gpus[0], x), on(ctx, gpus[1], x)
        weight = on(ctx, gpus[1], w, ggml.Usage.WEIGHTS)
        kept = on(ctx, gpus[1], x)
        total, product, written = ggml.add(first, second), ggml.mul_mat(first, weight), ggml.add_inplace(kept, first)
        alone = ggml.relu(second)
        with ggml.Graph(total, product, written, alone) as graph:
            found = find_spread(graph, s.backends)
            names = {t: found[t.ptr].name for t in graph.nodes if t.ptr in found}
            assert names == {total: gpus[0], product: gpus[1], written: gpus[1]}
            assert find_spread(graph, s.backends[:1]) == {}
            assert supports_copied(s.backends[0], product.ptr)
            assert not supports_copied(s.backends[-1], product.ptr)
            s.compute(graph)
            assert {t: b.name for t, b in s.assignment()} == {**names, alone: gpus[1]}
            np.testing.assert_array_equal(total.numpy(), 2 * x)
            np.testing.assert_array_equal(written.numpy(), 2 * x)
            assert relative_error(product.numpy(), w @ x.T) < 2e-3


def test_nodes_that_write_to_host_memory_are_not_computed_by_a_gpu(gpus, rng):
    """Kernels cannot write there. Rows, their numbers and their target are in three places."""
    x = rng.standard_normal((8, 8)).astype(np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(gpus) as s:
        numbers = ctx.new_tensor("i64", (8,))
        ctx.alloc(gpus[1], [numbers])
        numbers.set(np.arange(8)[::-1])
        written = ggml.set_rows(on(ctx, "CPU", 0 * x), on(ctx, gpus[0], x), numbers)
        with ggml.Graph(written) as graph:
            assert find_spread(graph, s.backends) == {}
            s.compute(graph)
            assert s.backend_of(written).name == "CPU"
            np.testing.assert_array_equal(written.numpy(), x[::-1])


def test_pinned_memory_is_no_memory_of_the_device_that_allocates_it(gpus, rng):
    x = rng.standard_normal((8, 8)).astype(np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(gpus) as s:
        pinned, second = ctx.new_tensor("f32", x.shape), on(ctx, gpus[1], x)
        host = c.ggml_backend_dev_host_buffer_type(ggml.device(gpus[0]).ptr)
        ctx.alloc(ggml.BufferType(host), [pinned])
        pinned.set(x)
        with ggml.Graph(ggml.add(pinned, second)) as graph:
            assert find_spread(graph, s.backends) == {}


def test_a_placement_by_hand_comes_first(gpus, rng):
    x = rng.standard_normal((8, 8)).astype(np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(gpus) as s:
        total = ggml.add(on(ctx, gpus[0], x), on(ctx, gpus[1], x))
        s.place(total, gpus[1])
        with ggml.Graph(total) as graph:
            s.compute(graph)
            assert s.backend_of(total).name == gpus[1]
            np.testing.assert_array_equal(total.numpy(), 2 * x)


def test_nodes_that_kernels_do_not_compute_are_on_the_cpu(gpus, rng):
    x = rng.standard_normal((5, 8)).astype(np.float32)
    with ggml.Context() as ctx, ggml.Scheduler(gpus) as s:
        masked = ggml.diag_mask_inf(ggml.add(on(ctx, gpus[0], x), on(ctx, gpus[0], x)), 2)
        with ggml.Graph(masked) as graph:
            s.compute(graph)
            assert s.backend_of(masked).name == "CPU"
            want = np.where(np.arange(8) <= 2 + np.arange(5)[:, None], 2 * x, -np.inf)
            np.testing.assert_array_equal(masked.numpy(), want)
        s.reset()
        s.place(masked, gpus[0])
        with (
            ggml.Graph(masked) as graph,
            pytest.raises(ggml.UnsupportedOpError, match=r"-3\.4e38 in the place of -inf on CUDA: use soft_max_ext"),
        ):
            s.alloc(graph)
