"""Several devices that share every layer.

Most tests give two or three ranks to the CPU, which :class:`TensorParallel` refuses, since it gains nothing: all but
the devices is the same. Those that take GPUs show that these compute it.
"""

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi import ops, parallel
from ggml_cffi.parallel import COLUMNS, MIRROR, ROWS, split_evenly
from ggml_cffi.parallel import tensor_parallel as tensor
from ggml_cffi.parallel.arena import arrange
from ggml_cffi.parallel.executors import arrivals as _arrivals
from ggml_cffi.parallel.executors.barrier import Barrier
from ggml_cffi.parallel.shard import shard_bytes, spec_for
from ggml_cffi.parallel.step_plan import levels
from tests.support import need, relative_error, run_python

DIM, FF, LAYERS = 64, 96, 3


class Ranks(parallel.TensorParallel):
    """As many ranks as wanted, all on the CPU."""

    def __init__(self, n=2, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensor, "check_devices", lambda devices: None)
            super().__init__(["CPU"] * n, n_threads=1, **options)


class Blocks:
    """Feed-forward blocks with norms and residuals, and what they compute in float64."""

    def __init__(self, rng):
        self.values = {}
        for i in range(LAYERS):
            self.values[f"{i}.norm"] = rng.uniform(0.5, 1.5, DIM).astype(np.float32)
            self.values[f"{i}.up"] = (rng.standard_normal((FF, DIM)) / 8).astype(np.float32)
            self.values[f"{i}.down"] = (rng.standard_normal((DIM, FF)) / 10).astype(np.float32)

    def network(self, group):
        w = group.weights(self.values, {"*.up": ROWS, "*.down": COLUMNS})

        def run(rank, x):
            for i in range(LAYERS):
                h = ops.mul(ops.rms_norm(x, 1e-5), w[f"{i}.norm"][rank])
                h = ops.linear(ops.relu(ops.linear(h, w[f"{i}.up"][rank])), w[f"{i}.down"][rank])
                x = ops.add(x, rank.all_reduce(h))
            return x, rank.all_gather(ops.linear(x, w["0.up"][rank]))

        return group.compile(run)

    def expected(self, x):
        x = np.asarray(x, np.float64)
        for i in range(LAYERS):
            norm, up, down = (self.values[f"{i}.{name}"].astype(np.float64) for name in ("norm", "up", "down"))
            h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm
            x = x + np.maximum(h @ up.T, 0) @ down.T
        return x, x @ self.values["0.up"].T.astype(np.float64)


# ---------------------------------------------------------------------- a whole network


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("threads", [False, True])
def test_ranks_compute_what_one_would(n, threads, rng):
    blocks = Blocks(rng)
    with Ranks(n, threads=threads) as group:
        f = blocks.network(group)
        for rows in (1, 7, 300):  # 300 rows are more than what is computed straight into shared memory
            x = rng.standard_normal((rows, DIM)).astype(np.float32)
            for got, want in zip(f(x), blocks.expected(x), strict=True):
                assert got.shape == want.shape
                assert relative_error(got, want) < 1e-5
        steps = LAYERS + 1 if n > 1 else 1
        assert group.executor.computed == [3 * steps] * n
        assert [len(p.plans[0].graphs) for p in f.programs] == [steps] * 3


