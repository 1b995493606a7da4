"""Workers: calls, streams, futures, restarts and closing."""

import asyncio
import gc
import os
import threading
import time
import warnings

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.isolate import Stream, Worker
from ggml_cffi.isolate.process import WorkerProcess
from tests.support import isolated, llama_float64, relative_error


def test_attributes_are_called_by_name(worker):
    assert worker.call("n") == 7
    assert worker.call("same", 1) == worker.same(1) == 1
    assert worker.same(1, 2) == (1, 2)
    assert worker.call("kept.__len__") == 0
    with pytest.raises(TypeError, match="'n' is a int, which cannot be called"):
        worker.n(1)
    with pytest.raises(AttributeError, match="'Things' object has no attribute 'nothing'"):
        worker.nothing()
    with pytest.raises(AttributeError, match="_ipython_display_"):
        worker._ipython_display_  # noqa: B018
    assert repr(worker).startswith("<Worker 'things ")
    assert repr(worker.same).startswith("<'same' of <Worker 'things ")


def test_a_dict_of_local_functions_is_called_by_its_keys():
    factor = 3
    table = np.arange(5000)

    def make(offset):
        return {"f": lambda x: factor * x + offset, "table": table, "which": type("Local", (), {"x": 5})}

    with Worker(make, 4) as worker:
        assert worker.f(2) == 10
        np.testing.assert_array_equal(worker.table(), table)
        assert worker.call("which").x == 5
        with pytest.raises(AttributeError, match="there is no 'g'; there are f, table, which"):
            worker.g()
        with pytest.raises(AttributeError, match="there is no '__call__'"):
            worker()


def test_make_may_be_named_and_get_environment_variables():
    with Worker("tests.support.isolated:things", env={"GGML_CFFI_TEST": "here"}, name="mine") as worker:
        assert worker.env("GGML_CFFI_TEST") == "here"
        assert "GGML_CFFI_TEST" not in os.environ
        assert worker.name == "mine"
        assert worker.pid == worker.call("pid") != os.getpid()


def test_a_context_manager_is_entered_and_left(tmp_path):
    from contextlib import contextmanager

    left = tmp_path / "left"

    @contextmanager
    def make():
        yield lambda x: 2 * x
        left.touch()

    with Worker(make) as worker:
        assert worker(4) == 8
        assert not left.exists()
    assert left.exists()


def test_a_session_runs_in_a_worker(devices, rng):
    weight, x = rng.standard_normal((8, 32)), rng.standard_normal((1, 32))

    def make():
        session = ggml.Session(devices)
        w = session.weight(weight)
        return session.compile(lambda x: ggml.linear(x, w))

    with Worker(make) as worker:
        assert relative_error(worker(x), x @ weight.T) < 5e-3
        assert relative_error(worker.submit("__call__", x).result(), x @ weight.T) < 5e-3
        with pytest.raises(ValueError, match="linear"):
            worker(rng.standard_normal((1, 31)))


