"""What a session would take: as much as it takes when it is made."""

from __future__ import annotations

import numpy as np
import pytest

import ggml_cffi as ggml


def maker(devices, rng):
    """Two products, their weights on the first and the last device."""
    w = rng.standard_normal((96, 64)).astype(np.float32), rng.standard_normal((32, 96)).astype(np.float32)

    def make(s):
        up = s.weight(w[0], on=devices[0], dtype="q8_0")
        down = s.weight(w[1], on=devices[-1])
        state = s.zeros((4, 32), on=devices[-1])
        return s.compile(lambda x: ggml.linear(ggml.relu(ggml.linear(x, up)), down) + state)

    return make


def test_planned_as_taken(devices, rng):
    make, x = maker(devices, rng), rng.standard_normal((4, 64))
    plan = ggml.plan(make, x, devices=devices)
    assert [need.device for need in plan.needs] == [*dict.fromkeys([*devices, "CPU"])]
    assert plan.fits
    with ggml.Session(devices) as s:
        compiled = make(s)
        program = compiled.trace(x)
        report = program.scheduler.report()
        for need, backend in zip(plan.needs, s.backends, strict=True):
            memory = report.memory[backend.name]
            state = 4 * 32 * 4 if backend.name == devices[-1] else 0  # an input to the report
            slack = 3 * 256  # each tensor begins at a multiple of the alignment
            assert 0 <= need.weight_bytes - (memory.weights + state) <= slack
            assert 0 <= need.compute_bytes - (memory.compute + memory.inputs - state) <= slack
            assert need.total == need.weight_bytes + need.compute_bytes
            assert compiled.reserve_size(x)[backend.device] == need.compute_bytes
        # The real function still works.
        assert compiled(x).shape == (4, 32)


def test_nothing_is_allocated_or_read(rng, monkeypatch):
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
    (cpu,) = plan.needs
    assert cpu.weight_bytes == 1 << 39
    assert not plan.fits
    assert "too few" in str(plan)
    assert str(plan).splitlines()[0].split() == ["device", "weights", "compute", "total", "free", "fits"]


def test_a_function_without_a_graph():
    plan = ggml.plan(lambda s: s.compile(lambda x: x), np.zeros(4), devices=["CPU"])
    assert plan.needs[-1].total == 0


def test_what_make_may_not_return(rng):
    for wrong in (None, lambda x: x):
        with pytest.raises(TypeError, match="a function that the session has compiled is needed"):
            ggml.plan(lambda s, wrong=wrong: wrong, devices=["CPU"])
    with ggml.Session(["CPU"]) as other, pytest.raises(TypeError, match="a function that the session has compiled"):
        ggml.plan(lambda s: other.compile(lambda x: x), devices=["CPU"])
    with pytest.raises(ZeroDivisionError):
        ggml.plan(lambda s: 1 / 0, devices=["CPU"])
    with pytest.raises(ValueError, match="no device"):
        ggml.plan(lambda s: None, devices=["Vulkan99"])


def test_the_example_in_the_docstring():
    import doctest

    from ggml_cffi.session import plan as session_plan

    failed, tried = doctest.testmod(session_plan, extraglobs={"np": np})
    assert (failed, tried) == (0, 3)