@pytest.mark.parametrize("threads", [False, True])
def test_gpus_compute_what_one_would(devices, threads, rng):
    blocks = Blocks(rng)
    with parallel.TensorParallel(devices, threads=threads, n_threads=1 if devices == ("CPU",) else None) as group:
        f = blocks.network(group)
        for rows in (1, 12):
            x = rng.standard_normal((rows, DIM)).astype(np.float32)
            for _ in range(2):
                for got, want in zip(f(x), blocks.expected(x), strict=True):
                    assert relative_error(got, want) < 2e-3
        n = len(devices)
        assert group.executor.computed == [4 * (LAYERS + 1 if n > 1 else 1)] * n
        for program in f.programs:
            for rank, name in zip(program.ranks, devices, strict=True):
                own = [t for t in rank.context.tensors() if t.op is ggml.Op.MUL_MAT]
                assert {t.buffer_type.device.name for t in own} == {name}
                assert {t.ptr.src[0].ne[0] for t in own} >= {FF // n, DIM}


@pytest.mark.parametrize("rows", [1, 40])
def test_what_gpus_compute_together_is_there_for_later(two_gpus, rows, rng):
    """ggml's Vulkan computes a norm and the product with its weight as one, and a product and what is added to it; the
    first of them is left out where nothing else in the graph uses it.
    """
    values = {name: rng.standard_normal((DIM, DIM)).astype(np.float32) / 8 for name in "abc"}
    values |= {"scale": rng.uniform(0.5, 1.5, DIM).astype(np.float32)}
    with parallel.TensorParallel(two_gpus) as group:
        w = group.weights(values, {"a": ROWS, "b": COLUMNS})

        def run(rank, x):
            norm = ops.rms_norm(x, 1e-5)
            scaled = ops.mul(norm, w["scale"][rank])
            both = ops.linear(scaled, w["c"][rank])
            added = ops.add(both, norm)  # a product that the next step needs too
            y = rank.all_reduce(ops.linear(ops.linear(added, w["a"][rank]), w["b"][rank]))
            return ops.add(ops.add(y, both), ops.add(scaled, norm))

        f = group.compile(run)
        x = rng.standard_normal((rows, DIM)).astype(np.float32)
        a, b, c, scale = (values[name].astype(np.float64) for name in ("a", "b", "c", "scale"))
        norm = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5)
        both = (norm * scale) @ c.T
        want = (both + norm) @ a.T @ b.T + both + norm * scale + norm
        for _ in range(2):
            assert relative_error(f(x), want) < 2e-3


def test_a_short_graph_ends_with_views(two_gpus, rng):
    """A device that is soon done is asked again and again whether it is: see ``_fill``."""
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
            (plan,) = f.programs[-1].plans
            (step,) = plan.steps
            assert not step.held
            (graph,) = step.rest
            nodes[rows] = len(plan.node_pointers()), ggml.c.ggml_graph_n_nodes(graph)
    (n, short), (m, long) = nodes[1], nodes[17]
    assert n == m == long
    assert (short - n) + 1 >= short // 5  # ggml's rule for the last node that computes something
    assert short - n < n / 3


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("threads", [False, True])
def test_each_way_to_drive_gpus(two_gpus, rows, watched, threads, rng):
    """All give the same."""
    blocks = Blocks(rng)
    with parallel.TensorParallel(two_gpus, threads=threads) as group:
        assert not group.executor.watches
        group.executor.watches = watched
        f = blocks.network(group)
        x = rng.standard_normal((rows, DIM)).astype(np.float32)
        want = blocks.expected(x)
        first = f(x)
        for _ in range(4):
            got = f(x)
            assert all(relative_error(a, b) < 2e-3 for a, b in zip(got, want, strict=True))
            for one, other in zip(first, got, strict=True):
                np.testing.assert_array_equal(one, other)
        assert f.programs[0].arrivals.late == 0


def test_sums_are_watched_unless_threads_are_asked_for(two_gpus):
    for threads, watched in ((None, True), (False, False), (True, False)):
        with parallel.TensorParallel(two_gpus, threads=threads) as group:
            assert group.executor.watches == watched


def test_what_reads_a_sum_after_the_next_has_arrived(two_gpus, rng):
    """The second sum does not depend on the first: it may be there before all that reads the first is computed."""
    w = (rng.standard_normal((DIM, DIM)) / 8).astype(np.float32)
    with parallel.TensorParallel(two_gpus) as group:
        whole = group.weight(w)

        def run(rank, x):
            first = rank.all_reduce(ops.scale(x, 2.0))
            late = first
            second = rank.all_reduce(ops.scale(x, 3.0))
            for _ in range(20):
                late = ops.linear(late, whole[rank])
            third = rank.all_reduce(ops.scale(x, 5.0))
            return ops.add(late, first), second, third

        f = group.compile(run)
        x = rng.standard_normal((1, DIM)).astype(np.float32)
        f(x)
        late = 4 * x.astype(np.float64)
        for _ in range(20):
            late = late @ w.T
        for _ in range(5):
            got = f(x)
            assert relative_error(got[0], late + 4 * x) < 1e-2
            np.testing.assert_array_equal(got[1], 6 * x)
            np.testing.assert_array_equal(got[2], 10 * x)


