"""Faults: clients that leave, send garbage or hold connections, full queues, crashes, the end of the server."""

import asyncio
import json
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import ValidationError

from ggml_cffi.server import create_app
from ggml_cffi.server.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    ResponsesBody,
    TokenizeBody,
)
from tests.server.conftest import CONTEXT
from tests.support.http_server import served, until

#: Control tokens, which have no text, are excluded: each token is a chunk of a stream.
OPTIONS = {"temperature": 0, "ignore_eos": True, "logit_bias": {str(i): -100 for i in range(256, 260)}}
LONG = {"model": "tiny", "prompt": "x" * 400, "max_tokens": 100, **OPTIONS}
SHORT = {"model": "tiny", "prompt": "abc", "max_tokens": 3, **OPTIONS}


@pytest.fixture(scope="module")
def limited(tiny):
    """A server with narrow limits and a key."""
    options = ["--devices", "CPU", "--threads", "1", "--ctx", "512", "--parallel", "1", "--max-waiting", "2"]
    options += ["--api-key", "secret", "--max-body", "2000", "--max-prompt", "500", "--cors-origin", "http://a.example"]
    with served(f"tiny={tiny}", "--preload", *options) as found:
        yield found


KEY = {"headers": {"Authorization": "Bearer secret"}}


@pytest.mark.parametrize(("stream", "after"), [(True, "the prompt"), (True, "a chunk"), (False, "the prompt")])
def test_a_client_that_leaves_frees_its_slot(server, stream, after):
    place = urlsplit(server.url)
    body = json.dumps({**LONG, "max_tokens": None, "stream": stream}).encode()
    before = server.metrics().get("ggml_cffi_generated_tokens_total", 0)
    for _ in range(4):
        with socket.create_connection((place.hostname, place.port)) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if after == "a chunk":
                assert connection.recv(100)
    until(server.is_idle)
    assert server.metrics().get("ggml_cffi_generated_tokens_total", 0) - before < CONTEXT  # of four times as many
    assert server.post("/v1/completions", SHORT).json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "body: Field required"),
        (b"{", "the body of the request is not valid JSON"),
        (b"\xff\xfe{}", "the body of the request is not valid JSON"),
        (b"[]", "Input should be a valid dictionary"),
        (b"[" * 50_000, "error parsing the body"),
        (b'{"prompt": "a", "temprature": 1}', "temprature: Extra inputs are not permitted"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be at least 0 and finite"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature must be at least 0 and finite"),
        (b'{"prompt": "a", "max_tokens": -1}', "max_tokens: Input should be greater than or equal to 0"),
        (b'{"prompt": "a", "n": 1000}', "n: Input should be less than or equal to 64"),
        (b'{"prompt": "a", "stop": [%s"x"]}' % (b'"x",' * 64), "a request may have 64 stop strings, not 65"),
        (b'{"prompt": "a", "stop": [""]}', "a stop string must not be empty"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": []}', "a request may have 1 to 64 answers"),
        (b'{"prompt": [1, 9999]}', "token ids must be 0 to 259, not 9999"),
        (b'{"prompt": "a", "logit_bias": {"9999": 1}}', "token ids of logit_bias must be 0 to 259, not 9999"),
        (b'{"prompt": "a", "logit_bias": {"-1": 1}}', "token ids of logit_bias must be 0 to 259, not -1"),
        (
            b'{"prompt": "a", "logit_bias": {%s}}' % b",".join(b'"%d": 1' % i for i in range(1025)),
            "At most 1024 tokens are allowed, not 1025",
        ),
        (b'{"prompt": "a", "best_of": 3}', "best_of is not supported"),
        (b'{"\\ud800": "\\ud800"}', "body"),
    ],
)
def test_garbage_is_refused_in_the_form_of_openai_s_api(server, data, message):
    for body in (data, data.replace(b'"prompt"', b'"stream": true, "prompt"')):
        response = server.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"] == "logit_bias" or b"logit_bias" not in data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": "a"}, "messages: Input should be a valid list"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"content": "a"}]}, "message 0: 'role' must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the model reads text alone"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams"),
        ({"response_format": {"type": "json_schema"}}, "needs 'json_schema' with a 'schema'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "which is not among the tools"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"stream": "perhaps"}, "stream: Input should be a valid boolean"),
        ({"stream_options": 1}, "stream_options: Input should be"),
        ({"stop": {}}, "stop: Input should be"),
        ({"tool_choice": 5}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
    ],
)
def test_a_wrong_chat_is_refused(server, change, message):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    response = server.post("/v1/chat/completions", {**body, **change})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 2),
        ("top_k", -1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 1e999),
    ],
)
def test_a_number_out_of_range_has_its_name_in_requests(server, name, value):
    data = json.dumps({"prompt": "a", name: value}).encode()
    response = server.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name} must be")


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (CompletionBody, {"prompt": [1] * 999 + ["a"] * 999}),
        (CompletionBody, {"prompt": [None] * 999}),
        (CompletionBody, {"prompt": [["a"] * 999] * 999}),
        (CompletionBody, {"prompt": "a", "stop": [1] * 999}),
        (CompletionBody, {"prompt": "a", "logit_bias": {f"a{i}": "a" for i in range(9999)}}),
        (CompletionBody, {"prompt": "a"} | {f"field{i}": 1 for i in range(999)}),
        (ChatBody, {"messages": [1] * 999, "tools": [{}] * 999}),
        (EmbeddingBody, {"input": [{}] * 999}),
        (RerankBody, {"query": "a", "documents": [1] * 999}),
        (ResponsesBody, {"input": [1] * 999, "tools": [1] * 999, "include": [1] * 999}),
        (TokenizeBody, {"messages": [1] * 999}),
        (DetokenizeBody, {"tokens": ["a"] * 999}),
    ],
)
def test_a_body_of_many_wrong_values_has_few_errors(body, wrong):
    with pytest.raises(ValidationError) as raised:
        body.model_validate(wrong)
    assert raised.value.error_count() < 10


