"""The command ``quantize``: the files that it writes, and its errors."""

import os
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli
from ggml_cffi.core.text import size
from tests.support import PATIENCE


def test_quantize_writes_the_types_that_are_asked_for(path, run_main):
    target = path.with_name("q.gguf")
    out = run_main("quantize", path, target, "--type", "q4_k", "--threads", 1)
    n = 8 * 256 + 4 * 256 + 256 + 1
    before = f"{size(4 * n)} (32.00 bits per weight)"
    after = 8 * 210 + 4 * 144 + 4 * (256 + 1)
    assert out.splitlines() == [
        f"{target}: {size(os.path.getsize(target))}",
        f"weights: {before} before, {size(after)} ({8 * after / n:.2f} bits per weight) after",
    ]
    with ggml.GGUFFile(target) as f:
        assert [info.dtype.name for info in f.tensors.values()] == ["Q6_K", "Q4_K", "F32", "F32"]
        assert f.metadata["general.file_type"] == 14
    error = run_main("quantize", target, path.with_name("r.gguf"), "--type", "q5_k_m", code=2)
    assert "1 weight would be quantized a second time (from Q4_K)" in error
    assert error.endswith("allow it with allow_requantize (--allow-requantize)\n")
    run_main("quantize", target, path.with_name("r.gguf"), "--type", "q5_k_m", "--allow-requantize")
    assert "q.gguf exists already; --force replaces it" in run_main("quantize", path, target, "--type", "f16", code=2)
    run_main("quantize", path, target, "--type", "F16", "--force", "--keep", "token*")
    with ggml.GGUFFile(target) as f:
        assert [info.dtype.name for info in f.tensors.values()] == ["F32", "F16", "F32", "F32"]
    run_main("quantize", path, target, "--type", "q8_0", "--force", "--only", "token*", "--only", "blk*")
    with ggml.GGUFFile(target) as f:
        assert [info.dtype.name for info in f.tensors.values()] == ["Q8_0", "Q8_0", "F32", "F32"]


def test_quantize_uses_an_importance_matrix(path, run_main):
    weights = {f"blk.0.attn_q.weight.{what}": np.ones((1, n)) for what, n in (("in_sum2", 256), ("counts", 1))}
    ggml.write_gguf(path.with_name("i.gguf"), {}, weights)
    target = path.with_name("q.gguf")
    assert "IQ2_XXS needs importances" in run_main("quantize", path, target, "--type=iq2_xxs", code=2)
    run_main("quantize", path, target, "--type", "iq2_xxs", "--imatrix", path.with_name("i.gguf"))
    with ggml.GGUFFile(target) as f:
        assert f.tensors["blk.0.attn_q.weight"].dtype is ggml.Type.IQ2_XXS


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("1", 1), ("5k", 5120), ("500M", 500 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 << 30)]
)
def test_max_size_takes_binary_units(path, run_main, monkeypatch, text, n_bytes):
    seen = []
    monkeypatch.setattr(
        "ggml_cffi.files.quantize_file", lambda source, *a, max_bytes, **kw: seen.append(max_bytes) or (source,)
    )
    run_main("quantize", path, "q", "--type", "q4_k", "--max-size", text)
    assert seen == [n_bytes]


@pytest.mark.parametrize("text", ["much", "2X", "-1", "1e3", "inf"])
def test_max_size_is_refused_as_every_other_size_is(path, capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["quantize", str(path), str(path.with_name("q")), "--type", "q4_k", f"--max-size={text}"])
    assert f"{text!r} is no size: use a number of bytes, or a text such as 512M or 24G" in capsys.readouterr().err


def test_a_progress_bar_is_shown_on_a_terminal(path):
    """Without a terminal standard error stays empty: the other tests check that."""
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    target = path.with_name("q.gguf")
    command = [sys.executable, "-m", "ggml_cffi", "quantize", str(path), str(target), "--type", "q4_k"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True, timeout=PATIENCE)
    os.set_blocking(main, False)
    shown = os.read(main, 65536)
    os.close(terminal)
    os.close(main)
    assert b"quantizing" in shown
    assert done.stdout.startswith(str(target).encode())
