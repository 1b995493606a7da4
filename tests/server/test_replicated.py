"""Replicas in processes of their own: jobs, cancelling, limits, vectors, and a crash of one."""

import asyncio
import os
import queue
import re
import signal
import threading
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models import SamplingParams
from ggml_cffi.server import Catalog, ModelSpec
from ggml_cffi.server.catalog import open_engine, planned_bytes
from ggml_cffi.server.engine import EmbedJob, Ended, Failed, Job, Token, Vectors
from ggml_cffi.server.errors import QueueFullError, StoppingError
from ggml_cffi.server.isolated import IsolatedEngine
from ggml_cffi.server.local_engine import LocalEngine
from ggml_cffi.server.replicated import ReplicatedEngine, gpus_of_replicas, named_gpus, open_isolated, with_names
from tests.server.conftest import CONTEXT
from tests.support.http_server import served, until

PROMPTS = [[1, 2, 3], [4, 5], [6] * 40, [7], [8, 9]]
LIMIT = 6
#: An answer that fills the context takes several seconds.
LOAD = {"devices": ["CPU"], "n_ctx": CONTEXT, "n_threads": 1}


@pytest.fixture(scope="module")
def engine(tiny):
    """An engine with two replicas on the CPU, each of which computes two answers at once."""
    settings = {"load": LOAD, "parallel": 2, "max_waiting": 20}
    engines = [IsolatedEngine(open_engine, str(tiny), settings, restarts_at_once=True) for _ in range(2)]
    with ReplicatedEngine(engines, 20) as found:
        yield found


class Mail:
    """The events of one job."""

    def __init__(self, engine, job):
        self.events = queue.SimpleQueue()
        self.cancel = engine.submit(job, self.events.put)

    def first(self):
        return self.events.get(timeout=300)

    def rest(self):
        """Return the tokens, and the last event."""
        tokens = []
        while isinstance(event := self.first(), Token):
            tokens.append(event.id)
        assert self.events.empty()
        return tokens, event


def job(ids, max_tokens=LIMIT, **params):
    return Job(ids, SamplingParams(ignore_eos=True, **params), max_tokens)


def texts(ids):
    return EmbedJob([*ids])


def test_jobs_go_to_the_replica_with_the_fewest(engine, tiny):
    with models.load(tiny, **LOAD) as model:
        want = [list(model.generate_tokens(ids, LIMIT, stop_at_end=False, reuse=False)) for ids in PROMPTS]
    before = engine.n_generated
    long = [Mail(engine, job([1], None)) for _ in range(2)]
    assert [each.n_jobs for each in engine.engines] == [1, 1]
    assert all(isinstance(mail.first(), Token) for mail in long)
    assert (engine.n_running, engine.n_waiting) == (2, 0)
    mails = [Mail(engine, job(ids)) for ids in PROMPTS]
    assert [mail.rest() for mail in mails] == [(tokens, Ended("length")) for tokens in want]
    for mail in long:
        mail.cancel()
        assert mail.rest()[1] == Ended("cancelled")
    assert (engine.n_running, engine.n_waiting) == (0, 0)
    assert engine.n_generated - before >= LIMIT * len(PROMPTS) + 2


def test_all_jobs_together_have_a_limit(engine):
    mails = [Mail(engine, job([1], None)) for _ in range(20)]
    assert [each.n_jobs for each in engine.engines] == [10, 10]
    with pytest.raises(QueueFullError, match="20 requests are waiting"):
        Mail(engine, job([1]))
    for mail in mails:
        mail.cancel()
    assert {mail.rest()[1] for mail in mails} == {Ended("cancelled")}


