"""Pipeline stages at work: batches in flight, polled results, steps that are recorded ahead.

These tests look inside the runner, since neither its logits nor its tokens show them: the same numbers come out if each
batch waits for the one before, only later. So the tests watch the calls of stages and programs.
"""

import threading
from concurrent.futures import Future
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.models.runners import even_stages, link, pipeline
from ggml_cffi.models.runners.pipeline import PipelineRunner
from ggml_cffi.models.runners.stage import Stage
from ggml_cffi.models.runners.stage_queue import DeviceThread, _Work
from ggml_cffi.models.runners.weights import Weights
from ggml_cffi.parallel.executors import polling, record_ahead
from ggml_cffi.parallel.program import ParallelProgram
from tests.models.runners.test_shards import batch, opened, run
from tests.support import PATIENCE, llama_float64, relative_error
from tests.support.splits import PROMPT, answers


def test_batches_in_flight_agree_with_batches_in_turn(two_gpus, path, monkeypatch):
    ids = [i % 50 for i in range(200)]
    real = PipelineRunner._start
    seen = []

    def start(self, batch, slot):
        seen.append(len(batch.tokens))
        return real(self, batch, slot)

    monkeypatch.setattr(PipelineRunner, "_start", start)
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        want = model.forward(ids)
        assert not seen
    with models.load(path, two_gpus, "pipeline", n_batch=16) as model:
        np.testing.assert_array_equal(model.forward(ids), want)
        assert sum(seen) == 200
        assert len(seen) == 13
        assert next(model.generate_tokens(ids, 1, stop_at_end=False)) == want[-1].argmax()
        assert len(seen) == 26
    names = ("ggml_cffi stage", "ggml_cffi inputs")
    assert not any(t.name.startswith(names) for t in threading.enumerate())


def test_polling_and_waiting_give_the_same(two_gpus, path, monkeypatch):
    """Compare waiting for the first GPU with polling its result."""
    monkeypatch.setattr(polling, "TIMEOUT", PATIENCE)  # a busy machine is slow
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        runner = model.batchers[0].runner
        first, second = runner.stages
        found = []
        for polling_it in (True, False, True):
            with monkeypatch.context() as patch:
                if not polling_it:
                    patch.setattr(runner, "_run_polling", runner._run_waiting)
                model.clear_cache()
                found.append((answers(model, [PROMPT, PROMPT[:5]], 6), model.forward([3])))
            assert {backend.name for _, backend in model.assignment()} == set(two_gpus)
        assert found[0][0] == found[1][0] == found[2][0]
        np.testing.assert_array_equal(found[0][1], found[1][1])
        # The GPUs finish their work even if the run fails.
        finished = []
        for i, stage in enumerate(runner.stages):
            finish = stage.finish
            monkeypatch.setattr(stage, "finish", lambda i=i, finish=finish, **o: (finished.append((i, o)), finish(**o)))
        for failing in (first, second):
            for method in ("prepare", "run"):
                monkeypatch.setattr(failing, method, raise_interrupt)
                if failing is first and method == "run":
                    model.forward([3])  # it is polled
                else:
                    with pytest.raises(KeyboardInterrupt):
                        model.forward([3])
                assert finished[-2:] == [(1, {"if_free": False}), (0, {"if_free": False})]
                monkeypatch.delattr(failing, method)
        finished.clear()
        np.testing.assert_array_equal(model.forward([3]), found[1][1])
        assert finished == [(i, {"if_free": free}) for i, free in ((0, True), (1, False), (0, False))]


def raise_interrupt(*_args, **_options):
    raise KeyboardInterrupt


