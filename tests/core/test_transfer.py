"""Transfers between devices, pinned memory, DLPack."""

import os

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import run_python


def on(device, values, dtype="f32", ctx=None):
    t = ctx.new_tensor(dtype, values.shape)
    ctx.alloc(device, [t])
    t.set(values)
    return t


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2), (2, 1), (0, 0)], ids=str)
@pytest.mark.parametrize(("dtype", "n"), [("f32", 1 << 16), ("f16", 999), ("q8_0", 1 << 15)], ids=str)
def test_tensors_are_copied_between_any_two_devices(two_gpus, pair, dtype, n, rng):
    devices = *two_gpus, "CPU"
    with ggml.Context() as ctx:
        x = on(devices[pair[0]], rng.standard_normal(n), dtype, ctx)
        y = on(devices[pair[1]], np.zeros(n), dtype, ctx)
        ggml.transfer(x, y, chunk=10_000)
        np.testing.assert_array_equal(y.numpy(), x.numpy())


def test_a_host_block_is_reused_by_several_transfers(two_gpus, rng):
    """One block serves transfers of several sizes and of views, with backends of the caller."""
    a, b = two_gpus
    with (
        ggml.Context() as ctx,
        ggml.HostBlock(1 << 18, two_gpus) as block,
        ggml.Backend(a) as first,
        ggml.Backend(b) as second,
    ):
        assert len(block.buffers) == 2
        for n in (1, 1000, 65_536, 100_001):
            values = rng.standard_normal(n).astype(np.float32)
            x, y = on(a, values, ctx=ctx), on(b, np.zeros(n), ctx=ctx)
            ggml.transfer(x, y, (first, second), block=block, chunk=1 << 16)
            np.testing.assert_array_equal(y.numpy(), values)
        rows = on(b, np.zeros((4, 20_000)), ctx=ctx)
        x = on(a, rng.standard_normal((2, 20_000)), ctx=ctx)
        ggml.transfer(x, ggml.view(rows, (2, 20_000), offset=rows.nb[1]), chunk=1 << 14)
        np.testing.assert_array_equal(rows.numpy(), np.concatenate([x.numpy() * 0, x.numpy(), x.numpy() * 0])[1:5])


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (2, 0), (0, 0)], ids=str)
def test_views_are_copied_between_any_two_devices(two_gpus, pair, rng):
    devices = *two_gpus, "CPU"
    values = rng.standard_normal((4, 10)).astype(np.float32)
    with ggml.Context() as ctx:
        x, y = on(devices[pair[0]], values, ctx=ctx), on(devices[pair[1]], np.zeros((6, 10)), ctx=ctx)
        ggml.transfer(ggml.view(x, (2, 10), offset=x.nb[1]), ggml.view(y, (2, 10), offset=3 * y.nb[1]))
        np.testing.assert_array_equal(y.numpy(), np.concatenate([np.zeros((3, 10)), values[1:3], np.zeros((1, 10))]))


def test_transferred_row_numbers_are_checked(two_gpus):
    with ggml.Context() as ctx:
        table, rows = on(two_gpus[0], np.zeros((4, 2)), ctx=ctx), on(two_gpus[0], np.array([0, 3]), "i32", ctx)
        ggml.get_rows(table, rows)
        other = on(two_gpus[1], np.array([1, 9]), "i32", ctx)
        with pytest.raises(ValueError, match="4 rows"):
            ggml.transfer(other, rows)
        other.set([1, 2])
        ggml.transfer(other, rows)
        assert rows.numpy().tolist() == [1, 2]


def test_transfers_of_unlike_tensors_raise(two_gpus):
    with ggml.Context() as ctx:
        x, short = on(two_gpus[0], np.zeros((4, 4)), ctx=ctx), on(two_gpus[1], np.zeros(4), ctx=ctx)
        half = on(two_gpus[1], np.zeros((4, 4)), "f16", ctx)
        for other in (short, half):
            with pytest.raises(ValueError, match="differ in type or shape"):
                ggml.transfer(x, other)
        with pytest.raises(ValueError, match="must be contiguous"):
            ggml.transfer(ggml.transpose(x), on(two_gpus[1], np.zeros((4, 4)), ctx=ctx))
        with pytest.raises(ValueError, match="has no memory"):
            ggml.transfer(x, ctx.new_tensor("f32", (4, 4)))
        with pytest.raises(TypeError, match="transfer takes tensors, not list"):
            ggml.transfer(x, [1.0])
    with pytest.raises(ValueError, match="at least 1 byte, not 0"):
        ggml.HostBlock(0, two_gpus)