def test_replicas_share_the_texts_of_one_job(engine, tiny):
    with models.load(tiny, **LOAD) as model:
        want = model.embed(PROMPTS)
    for n in (5, 1):
        _, event = Mail(engine, texts(PROMPTS[:n])).rest()
        assert isinstance(event, Vectors)
        assert np.abs(event.values - want[:n]).max() < 1e-3
    _, event = Mail(engine, EmbedJob([[1], [2]], pooling="nonsense")).rest()
    assert isinstance(event, Failed)
    until(lambda: not engine.n_waiting)
    mail = Mail(engine, texts([[1] * 100] * 400))
    assert [each.n_jobs for each in engine.engines] == [1, 1]
    mail.cancel()
    assert mail.rest()[1] == Ended("cancelled")
    until(lambda: not engine.n_waiting)


def crash(engine):
    """End the process of an engine, and wait for its end."""
    pid = engine.worker.pid
    os.kill(pid, signal.SIGSEGV)
    with suppress(ChildProcessError):  # another thread has asked for its exit code
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_crash_ends_the_answers_of_its_replica_and_the_others_go_on_meanwhile(engine, monkeypatch, request):
    first, second = engine.engines
    goes_on, restart = threading.Event(), first.worker.restart
    request.addfinalizer(goes_on.set)
    monkeypatch.setattr(first.worker, "restart", lambda: (goes_on.wait(300), restart()))
    mails = [Mail(engine, job([1], None)) for _ in range(2)]
    assert all(isinstance(mail.first(), Token) for mail in mails)
    vectors = Mail(engine, texts([[1] * 100] * 400))
    crash(first)
    for failed in (mails[0], vectors):
        _, event = failed.rest()
        assert isinstance(event.error, ggml.BackendCrashedError)
    assert not first.is_ready
    until(lambda: (first.n_jobs, second.n_jobs) == (0, 1))
    more = [Mail(engine, job(ids)) for ids in PROMPTS] + [Mail(engine, texts(PROMPTS))]
    assert (first.n_jobs, second.n_jobs) == (0, 1 + len(more))
    assert [type(mail.rest()[1]) for mail in more] == [Ended] * len(PROMPTS) + [Vectors]
    goes_on.set()
    until(lambda: first.is_ready)  # without a job
    assert len(Mail(first, job([1])).rest()[0]) == LIMIT
    assert isinstance(mails[1].first(), Token)
    mails[1].cancel()
    assert mails[1].rest()[1] == Ended("cancelled")


def test_a_process_that_ends_without_jobs_fails_none_and_is_replaced(engine):
    first = engine.engines[0]
    pid = first.worker.pid
    crash(first)
    assert Mail(engine, job([1])).rest()[1] == Ended("length")
    until(lambda: first.worker.pid != pid and first.is_ready)
    crash(first)  # now without a job before the next start
    pid = first.worker.pid
    until(lambda: first.worker.pid != pid and first.is_ready)
    assert Mail(first, job([1])).rest()[1] == Ended("length")


def test_a_start_that_fails_is_tried_again(engine, monkeypatch, caplog):
    first, tries = engine.engines[0], []
    restart = first.worker.restart

    def fail_once():
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("no device today")
        restart()

    monkeypatch.setattr(first.worker, "restart", fail_once)
    mail = Mail(first, job([1], None))
    assert isinstance(mail.first(), Token)
    crash(first)
    assert isinstance(mail.rest()[1], Failed)
    until(lambda: len(tries) == 2 and first.is_ready)
    assert "cannot be loaded again: no device today" in caplog.text
    assert Mail(first, job([1])).rest()[1] == Ended("length")


def test_the_end_comes_also_while_a_process_starts(tiny, monkeypatch):
    settings, began = {"load": LOAD, "parallel": 1, "max_waiting": 2}, threading.Event()
    with IsolatedEngine(open_engine, str(tiny), settings, restarts_at_once=True) as engine:
        restart = engine.worker.restart
        monkeypatch.setattr(engine.worker, "restart", lambda: (began.set(), restart()))
        mail = Mail(engine, job([1], None))
        mail.first()
        crash(engine)
        assert isinstance(mail.rest()[1], Failed)
        assert began.wait(300)
    assert not engine.worker.alive
    assert not os.path.exists(f"/proc/{engine.worker.pid}")


