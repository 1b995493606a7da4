"""ggml's meta device: several GPUs as one."""

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import ops
from ggml_cffi.parallel import COLUMNS, MIRROR, ROWS
from ggml_cffi.parallel.meta import MIRRORED, PARTIAL, MetaDevice, State, spread
from tests.support import relative_error

DIM, FF = 64, 96


def blocks(device, rng):
    """Return a function of arrays with two gated feed-forward blocks, and the same function in float64."""
    values = {"norm": rng.uniform(0.5, 1.5, DIM)}
    for i in range(2):
        values |= {f"{i}.{x}": rng.standard_normal((FF, DIM)) / 8 for x in ("gate", "up")}
        values[f"{i}.down"] = rng.standard_normal((DIM, FF)) / 10
    values = {name: v.astype(np.float32) for name, v in values.items()}
    w = device.weights(values, {"*.gate": ROWS, "*.up": ROWS, "*.down": COLUMNS})

    def run(x):
        for i in range(2):
            h = ops.mul(ops.rms_norm(x, 1e-5), w["norm"])
            h = ops.swiglu_split(ops.linear(h, w[f"{i}.gate"]), ops.linear(h, w[f"{i}.up"]))
            x = ops.add(x, ops.linear(h, w[f"{i}.down"]))
        return x

    def expected(x):
        v = {name: array.astype(np.float64) for name, array in values.items()}
        x = np.asarray(x, np.float64)
        for i in range(2):
            h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * v["norm"]
            gate = h @ v[f"{i}.gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ v[f"{i}.up"].T)) @ v[f"{i}.down"].T
        return x

    return device.compile(run), expected


@pytest.mark.parametrize("n", [1, 2])
def test_devices_agree_with_one_device(two_gpus, n, rng):
    with MetaDevice(two_gpus[:n]) as device:
        f, expected = blocks(device, rng)
        for _ in range(3):  # ggml keeps some state from run to run
            for rows in (1, 12):
                x = rng.standard_normal((rows, DIM)).astype(np.float32)
                assert relative_error(f(x), expected(x)) < 2e-3
        half = FF // n
        states = f.spread(np.zeros((1, DIM)))
        assert states.count(PARTIAL) == 2
        assert states.count(State(0, (half,) * n)) == 6
        assert states[-1] is MIRRORED


def test_results_in_parts_and_in_pieces(two_gpus, rng):
    w = rng.standard_normal((8, 6)).astype(np.float32)
    with MetaDevice(two_gpus) as device:
        rows, columns = device.weight(w, ROWS.of(3, 1)), device.weight(w.T, COLUMNS.of(3, 1))
        x = rng.standard_normal((2, 6)).astype(np.float32)
        np.testing.assert_allclose(device.compile(lambda x: ops.linear(x, rows))(x), x @ w.T, atol=1e-2)
        both = device.compile(lambda x: ops.linear(ops.linear(x, rows), columns))
        np.testing.assert_allclose(both(x), x @ w.T @ w, atol=5e-2)


def test_calls_that_would_end_the_process_raise(two_gpus):
    with MetaDevice(two_gpus) as device:
        ff = device.weight(np.ones((8, 4), np.float32), ROWS)
        other = device.weight(np.ones((8, 4), np.float32), ROWS.of(1, 3))
        whole = device.weight(np.ones((4, 8), np.float32), MIRROR)
        x = np.ones((2, 4), np.float32)
        for function in (
            lambda x: ops.rms_norm(ops.linear(x, ff)),
            lambda x: ops.linear(ops.linear(x, ff), whole),
            lambda x: ops.add(ops.linear(x, ff), ops.linear(x, other)),
            lambda x: ops.swiglu(ops.linear(x, ff)),
            lambda x: ops.soft_max(x),
            lambda x: ops.cont(ops.transpose(x)),
        ):
            with pytest.raises(ggml.UnsupportedOpError, match="is not known to work on a meta device"):
                device.compile(function)(x)
        with pytest.raises(TypeError, match="a tensor that it computed is needed"):
            device.compile(lambda x: 3)(x)
        with pytest.raises(ValueError, match="has no elements"):
            device.weight(np.ones((0, 4)), MIRROR)
        f = device.compile(lambda x: ops.scale(x, 2.0))
        assert f(x).tolist() == (2 * x).tolist()
    with pytest.raises(ggml.ClosedError, match="this MetaDevice is closed"):
        f(x)
    with pytest.raises(ggml.ClosedError, match="this MetaDevice is closed"):
        device.weight(x, MIRROR)


def test_weights_that_do_not_fit_raise(two_gpus, monkeypatch):
    with MetaDevice(two_gpus) as device:
        monkeypatch.setattr(ggml.Device, "memory", lambda self: ggml.Memory(1000, 1000))
        with pytest.raises(ggml.OutOfMemoryError, match=f"{two_gpus[0]} has 1,000 bytes free, too few for 32"):
            device.weight(np.ones((4, 4), np.float16), COLUMNS.of(1, 1), dtype="f32")


def test_impossible_groups_of_devices_are_refused():
    for devices, message in (
        (["CPU", "CPU"], "a device is listed twice: CPU, CPU"),
        ("CPU", "ends the process with the CPU as one of its devices"),
        ([], "0 devices; a meta device has 1 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            MetaDevice(devices)


def test_spread_needs_no_device():
    with ggml.Context() as ctx:
        up, down = ctx.new_tensor("f32", (8, 4)), ctx.new_tensor("f32", (4, 8))
        known = {up.ptr: State(1, (4, 4)), down.ptr: State(0, (4, 4))}
        x = ctx.new_tensor("f32", (2, 4))
        with ggml.Graph(ops.add(x, ops.linear(ops.relu(ops.linear(x, up)), down))) as graph:
            found = list(spread(graph, lambda p: known.get(p, MIRRORED)).values())
        assert found == [State(0, (4, 4)), State(0, (4, 4)), PARTIAL, MIRRORED]