@pytest.mark.parametrize("memory", ["pinned", "plain"])
def test_asynchronous_copies_arrive(devices, memory, rng):
    values = rng.standard_normal((64, 64)).astype(np.float32)
    make = (lambda s: ggml.pinned(s, device=devices[0])) if memory == "pinned" else (lambda s: np.zeros(s, np.float32))
    with ggml.Backend(devices[0]) as backend, ggml.Context() as ctx:
        x = ctx.new_tensor("f32", (64, 64))
        ctx.alloc(devices[0])
        array, out = make((64, 64)), make((64, 64))
        array[...] = values
        x.set_async(array, backend)
        x.get_async(out, backend)
        backend.synchronize()
        np.testing.assert_array_equal(out, values)
        for wrong in (array[:, ::2], array.astype(np.float64), array[:2], [1.0]):
            with pytest.raises(ValueError, match="takes a C-ordered float32 array of its shape"):
                x.set_async(wrong, backend)
        with pytest.raises(ValueError, match="is a view"):
            ggml.reshape(x, (64, 64)).get_async(out, backend)
        rows = ctx.new_tensor("i32", (2,))
        ctx.alloc(devices[0], [rows])
        with pytest.raises(TypeError, match="may be row numbers: use set"):
            rows.set_async(np.zeros(2, np.int32), backend)


def test_an_asynchronous_copy_on_another_devices_backend_raises(two_gpus):
    with ggml.Backend(two_gpus[1]) as backend, ggml.Context() as ctx:
        x = on(two_gpus[0], np.zeros(4), ctx=ctx)
        with pytest.raises(ValueError, match=f"not on {two_gpus[1]}"):
            x.get_async(np.zeros(4, np.float32), backend)


def test_pinned_memory_outlives_its_device_objects(two_gpus):
    array = ggml.pinned((3, 4), np.float16, device=two_gpus[0])
    assert array.shape == (3, 4)
    assert not array.any()
    array[1] = 2
    assert array.sum() == 8
    assert ggml.pinned((0, 4), device=two_gpus[0]).shape == (0, 4)
    assert ggml.pinned((2,), device="CPU").shape == (2,)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
def test_a_forked_process_does_not_free_pinned_memory(two_gpus):
    """The driver that pinned it does not work there."""
    code = (
        "import os\nimport ggml_cffi as ggml\n"
        "from ggml_cffi import c\n"
        f"pinned = ggml.BufferType(c.ggml_backend_dev_host_buffer_type(ggml.device({two_gpus[0]!r}).ptr))\n"
        "with ggml.Buffer(pinned, 64) as buffer, ggml.Buffer('CPU', 64) as ordinary:\n"
        "    assert buffer.is_host and ordinary.is_host\n"
        "    child = os.fork()\n"
        "    if child: os.waitpid(child, 0)\n"
        "    for each in (buffer, ordinary):\n"
        "        try: print('parent' if child else 'child', each.size >= 64, flush=True)\n"
        "        except ggml.ClosedError as error: print('child', error, flush=True)\n"
        "    if not child: os._exit(0)\n"
    )
    assert run_python(code).stdout.splitlines() == [
        "child this Buffer was opened before a fork; open a new one in a spawned process instead",
        "child True",
        "parent True",
        "parent True",
    ]


def test_dlpack_exports_host_memory(two_gpus):
    with ggml.Context() as ctx:
        x = on("CPU", np.arange(6.0).reshape(2, 3), ctx=ctx)
        view = np.from_dlpack(x)
        view[0, 0] = 7
        assert x.numpy()[0, 0] == 7
        assert np.asarray(x).tolist() == x.numpy().tolist()
        gpu = on(two_gpus[0], np.zeros(2), ctx=ctx)
        with pytest.raises(BufferError, match="is not in host memory: DLPack needs it there"):
            np.from_dlpack(gpu)
        del view


def test_set_takes_every_kind_of_array():
    class Interface:
        def __init__(self, array):
            self.__array_interface__ = array.__array_interface__
            self.array = array

    with ggml.Context() as ctx:
        x = on("CPU", np.zeros(3), ctx=ctx)
        for values in ([1, 2, 3], Interface(np.array([1.0, 2, 3])), np.array([1, 2, 3]), (1.0, 2, 3)):
            x.set(values)
            assert x.numpy().tolist() == [1, 2, 3]
        y = on("CPU", np.array([4.0, 5, 6]), ctx=ctx)
        x.set(y)  # a tensor is an array too
        assert x.numpy().tolist() == [4, 5, 6]
        with pytest.raises(TypeError, match="numbers are needed"):
            x.set(["a", "b", "c"])
