"""The engine: events of many jobs, cancelling, the end, and errors that stay with their own job."""

import itertools
import os
import queue
import signal
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models import SamplingParams
from ggml_cffi.server.catalog import open_engine
from ggml_cffi.server.engine import EmbedJob, Ended, Failed, Job, Token, Vectors
from ggml_cffi.server.errors import QueueFullError, StoppingError
from ggml_cffi.server.isolated import EngineHost, Events, IsolatedEngine
from ggml_cffi.server.local_engine import LocalEngine
from ggml_cffi.server.mailbox import together
from tests.support import need

PROMPTS = [[1, 2, 3], [4, 5], [6] * 40, [7], [8, 9]]
LIMIT = 6


@pytest.fixture(params=["here", "in a process"])
def engine(request, tiny):
    settings = {"load": {"devices": ["CPU"], "n_ctx": 512, "n_threads": 1}, "parallel": 3, "max_waiting": 8}
    if request.param == "here":
        found = open_engine(str(tiny), **settings)
    else:
        found = IsolatedEngine(open_engine, str(tiny), settings, max_waiting=8)
    with found:
        yield found


class Mail:
    """The events of one job."""

    def __init__(self, engine, job, seen=lambda event: None):
        self.events = queue.SimpleQueue()
        self.cancel = engine.submit(job, lambda event: (seen(event), self.events.put(event)))

    def rest(self):
        """Return the tokens, and the last event."""
        tokens = []
        while isinstance(event := self.events.get(timeout=300), Token):
            tokens.append(event.id)
        return tokens, event


def job(ids, max_tokens=LIMIT, **params):
    return Job(ids, SamplingParams(ignore_eos=True, **params), max_tokens)


def test_answers_of_jobs_together_equal_those_of_generate(engine, tiny):
    with models.load(tiny, ["CPU"], n_ctx=512, n_threads=1) as model:
        want = [list(model.generate_tokens(ids, LIMIT, stop_at_end=False, reuse=False)) for ids in PROMPTS]
    mails = [Mail(engine, job(ids)) for ids in PROMPTS]
    for mail, tokens in zip(mails, want, strict=True):
        assert mail.rest() == (tokens, Ended("length"))


def test_a_cancelled_job_ends_whether_it_waits_or_runs(engine):
    mails = [Mail(engine, job([1], None)) for _ in range(6)]
    for mail in reversed(mails):
        mail.cancel()
        mail.cancel()
    for mail in mails:
        assert mail.rest()[1] == Ended("cancelled")
    assert Mail(engine, job([1], 2)).rest()[1] == Ended("length")
    assert (engine.n_running, engine.n_waiting) == (0, 0)


def test_an_error_of_one_sampler_is_its_own(engine):
    bad = job([1], 5, logit_bias=dict.fromkeys(range(260), -np.inf))
    mails = [Mail(engine, j) for j in (job([2]), bad, job([3]))]
    (_, first), (tokens, error), (_, last) = (mail.rest() for mail in mails)
    assert first == last == Ended("length")
    assert not tokens
    assert isinstance(error, Failed)
    assert "exclude every token" in str(error.error)


def test_a_job_that_suits_no_model_is_refused(engine):
    for wrong in (job([]), job([1] * 513), job([1], logit_bias={999: 1.0})):
        try:
            _, event = Mail(engine, wrong).rest()
        except ValueError:
            continue
        assert isinstance(event, Failed)
        assert isinstance(event.error, ValueError)


def test_a_full_queue_refuses_jobs_and_the_end_ends_all(engine):
    mails = [Mail(engine, job([1], None)) for _ in range(8)]

    def fill():
        while True:  # a few of those that wait may have begun meanwhile
            mails.append(Mail(engine, job([1], None)))

    with pytest.raises(QueueFullError, match="are waiting for this model already"):
        fill()
    engine.stop()
    for mail in mails:
        _, event = mail.rest()
        assert isinstance(event, Failed)
        assert isinstance(event.error, StoppingError)
    with pytest.raises(StoppingError):
        engine.submit(job([1]), mails[0].events.put)


