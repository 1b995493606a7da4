"""Child process that performs jobs, and may crash.

``python -m fuzzing.child KIND DEVICES IN OUT`` reads jobs from one pipe, and writes an :class:`Outcome` for each to
another. It forks a worker for the jobs, waits for it, reports how it ended, and forks the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
#: Time limit of a job in seconds.
LIMIT = 20
_GPU_LIMIT = 1500  # a software device compiles for minutes
_MEMORY = 8 << 30
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Outcome:
    """Outcome of a job.

    ``kind`` is ``refused``, ``accepted`` (not computed), ``computed``, ``compared``, ``skipped`` (not tried), or one of
    :data:`DEFECTS`. ``what`` identifies the cause, ``detail`` is for the reader. ``loose`` lists strange arguments that
    were accepted.
    """

    kind: str
    stage: str = ""
    what: str = ""
    detail: str = ""
    loose: str = ""

    @property
    def is_defect(self) -> bool:
        return self.kind in DEFECTS


DEFECTS = ("death", "hang", "wrong exception", "disagreement", "overwritten input", "left behind")


class Worker(Protocol):
    """Function that performs the jobs of one child process."""

    def __call__(self, job: Any) -> Outcome: ...


class Child:
    """The child process, as its parent sees it. :meth:`ask` does not raise if a job crashes the child."""

    def __init__(self, kind: str, devices: tuple[str, ...] = ("CPU",)) -> None:
        self.command = [sys.executable, "-m", "tests.fuzzing.child", kind, ",".join(devices)]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self.process: subprocess.Popen[bytes] | None = None
        self._start()

    def _start(self) -> None:
        jobs, self.jobs = os.pipe()
        self.outcomes, outcomes = os.pipe()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        # Unwritten memory has a pattern, so that a result that depends on it differs from the reference.
        env = {**os.environ, "PYTHONPATH": path, "GLIBC_TUNABLES": "glibc.malloc.perturb=165", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*self.command, str(jobs), str(outcomes)],
            pass_fds=(jobs, outcomes),
            stdout=self.errors,
            stderr=self.errors,
            env=env | {"OPENBLAS_NUM_THREADS": "1"},
        )
        os.close(jobs)
        os.close(outcomes)

    def ask(self, job: Any) -> Outcome:
        """Perform ``job`` in the child, and return its outcome; None restarts the worker."""
        self.errors.seek(0)
        self.errors.truncate()
        _write(self.jobs, job)
        try:
            answer = _read(self.outcomes)
        except EOFError:
            text = self._errors()
            self.close()
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
            self._start()
            raise RuntimeError(f"the fuzzer's child broke down:\n{text}") from None
        if isinstance(answer, Outcome):
            return answer
        return self._autopsy(answer) if job is not None else Outcome("renewed")

    def _errors(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode("utf-8", "replace")

    def _autopsy(self, status: int) -> Outcome:
        text = self._errors()
        code = os.waitstatus_to_exitcode(status)
        stage = next((s for s, mark in _STAGES if mark in text), "elsewhere")
        # ggml's message, or the innermost line of this package.
        said = [line for line in text.splitlines() if "GGML_ASSERT" in line or "GGML_ABORT" in line or ".cpp:" in line]
        frames = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
        if "Timeout (" in text:
            return Outcome("hang", stage, frames[0] if frames else "", text[-3000:])
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        where = said[0] if said else next((f for f in frames if "ggml_cffi/" in f), "")
        what = where.replace(str(ROOT), "").removeprefix('File "/')
        return Outcome("death", stage, f"{name} {what}", text[-3000:])

    def close(self) -> None:
        """End the child process."""
        if self.process is not None:
            os.close(self.jobs)
            os.close(self.outcomes)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
            self.errors.close()


_STAGES = (
    ("compute", "in compute\n"),
    ("alloc", "scheduler.py"),
    ("graph", "graph.py"),
    ("operands", "in make\n"),
    ("call", "context.py"),
)


def _write(fd: int, item: Any) -> None:
    raw = pickle.dumps(item)
    raw = _LENGTH.pack(len(raw)) + raw
    while raw:
        raw = raw[os.write(fd, raw) :]


def _read(fd: int) -> Any:
    def take(n: int) -> bytes:
        parts = b""
        while len(parts) < n:
            part = os.read(fd, n - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    return pickle.loads(take(_LENGTH.unpack(take(_LENGTH.size))[0]))


def main() -> None:
    """Fork workers until the jobs end."""
    kind, devices, jobs, outcomes = sys.argv[1], tuple(sys.argv[2].split(",")), int(sys.argv[3]), int(sys.argv[4])
    if kind == "calls":
        from tests.fuzzing.perform import Calls as Kind  # imported before the fork, so that a fork is fast
    else:
        from tests.fuzzing.files import Files as Kind  # type: ignore[assignment]
    while True:
        pid = os.fork()
        if not pid:
            _work(Kind, devices, jobs, outcomes)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _NO_MORE:
            return
        with contextlib.suppress(BrokenPipeError):
            _write(outcomes, status)


_NO_MORE, _FAILED = 99, 98


def _work(kind: type[Any], devices: tuple[str, ...], jobs: int, outcomes: int) -> None:
    faulthandler.enable(all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if devices == ("CPU",):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    code = _FAILED
    try:
        worker: Worker = kind(devices)
        while True:
            job = _read(jobs)
            if job is None:
                code = 0
                break
            faulthandler.dump_traceback_later(LIMIT if devices == ("CPU",) else _GPU_LIMIT, exit=True)
            outcome = worker(job)
            faulthandler.cancel_dump_traceback_later()
            _write(outcomes, outcome)
    except EOFError:
        code = _NO_MORE
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
