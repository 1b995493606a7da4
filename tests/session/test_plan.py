"""Plans of sessions: they agree with the bytes that the session takes once it is open."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest

import ggml_cffi as ggml


def factory(devices, rng):
    """Return a ``make`` function of two matrix products with weights on the first and the last device."""
    w = rng.standard_normal((96, 64)).astype(np.float32), rng.standard_normal((32, 96)).astype(np.float32)

    def make(s):
        up = s.weight(w[0], on=devices[0], dtype="q8_0")
        down = s.weight(w[1], on=devices[-1])
        state = s.zeros((4, 32), on=devices[-1])
        return s.compile(lambda x: ggml.linear(ggml.relu(ggml.linear(x, up)), down) + state)

    return make


def test_the_plan_agrees_with_the_open_session(devices, rng):
    make, x = factory(devices, rng), rng.standard_normal((4, 64))
    plan = ggml.plan(make, x, devices=devices)
    assert [device.device for device in plan.devices] == [*dict.fromkeys([*devices, "CPU"])]
    assert plan.fits
    with ggml.Session(devices) as s:
        compiled = make(s)
        program = compiled.trace(x)
        report = program.scheduler.report()
        for device, backend in zip(plan.devices, s.backends, strict=True):
            memory = report.memory[backend.name]
            # The report counts the state as an input.
            state = 4 * 32 * 4 if backend.name == devices[-1] else 0
            slack = 3 * 256  # each tensor begins at a multiple of the alignment
            assert 0 <= device.weight_bytes - (memory.weights + state) <= slack
            assert 0 <= device.compute_bytes - (memory.compute + memory.inputs - state) <= slack
            assert device.total == device.weight_bytes + device.compute_bytes
            assert compiled.reserve_size(x)[backend.device] == device.compute_bytes
        # Planning leaves the compiled function usable.
        assert compiled(x).shape == (4, 32)


def test_planning_neither_allocates_nor_reads_values(rng, monkeypatch):
    class Lazy(ggml.StoredTensor):
        name, shape, dtype = "w", (1 << 20, 1 << 18), ggml.F16  # half a terabyte

        def raw(self):
            raise AssertionError("the values were read")

        def numpy(self):
            raise AssertionError("the values were read")

    def make(s):
        w = s.weight(Lazy())
        return s.compile(lambda x: x @ w.T)

    plan = ggml.plan(make, np.zeros((1, 1 << 18), np.float32), devices=["CPU"])
    (cpu,) = plan.devices
    assert cpu.weight_bytes == 1 << 39
    assert not plan.fits
    assert "too few" in str(plan)
    assert str(plan).splitlines()[0].split() == ["device", "weights", "compute", "total", "free", "fits"]


def test_a_function_without_a_graph_takes_no_memory():
    plan = ggml.plan(lambda s: s.compile(lambda x: x), np.zeros(4), devices=["CPU"])
    assert plan.devices[-1].total == 0


def test_make_must_return_a_function_of_its_session():
    for wrong in (None, lambda x: x):
        with pytest.raises(TypeError, match="must return a function that the session has compiled"):
            ggml.plan(lambda s, wrong=wrong: wrong, devices=["CPU"])
    with ggml.Session(["CPU"]) as other, pytest.raises(TypeError, match="a function that the session has compiled"):
        ggml.plan(lambda s: other.compile(lambda x: x), devices=["CPU"])
    with pytest.raises(ZeroDivisionError):
        ggml.plan(lambda s: 1 / 0, devices=["CPU"])
    with pytest.raises(ValueError, match="no device"):
        ggml.plan(lambda s: None, devices=["Vulkan99"])


def test_the_example_in_the_docstring_is_right():
    module = importlib.import_module("ggml_cffi.session.plan")  # the package exports a function of this name
    failed, tried = doctest.testmod(module, extraglobs={"np": np})
    assert (failed, tried) == (0, 3)
