"""Numbers of CPU threads: those of a busy machine."""

from types import SimpleNamespace

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core import threads
from ggml_cffi.core.threads import LoadFollower
from tests.support import relative_error


class Machine:
    """A machine with several processors, on which time passes when it is told to."""

    def __init__(self, monkeypatch, n_processors):
        self.now = self.busy = self.own = 0.0
        monkeypatch.setattr(threads, "allowed_processors", lambda: frozenset(range(n_processors)))
        monkeypatch.setattr(threads, "busy_seconds", lambda _: self.busy)
        clock = SimpleNamespace(perf_counter=lambda: self.now, process_time=lambda: self.own)
        monkeypatch.setattr(threads, "time", clock)

    def run(self, follower, own, others, seconds=0.2):
        """Let time pass in which this process keeps ``own`` processors busy, and others ``others``; then look."""
        self.now += seconds
        self.own += own * seconds
        self.busy += (own + others) * seconds
        return follower.look()


def test_threads_leave_the_processors_that_others_use(monkeypatch):
    machine = Machine(monkeypatch, 2)
    follower = LoadFollower(2)
    assert follower.n_active == 2
    assert machine.run(follower, own=2, others=0) == 2
    assert machine.run(follower, own=1, others=1) == 1  # two busy processes take half of each processor
    assert machine.run(follower, own=0.67, others=1.33) == 1
    assert machine.run(follower, own=1, others=0.1) == 2


def test_the_number_of_threads_does_not_waver(monkeypatch):
    machine = Machine(monkeypatch, 16)
    follower = LoadFollower(16)
    assert machine.run(follower, own=15.6, others=0.4) == 16
    assert machine.run(follower, own=14, others=2) == 14
    assert [machine.run(follower, own=13, others=others) for others in (2.4, 1.6, 2.5)] == [14, 14, 14]
    assert machine.run(follower, own=12, others=4) == 12
    assert machine.run(follower, own=0, others=20) == 1  # a machine that is told to be busier than it can be


def test_threads_beside_free_processors_are_kept(monkeypatch):
    machine = Machine(monkeypatch, 16)
    follower = LoadFollower(4)
    assert machine.run(follower, own=4, others=8) == 4
    assert machine.run(follower, own=4, others=14) == 2


def test_a_system_that_does_not_tell_its_load_and_a_single_thread_are_left_alone(monkeypatch):
    assert LoadFollower(1).next_look == float("inf")
    monkeypatch.setattr(threads, "busy_seconds", lambda _: None)
    assert LoadFollower(2).next_look == float("inf")


def testbusy_seconds_are_those_of_the_processors_of_this_process():
    every = threads.allowed_processors()
    busy = threads.busy_seconds(every)
    if busy is None:
        pytest.skip("this system has no /proc/stat")
    assert busy == pytest.approx(sum(threads.busy_seconds(frozenset([one])) for one in every), abs=1)
    assert threads.busy_seconds(frozenset()) == 0


@pytest.mark.parametrize("n_active", [1, 2, 3])
def test_results_of_fewer_threads_are_right(rng, n_active):
    x, w = rng.standard_normal((64, 256)), rng.standard_normal((128, 256))
    with ggml.Session(["CPU"], n_threads=3) as s:
        f = s.compile(lambda x: ggml.relu(ggml.linear(x, s.weight(w))))
        cpu = s.backends[-1]
        cpu.load.n_active, cpu.load.next_look = 3, 0.0
        for active in (n_active, 3, n_active):
            cpu.load.look = lambda active=active: setattr(cpu.load, "n_active", active)
            assert relative_error(f(x), np.maximum(x @ w.T, 0)) < 1e-5
        assert cpu.n_active_threads == n_active
        assert cpu.n_threads == 3


def test_following_the_load_can_be_turned_off():
    with ggml.Session(["CPU"], n_threads=2) as s:
        cpu = s.backends[-1]
        cpu.load.n_active, cpu.load.next_look = 1, 0.0
        cpu.follows_load = False
        s.compile(lambda x: x + 1)(np.ones(3, np.float32))
        assert cpu.n_active_threads == 2
