"""Sessions: their devices, their weights, and their closing."""

import gc
import threading
import warnings

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import gguf_writer, relative_error


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


class OnlyDLPack:
    """An array that offers DLPack and no other protocol."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_objects_that_only_speak_dlpack_are_accepted(session):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    w = session.weight(OnlyDLPack(values))
    np.testing.assert_array_equal(w.numpy(), values)
    f = session.compile(lambda x: ggml.scale(x, 2.0))
    np.testing.assert_array_equal(f(OnlyDLPack(values)), 2 * values)


def test_operations_run_on_the_device_of_their_weights(two_gpus, rng):
    x = rng.standard_normal((2, 32))
    with ggml.Session() as session:
        assert [d.name for d in session.devices] == [*two_gpus, "CPU"]
        a, b = (rng.standard_normal((32, 32)) for _ in range(2))
        wa, wb = session.weight(a, on=two_gpus[0]), session.weight(b, on=session.devices[1])
        f = session.compile(lambda x: ggml.linear(ggml.linear(x, wa), wb))
        assert relative_error(f(x), x @ a.T @ b.T) < 5e-3
        splits = f.trace(x).scheduler.splits
        assert [s.backend.name for s in splits] == list(two_gpus)
        with pytest.raises(ValueError, match="'Vulkan9' is not one of this session's devices: Vulkan0, Vulkan1, CPU"):
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


def test_wrong_arguments_are_refused(session):
    with pytest.raises(TypeError, match="compile takes a function, not int"):
        session.compile(3)
    with pytest.raises(ValueError, match="max_programs must be at least 1"):
        ggml.Session(max_programs=0)
    with pytest.raises(TypeError, match="put the one device in a list"):
        ggml.Session("CPU")
    with pytest.raises(ValueError, match="no device 'Nope'"):
        ggml.Session(["Nope"])
