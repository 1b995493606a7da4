"""Atomic writes: a write that fails or is interrupted leaves no file and no temporary file."""

import errno
import itertools
import os
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import PATIENCE, ROOT
from tests.support.gguf_reader import read


def failing(at):
    """Return tensors of which the last calls ``at`` when it is written."""
    return {"a": np.ones(100), "b": np.ones(100), "c": ggml.LazyTensor((3,), "f32", at)}


def stop(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("max_bytes", [None, 600])
@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__
)
def test_a_failed_write_leaves_the_old_file(path, error, max_bytes):
    path.write_bytes(b"before")
    with pytest.raises(type(error)):
        ggml.write_gguf(path, {}, failing(stop(error)), max_bytes=max_bytes)
    assert os.listdir(path.parent) == ["out.gguf"]
    assert path.read_bytes() == b"before"


def test_the_file_gets_its_name_when_it_is_complete(path):
    seen = []
    ggml.write_gguf(
        path, {}, {"t": ggml.LazyTensor((1,), "f32", lambda: [seen.append(os.listdir(path.parent)) or 1.0])}
    )
    ((temporary,),) = seen
    assert temporary.startswith(".")
    assert os.listdir(path.parent) == ["out.gguf"]


def test_a_failed_rename_removes_all_parts(path, monkeypatch):
    """No file of several stays if one of them cannot be renamed."""
    replace, count = os.replace, itertools.count()

    def fail(*names):
        if next(count) == 1:
            raise OSError(errno.EIO, "broken")
        replace(*names)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="broken"):
        ggml.write_gguf(path, {}, {"a": np.ones(100), "b": np.ones(100), "c": np.ones(100)}, max_bytes=600)
    assert os.listdir(path.parent) == []


def test_existing_targets_are_replaced_or_refused(path):
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError, match=r"out.gguf exists already"):
        ggml.write_gguf(path, {}, {}, overwrite=False)
    assert path.read_bytes() == b"before"
    link = path.with_name("link.gguf")
    link.symlink_to(path.name)
    ggml.write_gguf(link, {"k": 1}, {})
    assert link.is_symlink()
    assert read(path)[0] == {"k": 1}
    os.mkfifo(path.with_name("fifo"))
    with pytest.raises(OSError, match="fifo is not a regular file"):
        ggml.write_gguf(path.with_name("fifo"), {}, {})
    with pytest.raises(IsADirectoryError, match="is a folder"):
        ggml.write_gguf(path.parent, {}, {})
    with pytest.raises(FileNotFoundError):
        ggml.write_gguf(path.parent / "missing" / "x.gguf", {}, {})


def test_ctrl_c_leaves_no_file(path):
    """Send a real signal to a child process in the middle of the second tensor."""
    code = f"""
import os, signal, numpy as np, ggml_cffi as ggml
def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGINT)
x = np.ones((900, 1024))
ggml.write_gguf({str(path)!r}, {{}}, {{"a": x, "b": (x, "q8_0")}}, progress=progress)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, timeout=PATIENCE
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(path.parent) == []


def test_a_replaced_file_keeps_its_mode_and_a_new_one_follows_the_umask(path):
    for mode in (0o640, 0o600, 0o444):
        path.write_bytes(b"before")
        path.chmod(mode)
        ggml.write_gguf(path, {}, {"a": np.ones(3)})
        assert stat.S_IMODE(path.stat().st_mode) == mode
    path.unlink()
    old = os.umask(0o027)
    try:
        ggml.write_gguf(path, {}, {"a": np.ones(3)})
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
