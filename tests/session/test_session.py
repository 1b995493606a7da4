"""Sessions: their devices, their weights, and their closing."""

import gc
import threading
import warnings

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import gguf_writer, relative_error
from tests.support.other_arrays import Bfloat16, OnlyDLPack, Parameter


def test_weights_are_stored_in_the_type_that_is_asked_for(session, tmp_path, rng):
    values = rng.standard_normal((4, 64)).astype(np.float32)
    for dtype, error in ((None, 1e-7), ("f16", 1e-3), (ggml.Q8_0, 1e-2), ("q4_0", 0.12)):
        w = session.weight(values, dtype=dtype, name="w")
        assert w.name == "w"
        assert relative_error(w.numpy(), values) < error
    assert session.weight(values.astype(np.float64)).dtype is ggml.F32
    assert session.weight(np.arange(3, dtype=np.int32)).dtype is ggml.I32
    path = gguf_writer.write(tmp_path / "w.gguf", {"general.architecture": "none"}, {"w": (ggml.F32, values)})
    with ggml.GGUFFile(path) as file:
        assert repr(file["w"]) == "<GGUFTensor w F32 (4, 64)>"
        stored = session.weight(file["w"])
        half = session.weight(file["w"], dtype="f16")
        with pytest.raises(KeyError, match="no tensor 'v'"):
            file["v"]
    np.testing.assert_array_equal(stored.numpy(), values)
    assert half.dtype is ggml.F16
    assert session.weight(np.zeros((0, 3))).shape == (0, 3)


def test_objects_that_only_speak_dlpack_are_accepted(session):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    w = session.weight(OnlyDLPack(values))
    np.testing.assert_array_equal(w.numpy(), values)
    f = session.compile(lambda x: ggml.scale(x, 2.0))
    np.testing.assert_array_equal(f(OnlyDLPack(values)), 2 * values)


@pytest.mark.parametrize("shape", [(2, 3), (3,), (0, 3), ()])
def test_bfloat16_arrays_enter_without_loss(session, shape):
    values = np.full(shape, -1.5, np.float32)
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(Bfloat16(values))  # the reason for our own reader
    w = session.weight(Bfloat16(values))
    assert w.dtype is ggml.BF16
    np.testing.assert_array_equal(w.numpy(), values)
    w.set(Bfloat16(values * 2))
    np.testing.assert_array_equal(w.numpy(), values * 2)
    f = session.compile(lambda x, y: {"doubled": ggml.scale(x, 2.0), "sum": x + y})
    got = f(Bfloat16(values), [Bfloat16(values)][0])
    np.testing.assert_array_equal(got["doubled"], 2 * values)
    np.testing.assert_array_equal(got["sum"], 2 * values)
    assert got["sum"].dtype == np.float32
    assert len(f.programs) == 1
    f(values, values)
    assert len(f.programs) == 1  # the same program as for float32


def test_arrays_that_require_gradients_enter_as_constants(session):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    w = session.weight(Parameter(values))
    assert w.dtype is ggml.F32
    np.testing.assert_array_equal(w.numpy(), values)
    np.testing.assert_array_equal(session.compile(lambda x: x * 2)(Parameter(values)), 2 * values)
    np.testing.assert_array_equal(session.compile(lambda x: x + Parameter(values))(values), 2 * values)
    np.testing.assert_array_equal(session.compile(lambda x: x @ w.T)(Parameter(Bfloat16(values))), values @ values.T)
    assert session.weight(Parameter(Bfloat16(values))).dtype is ggml.BF16


def test_operations_run_on_the_device_of_their_weights(two_gpus, rng):
    x = rng.standard_normal((2, 32))
    with ggml.Session() as session:
        names = [d.name for d in session.devices]  # with GPUs of other backends, if there are
        assert (names[:2], names[-1]) == (list(two_gpus), "CPU")
        a, b = (rng.standard_normal((32, 32)) for _ in range(2))
        wa, wb = session.weight(a, on=two_gpus[0]), session.weight(b, on=session.devices[1])
        f = session.compile(lambda x: ggml.linear(ggml.linear(x, wa), wb))
        assert relative_error(f(x), x @ a.T @ b.T) < 5e-3
        splits = f.trace(x).scheduler.splits
        assert [s.backend.name for s in splits] == list(two_gpus)
        message = f"'Vulkan9' is not one of this session's devices: {', '.join(names)}"
        with pytest.raises(ValueError, match=message):
            session.weight(a, on="Vulkan9")


def test_a_state_written_in_place_is_kept_from_run_to_run(session):
    total = session.zeros((3,), name="total")
    add = session.compile(lambda x: ggml.add_inplace(total, x))
    for _ in range(3):
        got = add(np.array([1.0, 2.0, 3.0]))
    assert got.tolist() == [3, 6, 9]
    assert total.numpy().tolist() == [3, 6, 9]


def test_a_closed_session_refuses_every_use(devices):
    session = ggml.Session(devices)
    w = session.weight(np.ones(3))
    f = session.compile(lambda x: ggml.add(x, w))
    f(np.ones(3))
    pending = [f.submit(np.ones(3)) for _ in range(3)]
    session.close()
    session.close()
    assert all(p.done() for p in pending)
    for use in (lambda: f(np.ones(3)), lambda: f.submit(np.ones(3)), lambda: session.weight([1.0])):
        with pytest.raises(ggml.ClosedError, match="is closed"):
            use()
    assert repr(session) == "<Session closed>"


def test_sessions_can_be_used_from_several_threads(devices, rng):
    """Two threads for each of two sessions."""
    failures = []
    x = rng.standard_normal((2, 16)).astype(np.float32)

    def work(k, session):
        try:
            w = session.weight(np.full((4, 16), k, np.float32))
            f = session.compile(lambda x: ggml.linear(x, w))
            for _ in range(10):
                np.testing.assert_allclose(f(x), x @ np.full((16, 4), k), rtol=1e-2, atol=1e-2)
        except BaseException as error:
            failures.append(error)

    with ggml.Session(devices) as one, ggml.Session(devices) as two:
        threads = [threading.Thread(target=work, args=(k, (one, two)[k % 2])) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not failures, failures


def test_a_session_that_is_never_closed_warns_and_is_freed(devices):
    session = ggml.Session(devices)
    f = session.compile(lambda x: ggml.scale(x, 2.0))
    f(np.ones(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del session, f
        gc.collect()
    assert {w.category for w in caught} == {ResourceWarning}


def test_one_device_needs_no_list(devices):
    first, last = ggml.devices()[0], ggml.devices()[-1]
    for one, names in (("cpu", ["CPU"]), (last, ["CPU"]), (devices[0], list(dict.fromkeys([devices[0], "CPU"])))):
        with ggml.Session(one) as session:
            assert [d.name for d in session.devices] == names
    with ggml.Session(0) as session:
        assert session.devices[0] == first
    report = ggml.plan(lambda s: s.compile(lambda x: x + 1), np.ones(3), devices="CPU")
    assert [d.device for d in report.devices] == ["CPU"]


def test_wrong_arguments_are_refused(session):
    with pytest.raises(TypeError, match="compile takes a function, not int"):
        session.compile(3)
    with pytest.raises(ValueError, match="max_programs must be at least 1"):
        ggml.Session(max_programs=0)
    with pytest.raises(TypeError, match="a device is given by its name, position or Device object, not 1"):
        ggml.Session([1.5])
    with pytest.raises(ValueError, match="no device 'Nope'"):
        ggml.Session(["Nope"])
