"""The command ``ggml-cffi`` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import PATIENCE


def run(*arguments: object, code: int = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command with the text ``stdin`` as its input, and check its exit code."""
    command = [sys.executable, "-m", "ggml_cffi", *map(str, arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, check=False, timeout=PATIENCE, env=os.environ
    )
    assert done.returncode == code, done
    return done
