"""Several devices that share every layer.

Most tests run two or three ranks on the CPU. :class:`TensorParallel` refuses that, because it is not faster, but all
code except the devices is the same. Some tests use GPUs.
"""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import ops, parallel
from ggml_cffi.core.unified import has_unified_addresses
from ggml_cffi.parallel import COLUMNS, ROWS
from tests.support import gguf_writer, need, relative_error, run_python
from tests.support.ranks import DIM, FF, LAYERS, Blocks, Ranks


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_ranks_agree_with_one_device(n, threads, residual, rng):
    blocks = Blocks(rng)
    with Ranks(n, threads=threads) as group:
        f = blocks.network(group, residual=residual)
        for rows in (1, 7, 300):  # 300 rows are too many for a sum that is computed directly in shared memory
            x = rng.standard_normal((rows, DIM)).astype(np.float32)
            for got, want in zip(f(x), blocks.expected(x), strict=True):
                assert got.shape == want.shape
                assert relative_error(got, want) < 1e-5
        steps = LAYERS + 1 if n > 1 else 1
        assert group.executor.steps_computed == [3 * steps] * n
        assert [len(p.step_graphs[0].graphs) for p in f.programs] == [steps] * 3


def test_a_closed_program_raises(rng):
    """Its graphs are freed, though its backend is open."""
    x = rng.standard_normal((1, DIM)).astype(np.float32)
    with ggml.Backend("CPU", n_threads=1) as backend:
        with parallel.TensorParallel([backend]) as group:
            program = Blocks(rng).network(group).trace(x)
            program.run([x])
        for call in (lambda: program.run([x]), program.compute, program.record):
            with pytest.raises(ggml.ClosedError, match="this program is closed: trace the function again"):
                call()


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_gpus_agree_with_one_device(devices, threads, residual, rng):
    blocks = Blocks(rng)
    with parallel.TensorParallel(devices, threads=threads, n_threads=1 if devices == ("CPU",) else None) as group:
        f = blocks.network(group, residual=residual)
        for rows in (1, 12):
            x = rng.standard_normal((rows, DIM)).astype(np.float32)
            for _ in range(2):
                for got, want in zip(f(x), blocks.expected(x), strict=True):
                    assert relative_error(got, want) < 2e-3
        n = len(devices)
        are_shared = all(has_unified_addresses(ggml.device(name)) for name in devices)
        assert group.executor.steps_computed == [4 * (LAYERS + 1 if n > 1 else 1)] * n
        for program in f.programs:
            for rank, name in zip(program.ranks, devices, strict=True):
                own = [t for t in rank.context.tensors() if t.op is ggml.Op.MUL_MAT]
                used = {t.buffer_type.device.name for t in own}
                shared = are_shared and used <= set(devices)  # partial sums may be written where another device adds
                assert name in used
                assert used == {name} or shared
                assert {t.ptr.src[0].ne[0] for t in own} >= {FF // n, DIM}


@pytest.mark.usefixtures("vulkan")
def test_three_gpus_and_halves():
    need(("Vulkan0", "Vulkan1"))
    code = """
        import sys
        import numpy as np
        from tests.support import relative_error
        from tests.support.ranks import Blocks, parallel
        rng = np.random.default_rng(0)
        blocks = Blocks(rng)
        for half_above, most, least in ((None, 2e-3, 0), (1000, 3e-3, 0)):
            with parallel.TensorParallel(["Vulkan0", "Vulkan1", "Vulkan2"], half_above=half_above) as group:
                f = blocks.network(group, residual=True)
                x = rng.standard_normal((12, 64)).astype(np.float32)
                got, want = f(x)[0], blocks.expected(x)[0]
                assert relative_error(got, want) < most, relative_error(got, want)
                assert group.executor.steps_computed == [4, 4, 4]
                kinds = {s.slots[0].dtype.name for s in f.programs[0].ranks[0].all_reduces}
                assert kinds == {"F16" if half_above else "F32"}, kinds
    """
    run_python("\n".join(line[8:] for line in code.splitlines()), GGML_VK_VISIBLE_DEVICES="0,0,0")


def test_all_ranks_have_the_same_to_the_last_bit(rng):
    w = rng.standard_normal((3, 8, 16)).astype(np.float32)
    with Ranks(3) as group:
        parts = group.weight(w, ROWS)

        def run(rank, x):
            return rank.all_gather(
                rank.all_reduce(ops.linear(x, ops.reshape(parts[rank], (8, 16), ctx=rank.context))), 0
            )

        for rows in (2, 3000):
            got = group.compile(run)(rng.standard_normal((rows, 16)).astype(np.float32)).reshape(3, rows, 8)
            assert (got == got[0]).all()


def test_caches_constants_and_row_numbers():
    with Ranks() as group:
        cache = group.zeros([(10, 4), (10, 2)], "f16")

        def run(rank, x, rows, wanted):
            mine = ops.view(x, (2, (4, 2)[rank.index]), strides=(24, 4), offset=(0, 16)[rank.index])
            written = ops.set_rows(cache[rank], ops.cont(mine), rows)
            seen = ops.mul(ops.get_rows(written, wanted), rank.context.constant([2.0]))
            return rank.all_gather(seen)

        f = group.compile(run)
        x = np.arange(12.0).reshape(2, 6)
        f(x, np.array([3, 5]), np.array([3], np.int32))
        got = f(x + 100, np.array([1, 2]), np.array([3, 5, 1], np.int32))
        np.testing.assert_array_equal(got, 2 * np.array([x[0], x[1], x[0] + 100]))
        with pytest.raises(ValueError, match="10 rows, but got values from 1 to 10"):
            f(x, np.array([1, 10]), np.array([3, 5, 1], np.int32))


def test_devices_that_cannot_share_layers():
    for given_, message in (
        (["CPU", "CPU"], "a device is listed twice: CPU, CPU"),
        ([], "needs a device"),
    ):
        with pytest.raises(ValueError, match=message):
            parallel.TensorParallel(given_)
    with pytest.raises(TypeError, match="a device is given by its name, position or Device object, not 1"):
        parallel.TensorParallel([1.5])


def test_one_device_needs_no_list():
    with parallel.TensorParallel("CPU") as one, parallel.TensorParallel(ggml.device("CPU")) as same:
        assert [b.name for b in one.backends] == [b.name for b in same.backends] == ["CPU"]


def test_the_cpu_cannot_share_layers_with_a_gpu(two_gpus):
    with pytest.raises(ValueError, match="the CPU cannot share layers with others"):
        parallel.TensorParallel([two_gpus[0], "CPU"])
    with pytest.raises(ValueError, match="a device is listed twice"):
        parallel.TensorParallel([two_gpus[0]] * 2)


def test_functions_that_cannot_be_compiled():
    x = np.ones((2, 4), np.float32)
    with Ranks() as group:
        w = group.weight(np.ones((4, 4), np.float32))
        cases = [
            (lambda rank, x: rank.all_reduce(ops.cast(x, "f16")), ValueError, "all_reduce takes contiguous F32"),
            (lambda rank, x: rank.all_reduce(ops.transpose(x)), ValueError, "all_reduce takes contiguous F32"),
            (lambda rank, x: rank.all_reduce(x, ops.cast(x, "f16")), ValueError, "a residual of F32 and the shape of"),
            (lambda rank, x: rank.all_reduce(x, ops.transpose(x)), ValueError, "a residual of F32 and the shape of"),
            (lambda rank, x: rank.all_reduce(3), TypeError, "all_reduce takes a tensor, not int"),
            (lambda rank, x: rank.all_reduce(x, 3), TypeError, "takes a tensor as residual, not int"),
            (lambda rank, x: rank.all_gather(3), TypeError, "all_gather takes a tensor, not int"),
            (lambda rank, x: rank.all_gather(x, 2), ValueError, "has no axis 2"),
            (lambda rank, x: 3, TypeError, "the function returned 3: return tensors"),
            (lambda rank, x: ops.scale(w[rank], 2.0), ValueError, "cannot be a result of rank 0"),
            (lambda rank, x: ops.add(x, ops.scale(w[rank], 2.0)), ValueError, "b does not broadcast"),
            (lambda rank, x: ops.linear(x, ops.scale(w[rank], 2.0)), ValueError, "is computed from weights alone"),
            (lambda rank, x: rank.all_reduce(x) if rank.index else x, ValueError, "all ranks must do the same"),
            (lambda rank, x: (x,) * (rank.index + 1), ValueError, "all ranks must do the same"),
            (lambda rank, x: ops.map_custom1(x, print), ggml.UnsupportedOpError, "operations written in Python"),
        ]
        for function, error, message in cases:
            with pytest.raises(error, match=message):
                group.compile(function)(x)
        with pytest.raises(TypeError, match="compile takes a function, not int"):
            group.compile(3)
        with pytest.raises(ValueError, match="1 shapes for 2 devices"):
            group.zeros([(2, 2)])
        f = group.compile(lambda rank, x: ops.scale(x, 2.0))
        assert f(x).tolist() == (2 * x).tolist()
    for call in (lambda: f(x), lambda: group.compile(len), lambda: group.weight(x), lambda: group.devices):
        with pytest.raises(ggml.ClosedError, match="is closed"):
            call()
    assert repr(group) == "<TensorParallel closed>"
    group.close()


def test_weights_from_a_file(tmp_path, rng):
    values = rng.standard_normal((4, 64)).astype(np.float32)
    path = gguf_writer.write(tmp_path / "w.gguf", {"general.architecture": "x"}, {"w": (ggml.Q8_0, values)})
    seen = []
    with ggml.GGUFFile(path) as file, Ranks() as group:
        found = group.weights({"w": file["w"]}, {"w": COLUMNS}, progress=lambda *args: seen.append(args))
        assert [t.shape for t in found["w"]] == [(4, 32), (4, 32)]
        np.testing.assert_array_equal(np.concatenate([t.numpy() for t in found["w"]], 1), file.array("w"))
        assert seen == [(2 * 68, 4 * 68), (4 * 68, 4 * 68)]
        cast = group.weight(file["w"], ROWS, dtype="f16")
        assert [(t.shape, t.dtype.name) for t in cast] == [((2, 64), "F16")] * 2
