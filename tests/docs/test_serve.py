"""The example that mounts the server in an application of its own."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.support import PATIENCE, ROOT
from tests.support.byte_level_model import byte_level_model

httpx = pytest.importorskip("httpx", reason="needs pip install '.[dev]'")
pytest.importorskip("fastapi", reason="needs pip install '.[serve]'")


def test_the_example_serves_a_model_inside_an_application(tmp_path):
    model = byte_level_model(tmp_path / "m.gguf")
    command = [sys.executable, ROOT / "examples" / "serve.py", model, "--port", "0", "--devices", "CPU"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as p:
        try:
            url = next(found[0] for line in p.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                assert client.get("/summary").json() == {"models": ["model"], "loaded": []}
                answer = client.post("/llm/v1/completions", json={"prompt": "a", "max_tokens": 2, "ignore_eos": True})
                assert answer.json()["usage"]["completion_tokens"] == 2
                assert client.get("/summary").json()["loaded"] == ["model"]
                page = client.get("/llm/").text
                for name in re.findall(r"static/[a-z.]+", page):
                    assert client.get(f"/llm/{name}").status_code == 200
                assert client.get("/llm/health").json()["status"] == "ok"
            p.send_signal(signal.SIGINT)
            assert "Traceback" not in p.stderr.read()
            assert p.wait(60) == 0
        finally:
            p.kill()