@pytest.mark.parametrize(
    ("body", "required"),
    [
        (CompletionBody, {"prompt": "a"}),
        (ChatBody, {"messages": [{}]}),
        (EmbeddingBody, {"input": "a"}),
        (RerankBody, {"query": "a", "documents": ["a"]}),
        (ResponsesBody, {"input": "a"}),
        (TokenizeBody, {}),
    ],
)
def test_null_says_nothing(body, required):
    nulls = dict.fromkeys([*body.model_fields, "functions"])
    assert body.model_validate(nulls | required).model_dump(exclude_none=True) == required


@pytest.mark.parametrize("depth", [300, 600, 800, 900])
@pytest.mark.parametrize(
    ("start", "first", "last", "end"),
    [
        (b'{"messages": [{"role": "user", "content": ', b"[", b"]", b"}]}"),
        (
            b'{"messages": [{"role": "user", "content": "a"}], "tool_choice": "required", "tools": '
            b'[{"type": "function", "function": {"name": "f", "parameters": {"a": ',
            b'{"properties":',
            b"}",
            b"}}}]}",
        ),
    ],
)
def test_a_body_that_is_nested_too_deeply_is_refused(server, depth, start, first, last, end):
    data = start + first * depth + b"{}" + last * depth + end
    headers = {"Content-Type": "application/json"}
    response = server.post("/v1/chat/completions", content=data, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_unknown_addresses_and_methods_have_an_error_object(server):
    for response, status in ((server.get("/v1/nothing"), 404), (server.get("/v1/completions"), 405)):
        assert response.status_code == status
        assert "there is no GET" in response.json()["error"]["message"]
    wrong = server.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert wrong.status_code == 400
    assert "Content-Type: application/json" in wrong.json()["error"]["message"]


def test_bytes_that_are_no_http_disturb_nobody(server):
    place = urlsplit(server.url)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/completions", LONG)
        for data in (
            b"\0" * 1000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n",
        ):
            with socket.create_connection((place.hostname, place.port)) as connection:
                connection.sendall(data)
        assert answer.result().json()["usage"]["completion_tokens"] == LONG["max_tokens"]
    until(server.is_idle)


def test_a_client_that_reads_nothing_holds_up_nobody(server):
    place = urlsplit(server.url)
    body = json.dumps({**LONG, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    held = [socket.create_connection((place.hostname, place.port)) for _ in range(20)]
    try:
        for connection in held:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert server.post("/v1/completions", SHORT).status_code == 200
        until(server.is_idle)  # their answers end, and wait in the buffers of the connections
    finally:
        for connection in held:
            connection.close()


def test_a_full_queue_refuses_requests_and_loses_none(limited):
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: limited.post("/v1/completions", LONG, **KEY), range(12)))
    refused = [response for response in found if response.status_code == 429]
    assert refused
    for response in refused:
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert response.headers["retry-after"] == "1"
    answers = {response.json()["choices"][0]["text"] for response in found if response.status_code == 200}
    assert len(answers) == 1
    until(lambda: limited.post("/v1/completions", SHORT, **KEY).status_code == 200)


def test_limits_of_size(limited):
    headers = {**KEY["headers"], "Content-Type": "application/json"}
    large = limited.post("/v1/completions", content=b"x" * 3000, headers=headers)
    in_parts = limited.post("/v1/completions", content=(b"x" * 500 for _ in range(6)), headers=headers)
    for response in (large, in_parts):
        assert response.status_code == 413
        assert "may have 2000 bytes" in response.json()["error"]["message"]
        assert response.json()["error"]["code"] == "body_too_large"
    response = limited.post("/v1/completions", {**SHORT, "prompt": "x" * 501}, **KEY)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_body_that_does_not_arrive_in_time_is_refused(tiny):
    async def main():
        messages = []

        async def send(message):
            messages.append(message)

        async def receive():
            if not messages:
                messages.append(None)
                return {"type": "http.request", "body": b"{", "more_body": True}
            return await asyncio.get_running_loop().create_future()  # never

        headers = [(b"content-type", b"application/json"), (b"content-length", b"100")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        await asyncio.wait_for(app({**scope, "state": {}}, receive, send), 60)
        return messages[1]["status"], messages[2]["body"]

    app = create_app({"m": tiny}, body_seconds=0.01)
    status, body = asyncio.run(main())
    assert status == 408
    assert b"did not arrive in time" in body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
def test_the_tokens_of_a_text_that_never_fits_are_not_computed(server, path):
    text = " " * 300_000
    field = {"chat/completions": {"messages": [{"role": "user", "content": text}]}, "completions": {"prompt": text}}
    response = server.post(path, {"model": "tiny", **field.get(path[4:], {"input": text})})
    assert response.status_code == 400
    error = response.json()["error"]
    assert re.search("the prompt has 300... characters, and this server takes at most 16384 tokens", error["message"])
    assert error["code"] == "context_length_exceeded"


def test_a_key_is_demanded(limited):
    assert limited.get("/health").status_code == 200
    assert limited.get("/").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        for path in ("/v1/models", "/metrics", "/nothing"):
            response = limited.get(path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert limited.get("/v1/models", **KEY).status_code == 200


def test_pages_of_other_origins_need_permission(limited, server):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-os"}
    for origin, allowed in (("http://a.example", "http://a.example"), ("http://b.example", None)):
        response = httpx.options(limited.url + "/v1/models", headers={**ask, "Origin": origin})
        assert response.headers.get("access-control-allow-origin") == allowed
        assert (response.status_code == 200) == (allowed is not None)
        refused = limited.get("/v1/models", headers={"Origin": origin})
        assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, allowed)
    response = server.get("/v1/models", headers={"Origin": "http://a.example"})
    assert "access-control-allow-origin" not in response.headers


def test_the_end_of_the_server_ends_streams_with_an_error(tiny):
    with served(f"tiny={tiny}", "--devices", "CPU", "--threads", "1", "--ctx", CONTEXT, "--preload") as server:
        body = {**LONG, "max_tokens": None, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["message"] == "the server is stopping"
        assert server.process.wait(60) == 0


def test_a_crash_in_c_ends_only_the_answers_of_its_model(tiny):
    models = [f"{name}={tiny}" for name in ("tiny", "other")]
    with served(*models, "--isolate", "--devices", "CPU", "--threads", "1", "--ctx", CONTEXT) as server:
        want = server.post("/v1/completions", LONG).json()["choices"][0]["text"]
        assert server.post("/v1/completions", {**SHORT, "model": "other"}).status_code == 200
        workers = children(server.process.pid)
        assert len(workers) == 2
        body = {**LONG, "max_tokens": None, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            other = threading.Thread(target=server.post, args=("/v1/completions", {**LONG, "model": "other"}))
            other.start()
            os.kill(workers[0], signal.SIGSEGV)
            rest = [line for line in lines if line]
        other.join()
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "model_crashed"
        assert server.post("/v1/completions", {**SHORT, "model": "other"}).status_code == 200
        assert server.post("/v1/completions", LONG).json()["choices"][0]["text"] == want
        assert children(server.process.pid)[0] != workers[0]
        assert any(re.search("SIGSEGV", line) for line in server.lines)


def children(pid):
    """Return the processes of a process, the oldest first."""
    found = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found |= {int(child) for child in file.read().split()}
        except FileNotFoundError:  # the thread has ended
            pass
    return sorted(found, key=start_time)


def start_time(pid):
    """Return the time at which a process began, in ticks since the system did."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[19])