def test_texts_of_several_jobs_are_embedded(engine, tiny):
    with models.load(tiny, ["CPU"], n_ctx=512, n_threads=1) as model:
        want = model.embed(PROMPTS)
    mails = [Mail(engine, EmbedJob([ids])) for ids in PROMPTS]
    for mail, vector in zip(mails, want, strict=True):
        _, event = mail.rest()
        assert isinstance(event, Vectors)
        assert np.abs(event.values[0] - vector).max() < 1e-3
    _, event = Mail(engine, EmbedJob([[1]], pooling="nonsense")).rest()
    assert isinstance(event, Failed)


def test_a_long_list_of_texts_does_not_hold_up_the_end(tiny):
    texts, calls = [[i % 256] * (1 + i % 400) for i in range(200)], []
    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 512}, parallel=1, max_waiting=1) as engine:
        _, event = Mail(engine, EmbedJob(texts)).rest()
        assert np.abs(event.values - engine.model.embed(texts)).max() < 1e-3

        def stop(texts):
            calls.append(len(texts))
            engine.stop()

        watch_embeds(engine, stop)
        _, event = Mail(engine, EmbedJob(texts)).rest()
        assert isinstance(event, Failed)
        assert isinstance(event.error, StoppingError)
        assert sum(calls) < len(texts)


def watch_embeds(engine, seen):
    """Let ``seen(texts)`` be called before each call of ``embed`` of the engine's model."""
    embed = engine.model.embed

    def watched(texts, **options):
        seen(texts)
        return embed(texts, **options)

    engine.model.embed = watched


def test_answers_go_on_between_the_runs_of_a_long_list_of_texts(tiny):
    counts = []
    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 4096}, parallel=1, max_waiting=2) as engine:
        answer = Mail(engine, job([1], None))
        assert isinstance(answer.events.get(timeout=300), Token)
        watch_embeds(engine, lambda _: counts.append(engine.n_generated))
        assert isinstance(Mail(engine, EmbedJob([[7] * 100] * 300)).rest()[1], Vectors)
        answer.cancel()
        answer.rest()
    assert len(counts) > 10
    assert all(after > before for before, after in itertools.pairwise(counts))


def test_a_short_list_of_texts_does_not_wait_for_a_long_one(tiny):
    calls, mails = [], []

    def add(texts):
        calls.append(texts)
        if len(calls) == 1:
            mails.append(Mail(engine, EmbedJob([[9], [8]])))
            mails.append(Mail(engine, EmbedJob([[6]], pooling="cls")))

    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 512}, parallel=1, max_waiting=3) as engine:
        watch_embeds(engine, add)
        texts = [[i % 256] * 100 for i in range(60)]
        long = Mail(engine, EmbedJob(texts)).rest()[1]
        assert [9] in calls[1]
        assert [8] in calls[1]
        assert [6] in calls[2]
        found = [mail.rest()[1] for mail in mails]
    with models.load(tiny, ["CPU"], n_ctx=512) as model:
        wants = [model.embed(texts), model.embed([[9], [8]]), model.embed([[6]], pooling="cls")]
    for event, want in zip([long, *found], wants, strict=True):
        assert np.abs(event.values - want).max() < 1e-3


def test_a_client_that_leaves_ends_its_long_list_of_texts(tiny):
    calls = []

    def leave(texts):
        calls.append(len(texts))
        mail.cancel()

    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 512}, parallel=1, max_waiting=1) as engine:
        watch_embeds(engine, leave)
        mail = Mail(engine, EmbedJob([[1] * 100] * 100))
        assert mail.rest()[1] == Ended("cancelled")
        assert isinstance(Mail(engine, EmbedJob([[1]])).rest()[1], Vectors)
        assert sum(calls) < 20
        with pytest.raises(ValueError, match="there are no texts"):
            engine.submit(EmbedJob([]), print)


def test_log_probabilities_and_the_reason_of_an_end_token(engine, tiny):
    events = queue.SimpleQueue()
    engine.submit(Job([1, 2], SamplingParams(logprobs=2, logit_bias={257: 100.0}), 5), events.put)
    assert events.get(timeout=300) == Ended("stop")
    engine.submit(Job([1, 2], SamplingParams(logprobs=2, ignore_eos=True), 1), events.put)
    token = events.get(timeout=300)
    assert token.logprob.token_id == token.id
    assert len(token.logprob.top) == 2