def test_a_later_stage_is_recorded_while_the_first_is_computed(two_gpus, path, monkeypatch):
    monkeypatch.setattr(record_ahead, "FIRST_PART", 12)
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        runner = model.batchers[0].runner
        want = answers(model, [PROMPT, PROMPT[:5]], 6)
        first, second = runner.stages
        assert not any(step.deferred for p in first.programs for own in p.steps for step in own)
        ((step,),) = second.programs[-1].steps
        (_, deferred), rest = step.deferred, step.immediate[1::2]
        (graph,) = second.programs[-1].step_graphs[0].graphs
        assert len(graph) > 12 >= sum(t.op not in VIEWS for t in deferred_nodes(graph, deferred)) > 6
        assert sum(len(deferred_nodes(graph, part)) for part in (deferred, *rest)) == len(graph)
        counts, record = [], second.group.executor.record
        note = lambda steps: (counts.append(begun(runner)), record(steps))  # noqa: E731
        monkeypatch.setattr(second.group.executor, "record", note)
        model.clear_cache()
        assert answers(model, [PROMPT, PROMPT[:5]], 6) == want
        assert len(counts) >= 10
        assert all(one == other + 1 for one, other in counts)  # the first stage had begun, the second had not


def begun(runner):
    """Return the number of runs of each stage that have begun."""
    return [stage.group.executor.steps_computed[0] for stage in runner.stages]


def deferred_nodes(graph, pointer):
    """Return the nodes of ``graph`` that a C graph has, without its fillers."""
    own = {t.ptr: t for t in graph.nodes}
    found = [ggml.c.ggml_graph_node(pointer, i) for i in range(ggml.c.ggml_graph_n_nodes(pointer))]
    return [*dict.fromkeys(own[p] for p in found if p in own)]


def test_after_a_timeout_the_device_is_waited_for(two_gpus, path, monkeypatch):
    """The work that was recorded for the next GPU is discarded then, and recorded again."""
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        want = answers(model, [PROMPT, PROMPT[:5]], 12), model.forward([3])
    monkeypatch.setattr(polling, "TIMEOUT", 0.0)
    with models.load(path, two_gpus, "layer", n_batch=16) as model:
        assert answers(model, [PROMPT, PROMPT[:5]], 12) == want[0]
        np.testing.assert_array_equal(model.forward([3]), want[1])
        first, second = model.batchers[0].runner.stages
        assert sum(p.polled_output.n_timeouts for p in first.programs) > 10
        assert any(step.deferred for p in second.programs for own in p.steps for step in own)


def test_inputs_are_written_while_a_batch_is_computed(two_gpus, path, monkeypatch):
    """The inputs of the next batch are in other memory."""
    ids = [i % 50 for i in range(96)]
    write, submit = Stage.write, ParallelProgram.submit
    places, started, changed = [], [], threading.Condition()

    def note_write(self, *args):
        program = write(self, *args)
        with changed:
            places.append(program.program.input_arrays[0].ctypes.data)
            changed.notify_all()
        return program

    def submit_late(self, *args):
        with changed:
            started.append(self)
            if len(started) == 1:
                assert changed.wait_for(lambda: len(places) == 2, timeout=PATIENCE), "the next inputs were not written"
        submit(self, *args)

    with models.load(path, two_gpus[:1], n_batch=16) as model:
        want = model.forward(ids)
        monkeypatch.setattr(Stage, "write", note_write)
        monkeypatch.setattr(ParallelProgram, "submit", submit_late)
        np.testing.assert_array_equal(model.forward(ids), want)
    assert len(set(places)) == 2
    assert all(a != b for a, b in pairwise(places))


def test_leaving_early_waits_for_batches_in_flight(two_gpus, path, monkeypatch):
    """No device computes any more when other sequences get the KV slots."""
    ids = [i % 50 for i in range(96)]
    futures = []
    real = PipelineRunner._start
    monkeypatch.setattr(PipelineRunner, "_start", lambda *args: futures.append(real(*args)) or futures[-1])

    def leave(_done):
        raise KeyboardInterrupt

    with models.load(path, two_gpus, "pipeline", n_batch=16) as model:
        batcher = model.batchers[0]
        with pytest.raises(KeyboardInterrupt) as caught:
            batcher.logits(ids, 96, leave)
        assert len(futures) > 1
        assert all(future.done() for future in futures)
        assert batcher.cache.slots.n_free == len(batcher.cache.slots)
        assert caught.traceback  # it keeps the frames and their objects alive