def test_the_end_ends_all_jobs(tiny):
    settings = {"load": LOAD, "parallel": 1, "max_waiting": 2}
    with ReplicatedEngine([IsolatedEngine(open_engine, str(tiny), settings) for _ in range(2)], 9) as engine:
        mails = [Mail(engine, job([1], None)) for _ in range(4)]
        engine.stop()
        for mail in mails:
            assert isinstance(mail.rest()[1].error, StoppingError)
        for late in (job([1]), texts([[1], [2]])):
            with pytest.raises(StoppingError):
                engine.submit(late, print)


def test_only_several_gpus_have_a_process_each(tiny):
    assert named_gpus(["CPU"]) == []
    settings = {"load": {**LOAD, "split": "data"}, "parallel": 2, "max_waiting": 2}
    assert gpus_of_replicas(settings["load"]) == []
    with open_isolated(open_engine, str(tiny), settings, []) as engine:
        assert isinstance(engine, IsolatedEngine)
        assert Mail(engine, job([1])).rest()[1] == Ended("length")


def test_devices_have_a_process_each(two_gpus, tiny):
    assert [name for name, _ in named_gpus([*two_gpus, "CPU"])] == list(two_gpus)
    assert named_gpus(["CPU", *two_gpus]) == []
    options = {"devices": list(two_gpus), "split": "data", "n_ctx": 256, "n_threads": 1, "deterministic": True}
    spec = ModelSpec(tiny, options)
    size = planned_bytes(spec)

    async def main():
        async with catalog.use("a") as loaded:
            engine = loaded.engine
            assert isinstance(engine, ReplicatedEngine)
            assert len({each.worker.pid for each in engine.engines}) == 2
            assert [each.facts.devices[0] for each in engine.engines] == list(two_gpus)
            assert [each.worker.name for each in engine.engines] == [f"replica on {name}" for name in two_gpus]
            assert engine.facts.devices[:2] == two_gpus
            assert engine.facts.n_bytes >= size
            mails = [Mail(engine, job(ids)) for ids in PROMPTS]
            assert await asyncio.to_thread(lambda: [mail.rest()[0] for mail in mails]) == want
            assert all(each.n_generated for each in engine.engines)
        async with catalog.use("b"):
            assert [loaded.name for loaded in catalog.loaded] == ["b"]

    with models.load(tiny, two_gpus[:1], n_ctx=256, n_threads=1, deterministic=True) as model:
        want = [list(model.generate_tokens(ids, LIMIT, stop_at_end=False, reuse=False)) for ids in PROMPTS]
    with Catalog({"a": spec, "b": spec}, memory=int(size * 1.5), parallel=4, isolate=True) as catalog:
        asyncio.run(main())


@pytest.mark.parametrize(
    ("isolate", "split", "more", "kind"),
    [
        (None, "data", {}, ReplicatedEngine),
        (False, "data", {}, LocalEngine),
        (None, "data", {"progress": lambda done, total: None}, LocalEngine),
        (None, "layer", {}, LocalEngine),
        (True, "layer", {}, IsolatedEngine),
    ],
    ids=["default", "not isolated", "progress", "layer", "isolated"],
)
def test_replicas_on_several_gpus_have_processes_by_default(two_gpus, tiny, isolate, split, more, kind):
    options = {"devices": [ggml.device(name) for name in two_gpus], "split": split, "n_ctx": 256, "n_threads": 1}

    async def main():
        async with catalog.use("tiny") as loaded:
            assert type(loaded.engine) is kind
            assert (await asyncio.to_thread(Mail(loaded.engine, job([1], 2)).rest))[1] == Ended("length")

    with Catalog({"tiny": ModelSpec(tiny, options | more)}, parallel=4, isolate=isolate) as catalog:
        asyncio.run(main())