def test_a_process_that_ends_between_two_calls_ends_its_jobs(tiny, monkeypatch):
    settings = {"load": {"devices": ["CPU"], "n_ctx": 512, "n_threads": 1}, "parallel": 1, "max_waiting": 1}
    with IsolatedEngine(open_engine, str(tiny), settings) as engine:
        call, calls = engine.worker.call, []

        def call_after_a_crash(*args):
            calls.append(args)
            if len(calls) == 2:
                pid = engine.worker.pid
                os.kill(pid, signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            events = call(*args)
            # On a busy machine the process may have computed the whole answer before it returns from the first call.
            return Events() if len(calls) == 1 else events

        monkeypatch.setattr(engine.worker, "call", call_after_a_crash)
        _, event = Mail(engine, job([1], None)).rest()
        assert isinstance(event.error, ggml.BackendCrashedError)
        assert Mail(engine, job([1], 2)).rest()[1] == Ended("length")


def test_a_process_that_ends_without_jobs_is_replaced_for_the_next_one(tiny):
    settings = {"load": {"devices": ["CPU"], "n_ctx": 512, "n_threads": 1}, "parallel": 1, "max_waiting": 1}
    with IsolatedEngine(open_engine, str(tiny), settings) as engine:
        assert Mail(engine, job([1], 2)).rest()[1] == Ended("length")
        pid = engine.worker.pid
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert Mail(engine, job([1], 2)).rest()[1] == Ended("length")
        assert engine.worker.pid != pid


def test_the_events_of_a_step_are_one_message():
    delivers = []
    engine = SimpleNamespace(submit=lambda job, deliver: delivers.append(deliver), close=lambda: None)
    with EngineHost(engine) as host, ThreadPoolExecutor(1) as pool:
        host.exchange([(number, job([1])) for number in (3, 4)], 0)
        message = pool.submit(host.exchange, [], 300)
        with together():
            delivers[0](Token(7))
            assert not futures.wait([message], 0.1).done
            delivers[1](Ended("stop"))
        assert [*message.result(300)] == [(3, Token(7)), (4, Ended("stop"))]
        delivers[0](Failed(ValueError("bad")))
        ((number, event),) = host.exchange([], 300)
        assert (number, str(event.error)) == (3, "bad")


def test_events_come_back_in_the_order_of_each_job():
    events = Events()
    given = [(1, Token(5)), (2, Token(6)), (1, Ended("stop")), (2, Token(7)), (2, Ended("length"))]
    for number, event in given:
        events.add(number, event)
    for number in (1, 2):
        assert [event for n, event in events if n == number] == [event for n, event in given if n == number]


def test_replicas_share_the_jobs(two_gpus, tiny):
    need(two_gpus)
    options = {"devices": list(two_gpus), "split": "data", "n_ctx": 256, "n_threads": 1}
    with models.load(tiny, **options) as model:
        want = [list(model.generate_tokens(ids, LIMIT, stop_at_end=False, reuse=False)) for ids in PROMPTS]
    with open_engine(str(tiny), load=options, parallel=4, max_waiting=8) as engine:
        assert isinstance(engine, LocalEngine)
        mails = [Mail(engine, job(ids)) for ids in PROMPTS]
        assert [mail.rest()[0] for mail in mails] == want
        assert all(batcher.cache.kept for batcher in engine.model.batchers)


def test_a_token_is_delivered_in_the_run_of_the_next_one(tiny, monkeypatch):
    seen = []
    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 512}, parallel=2, max_waiting=2) as engine:
        runner = engine.model.batchers[0].runner
        run = runner.run

        def watched(batch, meanwhile=None):
            seen.append("begin")
            try:
                return run(batch, meanwhile)
            finally:
                seen.append("end")

        monkeypatch.setattr(runner, "run", watched)
        mail = Mail(engine, job([1, 2]), lambda event: seen.append(type(event)))
        assert len(mail.rest()[0]) == LIMIT
    assert seen == ["begin", "end"] + ["begin", Token, "end"] * (LIMIT - 1) + [Token, Ended]


def test_an_error_in_a_delivery_ends_its_own_answer_only(tiny, caplog):
    def fail(event):
        raise ValueError("the client is not well")

    with open_engine(str(tiny), load={"devices": ["CPU"], "n_ctx": 512}, parallel=2, max_waiting=2) as engine:
        Mail(engine, job([1, 2], None), fail)
        assert Mail(engine, job([1, 2], 20)).rest()[1] == Ended("length")
        assert Mail(engine, job([1, 2], 2)).rest()[1] == Ended("length")
        assert engine.n_running == 0
    assert "the client is not well" in caplog.text
