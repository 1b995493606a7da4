"""Child processes: their output, their end and its reason, their lifeline, forks."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest

from ggml_cffi.core.child_process import ChildProcess
from tests.support import run_python
from tests.support.processes import has_ended

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="child processes need Unix")


def child(code, **options):
    return ChildProcess([sys.executable, "-c", code], name="a test", **options)


def test_captured_lines_are_kept_and_passed_on():
    seen = []
    process = child(
        "import os; os.write(2, b'one\\rtwo\\n\\nthree'); os.write(1, b'ignored')",
        capture="stderr",
        on_line=seen.append,
    )
    assert process.wait_or_kill(60) == 0
    assert process.lines == seen == ["one", "two", "three"]


def test_both_outputs_can_be_captured_together():
    process = child("import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')", capture="output")
    process.wait_or_kill(60)
    assert process.lines == ["out", "err"]


def test_only_the_last_lines_are_kept():
    process = child("for i in range(1000): print(i)", capture="output")
    process.wait_or_kill(60)
    assert process.lines == [str(i) for i in range(800, 1000)]


@pytest.mark.parametrize(
    ("code", "exit_code", "reason"),
    [
        ("raise SystemExit(3)", 3, "exited with status 3"),
        ("import os; os.kill(os.getpid(), 9)", -9, "was killed by SIGKILL"),
        ("", 0, "exited with status 0"),
    ],
)
def test_the_reason_of_the_end_is_named(code, exit_code, reason):
    process = child(code)
    assert process.wait_or_kill(60) == exit_code
    assert (process.running, process.exit_code, process.end_reason) == (False, exit_code, reason)


def test_a_child_that_does_not_end_is_killed():
    process = child("import time; time.sleep(1000)")
    assert process.running
    assert process.exit_code is None
    assert process.end_reason == "is running"
    assert process.wait_or_kill(0) == -signal.SIGKILL


def test_closing_the_lifeline_ends_a_child_that_watches_it():
    process = child("import sys; print(sys.stdin.buffer.readline()); sys.stdin.read()", lifeline=True, capture="output")
    process.send(b"hello\n")
    process.close_lifeline()
    assert process.wait_or_kill(60) == 0
    assert process.lines == ["b'hello\\n'"]
    process.close_lifeline()


def test_without_a_lifeline_standard_input_is_empty():
    process = child("import sys; print(sys.stdin.read() == '')", capture="output")
    process.wait_or_kill(60)
    assert process.lines == ["True"]


def test_environment_variables_are_added():
    process = child(
        "import os; print(os.environ['GGML_CFFI_TEST'], 'PATH' in os.environ)",
        capture="output",
        env={"GGML_CFFI_TEST": "x"},
    )
    process.wait_or_kill(60)
    assert process.lines == ["x True"]


def test_packets_are_read_before_later_lines_and_end_the_reading():
    """The child starts a process that keeps its stderr open: reading still ends when the child ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"""
import os, socket, time
s = socket.socket(fileno={theirs.fileno()})
s.send(b'packet')
os.write(2, b'line\\n')
if not os.fork():
    s.close()
    time.sleep(5)
    os._exit(0)
"""
    process = child(
        code, capture="stderr", pass_fds=[theirs.fileno()], packets=ours, on_packet=lambda data: data.decode()
    )
    theirs.close()
    assert process.wait_or_kill(60) == 0
    assert process.lines == ["packet", "line"]


def test_a_child_dies_with_its_parent_even_if_a_fork_lives_on():
    done = run_python(
        """
import os, sys, time
from ggml_cffi.core.child_process import ChildProcess
child = ChildProcess([sys.executable, "-c", "import sys; sys.stdin.read()"], name="x", lifeline=True)
fork = os.fork()
if not fork:
    os.close(1), os.close(2)
    time.sleep(60)
    os._exit(0)
print(child.pid, fork, flush=True)
os.kill(os.getpid(), 9)
""",
        check=False,
    )
    pid, fork = map(int, done.stdout.split())
    while not has_ended(pid):
        time.sleep(0.02)
    assert not has_ended(fork)
    os.kill(fork, signal.SIGKILL)