def test_a_model_streams_its_tokens(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"], n_threads=1) as model:
        want, logits = list(model.generate_tokens([1, 2], 5, stop_at_end=False)), model.forward([1, 2])
    with Worker(lambda: models.load(path, ["CPU"], n_threads=1)) as worker:
        stream = worker.generate_tokens([1, 2], 5, stop_at_end=False)
        assert isinstance(stream, Stream)
        assert list(stream) == want
        assert worker.call("n_ctx") == 512
        assert relative_error(worker.forward([1, 2]), logits) < 1e-5


def test_a_stream_of_a_model_has_its_attributes_and_methods(smollm2):
    prompt = "The capital of France is"
    with Worker(models.load, smollm2, ["CPU"], "layer", 512) as worker:
        stream = worker.generate(prompt, 3)
        assert (stream.prompt_tokens, stream.token_ids, stream.finish_reason) == (5, [], None)
        first = next(stream)
        assert stream.token_ids == worker.tokenize(first)
        completion = stream.completion()
        assert isinstance(completion, models.Completion)
        assert completion.text == first + ".\n"
        assert completion.finish_reason == stream.finish_reason == "length"
        assert list(stream) == []
        assert worker.chat("Hi", 2).text == "Hello!"
        assert [c.text for c in worker.generate([prompt, prompt], 1).completions()] == [" Paris", " Paris"]

        async def main():
            stream = await worker.generate.run_async(prompt, 2)
            return [piece async for piece in stream]

        assert asyncio.run(main()) == [" Paris", "."]
        with pytest.raises(TypeError, match=r"'agenerate' returns an asynchronous iterator.* as a model's generate"):
            worker.agenerate(prompt, 2)

        with worker.generate(prompt) as stream:
            next(stream)
        assert list(stream) == []
        assert stream.finish_reason == "cancelled"
        # Another thread ends a stream, also during the prompt, and while a method reads it to its end.
        for read in (list, lambda stream: stream.completion()):
            stream = worker.generate(100 * (prompt + " "))
            reader = threading.Thread(target=read, args=(stream,))
            reader.start()
            stream.cancel()
            reader.join()
            assert (stream.cancelled, stream.finish_reason) == (True, "cancelled")
            with pytest.raises(AttributeError, match="colour"):
                _ = stream.colour
    stream.cancel()  # of a worker that is closed


def test_a_stream_without_a_cancel_of_its_own_ends_after_its_item(worker):
    stream = worker.count(10**9)
    next(stream)
    stream.cancel()
    assert list(stream) == []
    before = worker.n_closed()
    stream.close()
    assert worker.n_closed() == before + 1


def test_streams_compute_each_item_on_demand(worker):
    before = worker.n_closed()
    one, two = worker.count(3), worker.count(3)
    assert [next(one)[0], next(two)[0], next(one)[0], worker.same(9), next(two)[0]] == [0, 0, 1, 9, 1]
    one.close()
    one.close()
    assert worker.n_closed() == before + 1
    assert list(one) == []
    assert [piece[0] for piece in two] == [2]
    assert list(two) == []
    assert worker.n_closed() == before + 2
    forgotten = worker.count(3)
    next(forgotten)
    del forgotten
    gc.collect()
    worker.same(1)
    assert worker.n_closed() == before + 3
    failing = worker.count(3, 1)
    next(failing)
    with pytest.raises(ValueError, match="enough"):
        next(failing)
    assert list(failing) == []


def test_calls_can_be_submitted_and_awaited(worker):
    pending = [worker.submit("same", i) for i in range(5)]
    assert [p.result() for p in pending] == list(range(5))
    assert worker.same.submit(8).result() == 8

    async def main():
        slow = asyncio.create_task(worker.sleep.run_async(0.1))
        dropped = asyncio.create_task(worker.run_async("keep", 1))
        await asyncio.sleep(0.02)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        return await slow, await worker.run_async("n")

    kept = len(worker.kept_sums())
    assert asyncio.run(main()) == (0.1, 7)
    assert len(worker.kept_sums()) == kept


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="make must be a function, or the name of one, not int"):
        Worker(3)
    with pytest.raises(ValueError, match="restarts must be at least 0, not -1"):
        Worker(isolated.things, restarts=-1)
    with pytest.raises(ValueError, match="start_timeout must be more than 0 seconds, not 0"):
        Worker(isolated.things, start_timeout=0)


def test_a_process_killed_between_calls_is_noticed_and_replaced():
    with Worker(isolated.things) as worker:
        os.kill(worker.pid, 9)
        while worker.alive:
            time.sleep(0.01)
        with pytest.raises(ggml.BackendCrashedError, match=r"SIGKILL between two calls\. It wrote nothing before"):
            worker.same(1)
    with Worker(isolated.things, restarts=1) as worker:
        os.kill(worker.pid, 9)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        assert worker.alive
        assert worker.same(1) == 1