def test_sums_that_cannot_be_seen_to_arrive(two_gpus, rng):
    """Operations that may write a number twice, and sums of which devices keep their own part."""
    w = rng.standard_normal((DIM, DIM)).astype(np.float32) / 8
    with parallel.TensorParallel(two_gpus) as group:
        whole = group.weight(w)
        norms = group.compile(lambda rank, x: rank.all_reduce(ops.rms_norm(ops.linear(x, whole[rank]), 1e-5)))
        products = group.compile(lambda rank, x: rank.all_reduce(ops.linear(x, whole[rank])))
        for rows in (2, 300):
            x = rng.standard_normal((rows, DIM)).astype(np.float32)
            want = x.astype(np.float64) @ w.T
            assert relative_error(products(x), 2 * want) < 2e-3
            scale = np.sqrt((want * want).mean(-1, keepdims=True) + 1e-5)
            assert relative_error(norms(x), 2 * want / scale) < 2e-3
        assert [p.arrivals is None for p in (*products.programs, *norms.programs)] == [False, True, True, True]


def test_numbers_that_look_as_if_they_had_not_arrived(two_gpus, monkeypatch):
    monkeypatch.setattr(_arrivals, "_PATIENCE", 0.05)
    x = np.arange(DIM, dtype=np.float32)
    x.view(np.uint32)[[3, -1]] = _arrivals._UNWRITTEN
    with parallel.TensorParallel(two_gpus) as group:
        f = group.compile(lambda rank, x: rank.all_reduce(ops.scale(x, 2.0)))
        f(x)
        (program,) = f.programs
        for _ in range(2):
            np.testing.assert_array_equal(f(x), 4 * x)
        assert program.arrivals.late in (0, 2)  # 0 where a device changes the bits of a NaN


def test_arrivals():
    places = [np.zeros(5, np.uint32) for _ in range(2)]
    arrivals = _arrivals.Arrivals([places, places])
    arrivals.clear(1)
    arrivals.clear(2)  # there is none
    assert all((place == _arrivals._UNWRITTEN).all() for place in places)
    waited = []

    def write():
        for place in places:
            for i in (4, 0, 1, 3, 2):
                place[i] = i

    writer = threading.Timer(0.005, write)
    writer.start()
    arrivals.wait(1, lambda: waited.append(1) or writer.join())
    assert [place.tolist() for place in places] == 2 * [[0, 1, 2, 3, 4]]
    assert len(waited) == arrivals.late <= 1  # the timer may come late
    places[0][2] = _arrivals._UNWRITTEN
    arrivals.wait(0, lambda: waited.append(2))
    assert waited[-1] == 2
    arrivals.wait(2, lambda: waited.append(3))
    assert waited[-1] == 2
    before = arrivals.patience
    for _ in range(3):
        arrivals.wait(0, lambda: waited.append(4))
    assert arrivals.patience == before / 64
    places[0][2] = 0
    for _ in range(20):
        arrivals.wait(0, lambda: waited.append(5))
    assert waited[-3:] == [4, 4, 4]
    assert arrivals.patience == _arrivals._PATIENCE


