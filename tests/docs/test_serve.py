"""The example that serves a model over HTTP: several clients, streaming, disconnects, wrong requests."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from ggml_cffi import models
from tests.support import PATIENCE, ROOT
from tests.support.generation import CLEAR

_WHY = "needs pip install '.[serve]'"
pytest.importorskip("fastapi", reason=_WHY)
httpx, uvicorn = (pytest.importorskip(name, reason=_WHY) for name in ("httpx", "uvicorn"))

PROMPTS = ["The capital of France is", "Once upon a time"]
N = 6


@pytest.fixture(scope="module")
def serve():
    """Import the example as a module."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import serve

        yield serve
    finally:
        sys.path.remove(str(ROOT / "examples"))


@contextmanager
def served(application):
    """Run a server in a thread, and yield its address."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def model(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=512, n_threads=2) as model:
        yield model


@pytest.fixture
def client(serve, model):
    with served(serve.application(model)) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        yield client


def until(true):
    """Wait up to a minute until ``true()`` is true."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def events(response):
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    for line in response.iter_lines():
        if line:
            yield json.loads(line.removeprefix("data: "))


def ask(client, **request):
    """Return the pieces of an answer, and the last event."""
    with client.stream("POST", "/generate", json={"max_tokens": N, **request}) as response:
        *pieces, last = events(response)
    assert all(set(piece) == {"text"} for piece in pieces)
    return [piece["text"] for piece in pieces], last


def in_flight(model):
    """Return the sequences that are not done."""
    with model.batchers[0].exclusive():
        return list(model.batchers[0].active)


def test_the_answer_to_a_client_does_not_depend_on_other_clients(client, model):
    alone = ["".join(model.generate(prompt, N)) for prompt in CLEAR]
    model.clear_cache()
    with ThreadPoolExecutor(len(CLEAR)) as pool:
        found = list(pool.map(lambda prompt: ask(client, prompt=prompt), CLEAR))
    assert ["".join(pieces) for pieces, _ in found] == alone
    for prompt, (_, last) in zip(CLEAR, found, strict=True):
        assert last == {"done": True, "prompt_tokens": len(model.tokenize(prompt)), "tokens": N}
    assert not in_flight(model)


def test_a_stream_yields_pieces_while_the_server_answers_other_requests(client, model):
    with client.stream("POST", "/generate", json={"prompt": PROMPTS[0], "max_tokens": 400}) as response:
        found = events(response)
        pieces = [next(found)["text"] for _ in range(2)]
        assert in_flight(model)  # the answer is not complete
        health = client.get("/health").json()
        assert (health["status"], health["n_ctx"], health["devices"]) == ("ok", 512, ["CPU"])
    assert "".join(model.generate(PROMPTS[0], 2)) == "".join(pieces)


def test_an_answer_without_streaming_is_one_json_object(client, model):
    messages = [{"role": "user", "content": "Hello"}]
    response = client.post("/generate", json={"messages": messages, "max_tokens": N, "stream": False})
    assert response.status_code == 200
    model.clear_cache()  # the prompt is computed in a batch of the same size
    want = "".join(model.generate(messages, N))
    prompt = model.apply_chat_template(messages)
    assert response.json() == {"text": want, "done": True, "prompt_tokens": len(model.tokenize(prompt)), "tokens": N}


def test_sampling_parameters_reach_the_model(client, model):
    options = {"temperature": 0.9, "seed": 3, "top_k": 20, "repeat_penalty": 1.2}
    got = "".join(ask(client, prompt=PROMPTS[1], **options)[0])
    model.clear_cache()  # the prompt is computed in a batch of the same size
    assert got == "".join(model.generate(PROMPTS[1], N, **options))
    assert "".join(ask(client, prompt=PROMPTS[0], stop=["Paris"])[0]) == " "


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_disconnects_ends_its_request(client, model, streaming):
    request = {"prompt": PROMPTS[1], "max_tokens": 400, "stream": streaming}
    if streaming:
        with client.stream("POST", "/generate", json=request) as response:
            next(events(response))
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json=request, timeout=httpx.Timeout(60, read=0.1))
    until(lambda: model.cached and not in_flight(model))
    [ids] = model.cached  # kept for requests with the same prefix, until the slots are needed
    assert len(ids) < 300
    assert ask(client, prompt=PROMPTS[0])[1]["done"]


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({}, 400, "give either a prompt or messages"),
        ({"prompt": "a", "messages": []}, 400, "give either a prompt or messages"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature must be at least 0 and finite, not -1.0"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens must be at least 0, not -1"),
        ({"prompt": "a", "stop": [""]}, 400, "a stop string must not be empty"),
        ({"prompt": ""}, 400, "there are no tokens: the prompt is empty"),
        ({"prompt": "a " * 600}, 400, "tokens do not fit the context of 512"),
        ({"messages": [{"content": "a"}]}, 400, "message 0: 'role' must be a text"),
        ({"prompt": 1}, 422, "prompt: Input should be a valid string"),
        ({"prompt": "a", "temprature": 1}, 422, "temprature: Extra inputs are not permitted"),
        ({"prompt": "a", "temprature": float("nan")}, 422, "temprature: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_request_is_refused_with_a_message(client, model, request_, status, message):
    response = client.post("/generate", content=json.dumps(request_), headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert message in response.json()["detail"]
    assert not in_flight(model)


def test_a_closed_model_answers_with_an_error(client, model):
    model.close()
    for stream in (True, False):
        response = client.post("/generate", json={"prompt": "a", "stream": stream})
        assert (response.status_code, response.json()) == (503, {"detail": "this model is closed"})


def test_the_command_serves_until_it_is_interrupted(smollm2):
    options = ["--port", "0", "--devices", "CPU", "--ctx", "64", "--threads", "2"]
    command = [sys.executable, ROOT / "examples" / "serve.py", smollm2, *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as p:
        try:
            url = next(found[0] for line in p.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                assert client.get("/health").json()["n_ctx"] == 64
                assert len(ask(client, prompt=PROMPTS[0], max_tokens=2)[0]) == 2
            p.send_signal(signal.SIGINT)
            assert "Traceback" not in p.stderr.read()
            assert p.wait(60) == 0
        finally:
            p.kill()
