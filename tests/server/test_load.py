"""Many clients for a while: no answer is lost or mixed up, and the server keeps no thread, file or slot of them."""

import os
import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.http_server import until

CLIENTS, ROUNDS = 64, 8
OPTIONS = {"temperature": 0, "ignore_eos": True, "echo": True, "max_tokens": 12}


def resources(server):
    """Return the numbers of threads and of open files of the server's process."""
    folder = f"/proc/{server.process.pid}"
    return len(os.listdir(f"{folder}/task")), len(os.listdir(f"{folder}/fd"))


@pytest.mark.nightly
def test_64_clients_get_their_own_answers_and_leave_nothing_behind(server):
    rng = random.Random(1)
    prompts = ["".join(rng.choices("abcdefgh ", k=rng.randint(20, 500))) for _ in range(CLIENTS)]

    def ask(client, prompt):
        response = client.post(f"{server.url}/v1/completions", json={"prompt": prompt, **OPTIONS}, timeout=600)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def work(prompt):
        with httpx.Client() as client:
            return {ask(client, prompt) for _ in range(ROUNDS)}

    with httpx.Client() as client:
        alone = [ask(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, prompts))  # the server has its threads from now on
        until(server.is_idle)
        before = resources(server)
        found = list(pool.map(work, prompts))
    until(server.is_idle)
    assert found == [{text} for text in alone]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    threads, files = resources(server)
    assert threads <= before[0] + 1
    assert files <= before[1] + 2