def test_three_gpus_and_halves():
    need(("Vulkan0", "Vulkan1"))
    code = """
        import sys
        import numpy as np
        from tests.support import relative_error
        from tests.parallel.test_tensor_parallel import Blocks, parallel
        rng = np.random.default_rng(0)
        blocks = Blocks(rng)
        for half_above, most, least in ((None, 2e-3, 0), (1000, 3e-3, 0)):
            with parallel.TensorParallel(["Vulkan0", "Vulkan1", "Vulkan2"], half_above=half_above) as group:
                f = blocks.network(group)
                x = rng.standard_normal((12, 64)).astype(np.float32)
                got, want = f(x)[0], blocks.expected(x)[0]
                assert relative_error(got, want) < most, relative_error(got, want)
                assert group.executor.computed == [4, 4, 4]
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


def test_what_earlier_steps_computed_stays(rng):
    """A result of the first step that the last one uses, views of it too; one partial sum that is used again."""
    a = rng.standard_normal((8, DIM)).astype(np.float32)
    with Ranks() as group:
        w = group.weight(np.eye(DIM, dtype=np.float32), COLUMNS)

        def run(rank, x):
            kept = ops.scale(x, 3.0)
            lower = ops.view(kept, (4, DIM), offset=4 * DIM * 4)
            half = ops.view(x, (8, DIM // 2), strides=(4 * DIM, 4), offset=rank.index * DIM * 2)
            partial = ops.linear(ops.cont(half), w[rank])
            total = rank.all_reduce(partial)
            for _ in range(4):
                total = rank.all_reduce(ops.scale(ops.sqrt(ops.sqr(total)), 0.5))
            return ops.add(total, kept), lower, rank.all_gather(partial, 0), partial

        total, lower, partials, first = group.compile(run)(a)
        np.testing.assert_allclose(total, np.abs(a) + 3 * a, rtol=1e-5)
        np.testing.assert_array_equal(lower, (3 * a)[4:])
        np.testing.assert_allclose(partials[:8] + partials[8:], a, rtol=1e-6)
        np.testing.assert_array_equal(first, partials[:8])


@pytest.mark.parametrize("threads", [False, True])
def test_a_last_step_that_only_the_first_rank_has(threads, rng):
    x = rng.standard_normal((2, 4)).astype(np.float32)
    with Ranks(3, threads=threads) as group:
        f = group.compile(lambda rank, x: rank.all_reduce(ops.scale(x, 2.0)))
        for _ in range(3):
            np.testing.assert_allclose(f(x), 6 * x, rtol=1e-6)
        assert group.executor.computed == [6, 3, 3]
        alone = group.compile(lambda rank, x: ops.scale(x, 2.0))
        np.testing.assert_array_equal(alone(x), 2 * x)


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


# ---------------------------------------------------------------------- what is refused


def test_devices_that_cannot_share():
    for given_, message in (
        (["CPU", "CPU"], "a device is listed twice: CPU, CPU"),
        ([], "needs a device"),
    ):
        with pytest.raises(ValueError, match=message):
            parallel.TensorParallel(given_)
    with pytest.raises(TypeError, match="put the one device in a list"):
        parallel.TensorParallel("CPU")


def test_the_cpu_beside_a_gpu(two_gpus):
    with pytest.raises(ValueError, match="the CPU cannot share layers with others"):
        parallel.TensorParallel([two_gpus[0], "CPU"])
    with pytest.raises(ValueError, match="a device is listed twice"):
        parallel.TensorParallel([two_gpus[0]] * 2)


def test_a_device_without_host_memory(monkeypatch):
    monkeypatch.setattr(ggml.Buffer, "imported", classmethod(lambda *_: None))
    with pytest.raises(ValueError, match="CPU cannot read and write memory of the host"):
        parallel.TensorParallel(["CPU"])


def test_wrong_functions():
    x = np.ones((2, 4), np.float32)
    with Ranks() as group:
        w = group.weight(np.ones((4, 4), np.float32))
        cases = [
            (lambda rank, x: rank.all_reduce(ops.cast(x, "f16")), ValueError, "all_reduce takes contiguous F32"),
            (lambda rank, x: rank.all_reduce(ops.transpose(x)), ValueError, "all_reduce takes contiguous F32"),
            (lambda rank, x: rank.all_reduce(3), TypeError, "all_reduce takes a tensor, not int"),
            (lambda rank, x: rank.all_gather(3), TypeError, "all_gather takes a tensor, not int"),
            (lambda rank, x: rank.all_gather(x, 2), ValueError, "has no axis 2"),
            (lambda rank, x: 3, TypeError, "the function returned 3: tensors are needed"),
            (lambda rank, x: ops.scale(w[rank], 2.0), ValueError, "is no result that rank 0 could give"),
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


def test_programs_are_kept_and_dropped():
    with Ranks(1) as group:
        f = group.compile(lambda rank, x: ops.scale(x, 2.0))
        for n in range(1, 20):
            f(np.ones(n))
        assert len(f.programs) == 16
        last = f.programs[-1]
        assert f.trace(np.ones(19)) is last
        assert repr(last) == "<ParallelProgram of 1 steps on 1 devices, [2] nodes>"
        f.clear()
        assert not f.programs
        assert f(np.ones(3, np.float32)).tolist() == [2, 2, 2]


# ---------------------------------------------------------------------- cutting


def test_share_out():
    assert split_evenly(8, 2) == (4, 4)
    assert split_evenly(3, 2) == (1, 2)
    assert split_evenly(9, 4) == (2, 2, 2, 3)
    assert split_evenly(7, 2, whole=2) == (4, 3)
    with pytest.raises(ValueError, match="the heads has 3 parts that stay whole, 2 at a time: too few for 3 devices"):
        split_evenly(3, 3, "the heads", whole=2)


@pytest.mark.parametrize(
    ("dtype", "shape", "cut", "shapes"),
    [
        ("f32", (6, 4), MIRROR, [(6, 4), (6, 4)]),
        ("f32", (5, 4), ROWS, [(2, 4), (3, 4)]),
        ("f16", (6, 4), ROWS.of(1, 2), [(2, 4), (4, 4)]),
        ("f32", (2, 5), COLUMNS, [(2, 2), (2, 3)]),
        ("q8_0", (3, 96), COLUMNS, [(3, 32), (3, 64)]),
        ("q4_k", (2, 1024), COLUMNS.of(3, 1), [(2, 768), (2, 256)]),
        ("q8_0", (4, 32), ROWS, [(2, 32), (2, 32)]),
        ("f32", (7,), ROWS, [(3,), (4,)]),
        ("f32", (4, 2, 3), ROWS, [(2, 2, 3), (2, 2, 3)]),
        ("f32", (4, 2, 4), COLUMNS, [(4, 2, 2), (4, 2, 2)]),
    ],
    ids=str,
)
def test_shard_bytes(dtype, shape, cut, shapes, rng):
    kind = ggml.Type[dtype.upper()]
    raw = ggml.quantize(rng.standard_normal(shape), kind).reshape(-1) if "q" in dtype else None
    if raw is None:
        raw = rng.standard_normal(shape).astype(ggml.dtypes.numpy_dtype(kind)).reshape(-1).view(np.uint8)
    values = lambda data, s: (  # noqa: E731
        ggml.dequantize(data, kind, s) if "q" in dtype else data.view(ggml.dtypes.numpy_dtype(kind)).reshape(s)
    )
    assert cut.shapes(kind, shape, 2) == shapes
    found = [values(data, s) for data, s in zip(shard_bytes(kind, shape, raw, cut, 2), shapes, strict=True)]
    whole = values(raw, shape)
    if cut is MIRROR:
        assert all((part == whole).all() for part in found)
    else:
        np.testing.assert_array_equal(np.concatenate(found, cut.axis), whole)


def test_wrong_cuts():
    kind = ggml.F32
    for cut, dtype, shape, message in (
        (ROWS.of(1, 2, 3), kind, (6, 4), r"shares \(1, 2, 3\) are not one above 0 for each of 2 devices"),
        (ROWS.of(0, 2), kind, (6, 4), "are not one above 0"),
        (ROWS.of(1, 2), kind, (7, 4), "an axis of 7 cannot be cut 1:2$"),
        (COLUMNS.of(1, 3), ggml.Q4_K, (2, 512), r"cannot be cut 1:3 into whole blocks of 256 \(Q4_K\)"),
        (COLUMNS, ggml.Q8_0, (2, 32), r"Q8_0 \(2, 32\) has 1 parts that stay whole: too few for 2 devices"),
        (ROWS, kind, (), "a tensor of no axes cannot be cut"),
    ):
        with pytest.raises(ValueError, match=message):
            cut.spans(dtype, shape, 2)
    with Ranks() as group, pytest.raises(ValueError, match=r"^a\.down: F32 \(4, 1\) has 1 parts"):
        group.weights({"a.down": np.ones((4, 1), np.float32)}, {"*.down": COLUMNS})


def test_rules():
    rules = {"*.up": ROWS, "a.*": COLUMNS}
    assert [spec_for(name, rules) for name in ("a.up", "a.down", "b.down")] == [ROWS, COLUMNS, MIRROR]


def test_weights_from_a_file(tmp_path, rng):
    from tests.support import gguf_writer

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


def test_parts_of_one_row_are_put_together_in_place(rng):
    w = rng.standard_normal((128, 32)).astype(np.float32)
    with Ranks() as group:
        parts = group.weight(w, ROWS)
        head = group.compile(lambda rank, x: rank.all_gather(ops.linear(x, parts[rank])))
        for n in (1, 3):
            x = rng.standard_normal((n, 32)).astype(np.float32)
            assert relative_error(head(x), x.astype(np.float64) @ w.T.astype(np.float64)) < 1e-5
            program = head.programs[-1]
            assert np.shares_memory(program.result(), program.takes[0][1]) == (n == 1)


@pytest.mark.parametrize("n", [1, 2])
def test_what_is_done_meanwhile(rng, n):
    w = rng.standard_normal((8, 8)).astype(np.float32)
    called = []
    with Ranks(n) as group:
        kept = group.weight(w)
        product = group.compile(lambda rank, x: ops.linear(x, kept[rank]))
        product(np.eye(8, dtype=np.float32))
        program = product.programs[-1]
        program.puts[0][...] = 2 * np.eye(8)
        program.compute(lambda: called.append(1))
        np.testing.assert_allclose(program.result(), 2 * w.T, rtol=1e-5)
        assert called == [1]
        with pytest.raises(KeyboardInterrupt):
            program.compute(_interrupt)
        program.compute()  # and it goes on
        np.testing.assert_allclose(program.result(), 2 * w.T, rtol=1e-5)


def _interrupt():
    raise KeyboardInterrupt


# ---------------------------------------------------------------------- pieces of machinery


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30), st.integers(0, 9)), max_size=30).map(
        lambda found: sorted(found, key=lambda piece: piece[1])
    )
)
@settings(max_examples=200, deadline=None)
def test_pieces_of_memory_in_use_at_once_do_not_overlap(found):
    sizes = [256 * size for size, _, _ in found]
    spans = [(first, first + length) for _, first, length in found]
    offsets, total = arrange(sizes, spans)
    for i, (a, (first, last)) in enumerate(zip(offsets, spans, strict=True)):
        assert a % 256 == 0
        assert a + sizes[i] <= total
        for j in range(i):
            if spans[j][0] <= last and first <= spans[j][1]:
                assert offsets[j] + sizes[j] <= a or a + sizes[i] <= offsets[j]


def test_memory_is_used_again():
    spans = [(k, k + 1) for k in range(50)]
    assert arrange([256] * 50, spans)[1] == 512


@pytest.mark.parametrize("n", [1, 2, 3])
def test_barrier(n):
    barrier, rounds = Barrier(n), 20
    at = [0] * n

    def run(who):
        for k in range(rounds):
            at[who] = k + 1
            barrier.wait(who, k)
            assert min(at) >= k + 1
        seen.append(who)

    seen = []
    for _ in range(2):
        made = [threading.Thread(target=run, args=(who,)) for who in range(n)]
        for thread in made:
            thread.start()
        for thread in made:
            thread.join()
        at[:] = [0] * n
    assert sorted(seen) == sorted([*range(n)] * 2)


def test_levels():
    """Products beside one another, what is computed as one together, views behind what they are of."""
    with ggml.Context() as ctx:
        x, w = ctx.new_tensor("f32", (1, 64)), ctx.new_tensor("f32", (64, 64))
        cache, rows = ctx.new_tensor("f16", (8, 64)), ctx.new_tensor("i64", (1,))
        positions = ctx.new_tensor("i32", (1,))
        h = ops.mul(ops.rms_norm(x), ctx.new_tensor("f32", (64,)))
        q, k, v = (ops.reshape(ops.linear(h, w), (1, 2, 32)) for _ in range(3))
        q, k = (ops.rope_ext(t, positions, n_dims=32) for t in (q, k))
        written = ops.set_rows(cache, ops.view(k, (1, 64)), rows)
        with ggml.Graph(
            ops.add(ops.add(ops.view(q, (1, 64)), ops.get_rows(written, positions)), ops.view(v, (1, 64)))
        ) as g:
            before = g.node_pointers()
            order = levels(before)
            assert sorted(map(hash, order)) == sorted(map(hash, before))
            place = {p: i for i, p in enumerate(order)}
            for p in order:
                assert all(place[q] < place[p] for q in p.src if q in place)
            names = [ggml.Op(p.op).name for p in order if ggml.Op(p.op).name not in ("RESHAPE", "PERMUTE")]
            assert names[:5] == ["RMS_NORM", "MUL", "MUL_MAT", "MUL_MAT", "MUL_MAT"]
            i = names.index("SET_ROWS")
            assert names[i - 2 : i] == ["ROPE", "VIEW"]
            assert names[-2:] == ["ADD", "ADD"]
        assert all(a != b for a, b in pairwise(order))