@pytest.mark.parametrize("exact", [0, 1, 2])
def test_a_stage_reads_the_rows_that_its_link_has(monkeypatch, tmp_path, rng, exact):
    """One stage's graphs have as many rows as a batch has tokens, and those of the other stages may have more."""
    monkeypatch.setattr(pipeline, "check_devices", lambda devices: None)
    monkeypatch.setattr(link, "are_peers", lambda devices: True)
    monkeypatch.setattr(pipeline, "Scheduler", lambda backends: None)  # it takes the CPU only once
    monkeypatch.setattr(Weights, "_is_v_transposed", lambda self, backend, dtype: backend is self.backends[exact])
    path = tmp_path / "model.gguf"
    llama_float64.random_model(path, rng)
    ids = rng.integers(0, 50, 20)
    want = llama_float64.Reference(path).forward(ids)[[12, 13, 19]]
    with opened(path, ["CPU"] * 3, stages=even_stages(3, [(0,), (1,), (2,)]), n_batch=32) as model:
        run(model, rng.integers(0, 50, 32), 0)  # its results stay in the links
        got = [run(model, ids[:13], 0), run(model, ids[13:14], 13), run(model, ids[14:], 14)]
    assert relative_error(np.concatenate(got), want) < 1e-2


@pytest.mark.parametrize("way", ["polling", "waiting"])
def test_the_caller_of_several_stages_works_once(two_gpus, path, monkeypatch, way):
    with opened(path, two_gpus, stages=even_stages(3, [(0,), (1,)])) as runner:
        if way == "waiting":
            monkeypatch.setattr(runner, "_run_polling", runner._run_waiting)
        seen = []
        want = run(runner, [3, 4], 0)
        got = runner.run(batch([3, 4], 0), lambda: seen.append("work"))
        assert seen == ["work"]
        np.testing.assert_array_equal(got, want)


class Devices:
    """A group of one device with events, and the calls that it gets."""

    def __init__(self, monkeypatch, n=1):
        self.calls = []
        self.executor = SimpleNamespace(
            locks=nullcontext(), finish=lambda: self.calls.append("finish"), backends=self.backends(n)
        )
        for name in ("new", "record", "synchronize", "free"):
            found = ggml.c.ffi.cast("ggml_backend_event_t", 1) if name == "new" else None
            note = lambda *args, name=name, found=found: (self.calls.append(name), found)[1]  # noqa: E731
            monkeypatch.setattr(ggml.c, f"ggml_backend_event_{name}", note)
        self.backends = self.executor.backends

    def backends(self, n):
        device = SimpleNamespace(ptr=ggml.c.NULL)
        return [SimpleNamespace(ptr=ggml.c.NULL, device=device, closed=False) for _ in range(n)]


def work(i, result=b"done", *, copied=False, seconds=0.0):
    """Return the work of a batch with the result ``result``."""
    program = SimpleNamespace(submit=lambda: None, result=lambda: result)
    return _Work((i,), SimpleNamespace(program=program, seconds=seconds), Future(), copied)


def test_work_that_comes_when_the_thread_has_ended_leaves_none_behind(monkeypatch):
    devices = Devices(monkeypatch)
    thread = DeviceThread(devices)
    first, late = work(0, seconds=2.0), work(1)
    thread.submit(first)
    thread._thread.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="cannot schedule new futures"):
        thread.submit(late)
    assert first.result.result(timeout=PATIENCE) == b"done"
    thread.close()
    assert devices.calls == ["new", "new", "record", "synchronize", "finish", "free", "free"]


def test_a_result_without_memory_for_a_copy_is_an_error(monkeypatch):
    class Large:
        def copy(self):
            raise MemoryError

    with DeviceThread(Devices(monkeypatch)) as thread:
        failing, following = work(0, Large(), copied=True), work(1)
        for each in (failing, following):
            thread.submit(each)
        assert isinstance(failing.result.exception(timeout=PATIENCE), MemoryError)
        assert following.result.result(timeout=PATIENCE) == b"done"


def test_several_devices_have_no_events_of_a_queue(monkeypatch):
    devices = Devices(monkeypatch, 2)
    DeviceThread(devices).close()
    assert devices.calls == ["finish"]
