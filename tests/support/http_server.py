"""The command ``ggml-cffi serve`` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support import PATIENCE


@dataclass
class Served:
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    """Lines that it wrote to standard error."""

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """Send a request with a JSON body."""
        return httpx.post(self.url + path, json=body, timeout=PATIENCE, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Send a request without a body."""
        return httpx.get(self.url + path, timeout=PATIENCE, **options)

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name; those of one name are added up."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(\w+)(?:\{.*?\})? (\S+)$", self.get("/metrics").text, re.M):
            found[name] = found.get(name, 0.0) + float(value)
        return found

    def is_idle(self) -> bool:
        """Return whether no answer is in generation, and none waits."""
        found = self.metrics()
        return not found.get("ggml_cffi_running") and not found.get("ggml_cffi_waiting")


def until(true: Callable[[], bool]) -> None:
    """Wait until ``true()`` is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def served(*arguments: object, **env: str) -> Iterator[Served]:
    """Run the command with a free port, and stop it by Ctrl-C. It must end well, and must not write a traceback."""
    command = [sys.executable, "-m", "ggml_cffi", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    assert process.stderr is not None
    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        lines.extend(process.stderr)

    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        reader = threading.Thread(target=read)
        reader.start()
        yield Served(found[1], process, lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, "".join(lines)
        reader.join()
        assert not any("Traceback" in line for line in lines), "".join(lines)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