def test_a_worker_with_restarts_replaces_processes_that_crash(caplog):
    with Worker(isolated.Crashes, 5, restarts=2) as worker:
        for _ in range(2):
            crash, waiting = worker.submit("abort"), worker.submit("restored")
            with pytest.raises(ggml.BackendCrashedError, match="SIGABRT during 'abort'"):
                crash.result()
            assert waiting.result() == 5
        assert worker.alive
        with pytest.raises(ggml.BackendCrashedError, match="during 'abort'"):
            worker.abort()
        assert not worker.alive
        with pytest.raises(ggml.BackendCrashedError, match="during 'abort'"):
            worker.restored()
    replaced = [r.getMessage() for r in caplog.records if "is replaced" in r.getMessage()]
    assert len(replaced) == 2
    assert "was killed by SIGABRT during 'abort', and is replaced" in replaced[0]


def test_a_stream_ends_with_its_process():
    with Worker(isolated.things) as worker:
        stream = worker.count(3)
        next(stream)
        worker.restart()
        with pytest.raises(ggml.BackendCrashedError, match=r"was ended by restart\(\)"):
            next(stream)
        stream.close()
        assert worker.same(1) == 1


def test_a_restart_that_fails_can_be_repeated(tmp_path):
    flag = tmp_path / "flag"

    def make():
        if flag.exists():
            raise ValueError("the flag is set")
        return {"f": lambda: 1}

    with Worker(make) as worker:
        flag.touch()
        with pytest.raises(ValueError, match="the flag is set"):
            worker.restart()
        with pytest.raises(ggml.BackendCrashedError, match=r"could not call make: ValueError: the flag is set"):
            worker.f()
        flag.unlink()
        worker.restart()
        assert worker.f() == 1


def wait_until_running(flag):
    """Wait until the function that makes the file ``flag`` runs in a worker."""
    while not flag.exists():
        time.sleep(0.01)


def test_close_ends_a_call_that_hangs(tmp_path):
    worker = Worker(isolated.Crashes)
    running, waiting = worker.submit("hang", tmp_path / "flag"), worker.submit("same", 1)
    wait_until_running(tmp_path / "flag")
    worker.close(timeout=0.1)
    with pytest.raises(ggml.ClosedError, match=r"the worker 'Crashes \d+' \(process \d+\) was closed"):
        running.result()
    assert waiting.cancelled()
    worker.close()


def test_close_during_a_restart_leaves_no_process(monkeypatch):
    worker, started, closing = Worker(isolated.things), [], []

    def start(*args):
        closing.append(threading.Thread(target=worker.close))
        closing[0].start()
        while "closed" not in repr(worker):
            time.sleep(0.001)
        started.append(WorkerProcess(*args))
        return started[0]

    monkeypatch.setattr("ggml_cffi.isolate.worker.WorkerProcess", start)
    worker.restart()
    closing[0].join()
    assert started[0].ended


def test_close_waits_for_the_running_call(tmp_path):
    worker = Worker(isolated.things)
    running = worker.submit("sleep", 0.3, tmp_path / "flag")
    wait_until_running(tmp_path / "flag")
    worker.close(timeout=60)
    assert running.result() == 0.3


def test_a_closed_worker_cannot_be_used():
    worker = Worker(isolated.things)
    stream, remote = worker.count(3), worker.same
    next(stream)
    worker.close()
    worker.close()
    uses = (
        lambda: worker.same(1),
        lambda: remote(1),
        lambda: worker(1),
        lambda: worker.submit("same", 1),
        lambda: next(stream),
        worker.restart,
    )
    for use in uses:
        with pytest.raises(ggml.ClosedError, match=r"the worker 'things \d+' is closed"):
            use()
    assert not worker.alive
    assert repr(worker).endswith("closed>")


def test_a_worker_that_is_never_closed_warns_and_is_ended():
    worker = Worker(isolated.things)
    pid = worker.pid
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del worker
        gc.collect()
    assert [str(w.message)[:14] for w in caught] == ["Worker 'things"]
    assert not os.path.exists(f"/proc/{pid}")