def test_replicas_are_in_this_process_where_there_can_be_no_others(two_gpus, tiny, monkeypatch):
    async def main():
        async with catalog.use("tiny") as loaded:
            assert type(loaded.engine) is LocalEngine

    monkeypatch.delattr(os, "memfd_create")
    options = {"devices": list(two_gpus), "split": "data", "n_ctx": 256, "n_threads": 1}
    with Catalog({"tiny": ModelSpec(tiny, options)}) as catalog:
        asyncio.run(main())


def test_processes_get_the_devices_that_this_one_lists(two_gpus, monkeypatch):
    assert with_names({"n_ctx": 4}) == {"n_ctx": 4}
    assert with_names({"devices": [ggml.device(two_gpus[1]), "CPU"]})["devices"] == [two_gpus[1], "CPU"]
    every = [device for device in ggml.devices() if not device.is_cpu]
    for listed in (every, every[::-1], every[:1]):
        monkeypatch.setattr("ggml_cffi.server.replicated.gpus", lambda listed=listed: listed)
        names = [name for name, _ in gpus_of_replicas({"split": "data"})]
        assert names == ([device.name for device in listed] if len(listed) > 1 else [])


@pytest.mark.parametrize("split", ["layer", "auto"])
def test_a_model_without_replicas_is_loaded_with_the_options_as_given(tiny, monkeypatch, split):
    """Devices that are named would keep ``auto`` from choosing a backend."""
    found = []

    def fail(path, *, load, **_):
        found.append(load)
        raise ggml.GgmlError("no engine")

    monkeypatch.setattr("ggml_cffi.server.catalog.open_engine", fail)
    options = {"split": split, "n_ctx": 256}
    ggml.devices()

    async def main():
        async with catalog.use("tiny"):
            pass

    with Catalog({"tiny": ModelSpec(tiny, options)}) as catalog, pytest.raises(ggml.GgmlError, match="no engine"):
        asyncio.run(main())
    assert found == [options]


def test_a_replica_that_cannot_be_loaded_leaves_no_process(two_gpus, tiny, monkeypatch):
    closed = []
    close = IsolatedEngine.close
    monkeypatch.setattr(IsolatedEngine, "close", lambda self: (closed.append(self), close(self)))
    settings = {"load": {"devices": list(two_gpus), "split": "data", "n_ctx": 256}, "parallel": 2, "max_waiting": 2}
    load = partial(open_but_not_on, two_gpus[1])
    with pytest.raises(ValueError, match="not on the second"):
        open_isolated(load, str(tiny), settings, gpus_of_replicas(settings["load"]))
    assert len(closed) == 1


def open_but_not_on(second, path, **settings):
    """Open an engine, in a process, unless it is on the second device."""
    if settings["load"]["devices"] == [second]:
        raise ValueError("not on the second")
    return open_engine(path, **settings)


def test_the_command_serves_replicas_in_processes(two_gpus, tiny):
    options = ["--devices", ",".join(two_gpus), "--split", "data", "--threads", "1", "--ctx", "256"]
    body = {"prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "n": 4}
    with served(f"tiny={tiny}", "--preload", *options) as server:
        answers = server.post("/v1/completions", body).json()["choices"]
        assert len({answer["text"] for answer in answers}) == 1
        metrics = server.metrics()
        assert metrics["ggml_cffi_generated_tokens_total"] == 16
        assert metrics["ggml_cffi_model_bytes"] > 0
        assert server.is_idle()
        (entry,) = server.get("/v1/models").json()["data"]
        assert entry["devices"][:2] == list(two_gpus)
        vectors = server.post("/v1/embeddings", {"input": ["a", "b", "c"]}).json()["data"]
        assert [vector["index"] for vector in vectors] == [0, 1, 2]
        assert not any(re.search("ERROR", line) for line in server.lines)
