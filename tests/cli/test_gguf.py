"""The commands for GGUF files: what they print, what they write, and how they fail."""

import json
import os
import pty
import subprocess
import sys
import termios

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli


@pytest.fixture
def path(tmp_path, rng):
    values = {
        "general.architecture": "llama",
        "general.name": "bell\a \x1b[31mred\n",
        "u64": np.uint64(2**63),
        "eps": 1e-5,
        "words": ["größe", "\udcff"] + ["w"] * 100,
        "numbers": np.arange(3, dtype=np.int16),
        "nested": [[1], ["x"]],
    }
    tensors = {
        "token_embd.weight": rng.standard_normal((8, 256)),
        "blk.0.attn_q.weight": rng.standard_normal((4, 256)),
        "blk.0.attn_norm.weight": rng.standard_normal(256),
        "scalar": np.array(2.5),
    }
    ggml.write_gguf(tmp_path / "m.gguf", values, tensors)
    return tmp_path / "m.gguf"


def run(capsys, *arguments, code=0):
    assert cli.main([str(a) for a in arguments]) == code
    done = capsys.readouterr()
    if code:
        assert done.out == ""
        assert done.err.startswith("ggml-cffi: ")
        assert done.err.count("\n") == 1
        return done.err
    assert done.err == ""
    return done.out


def test_show(path, capsys):
    head, metadata, tensors = run(capsys, "gguf", "show", path).split("\n\n")
    size = os.path.getsize(path) / 2**20
    assert head.endswith(f"m.gguf: GGUF version 3, {size:.1f} MiB, 4 tensors, 3,329 weights, 32.00 bits each")
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in metadata.splitlines()}
    assert lines["key"] == ["type", "value"]
    assert lines["general.architecture"] == ["STRING", "llama"]
    assert lines["general.name"] == ["STRING", r"'bell\x07 \x1b[31mred\n'"]
    assert lines["u64"] == ["UINT64", "9223372036854775808"]
    assert lines["eps"] == ["FLOAT32", "1e-05"]
    assert lines["words"][0] == "STRING[102]"
    assert lines["words"][1].startswith(r"['größe', '\udcff', 'w', ")
    assert lines["words"][1].endswith("...")
    assert lines["numbers"] == ["INT16[3]", "[0, 1, 2]"]
    assert lines["nested"] == ["ARRAY[2]", "[[1], ['x']]"]
    assert [line.split() for line in tensors.splitlines()] == [
        ["tensor", "type", "shape", "bytes"],
        ["token_embd.weight", "F32", "8", "x", "256", "8,192"],
        ["blk.0.attn_q.weight", "F32", "4", "x", "256", "4,096"],
        ["blk.0.attn_norm.weight", "F32", "256", "1,024"],
        ["scalar", "F32", "-", "4"],
    ]


def test_show_one_of_both(path, capsys):
    assert "attn_q" not in run(capsys, "gguf", "show", path, "--metadata")
    assert "general.name" not in run(capsys, "gguf", "show", path, "--tensors")
    both = run(capsys, "gguf", "show", path, "--tensors", "--metadata")
    assert "attn_q" in both
    assert "general.name" in both


def test_show_as_json(path, capsys):
    found = json.loads(run(capsys, "gguf", "show", path, "--json"))
    assert (found["files"], found["version"]) == ([str(path)], 3)
    assert found["metadata"]["words"][:3] == ["größe", "\udcff", "w"]
    assert len(found["metadata"]["words"]) == 102
    assert found["metadata"]["numbers"] == [0, 1, 2]
    assert found["metadata"]["nested"] == [[1], ["x"]]
    with ggml.GGUFFile(path) as f:
        offset = f.tensors["scalar"].offset
    want = {"name": "scalar", "type": "F32", "shape": [], "bytes": 4, "file": 0, "offset": offset}
    assert found["tensors"][3] == want
    assert "tensors" not in json.loads(run(capsys, "gguf", "show", path, "--json", "--metadata"))
    assert "metadata" not in json.loads(run(capsys, "gguf", "show", path, "--json", "--tensors"))


def test_show_several_files(path, capsys):
    run(capsys, "quantize", path, path.with_name("s.gguf"), "--type", "f16", "--max-size", "3k")
    shown = run(capsys, "gguf", "show", path.with_name("s-00001-of-00003.gguf"))
    assert "3 files, " in shown
    assert shown.splitlines()[-1].split() == ["scalar", "F32", "-", "4", "3"]
    assert "open the first part" in run(capsys, "gguf", "show", path.with_name("s-00002-of-00003.gguf"), code=2)


def test_quantize(path, capsys):
    target = path.with_name("q.gguf")
    out = run(capsys, "quantize", path, target, "--type", "q4_k", "--threads", 1)
    assert out == f"{target}: 0.0 MiB\n"
    with ggml.GGUFFile(target) as f:
        assert [info.dtype.name for info in f.tensors.values()] == ["Q6_K", "Q4_K", "F32", "F32"]
        assert f.metadata["general.file_type"] == 14
    assert "q.gguf exists already; --force replaces it" in run(
        capsys, "quantize", path, target, "--type", "f16", code=2
    )
    run(capsys, "quantize", path, target, "--type", "F16", "--force", "--keep", "token*")
    with ggml.GGUFFile(target) as f:
        assert [info.dtype.name for info in f.tensors.values()] == ["F32", "F16", "F32", "F32"]
    run(capsys, "quantize", path, target, "--type", "q8_0", "--force", "--only", "token*", "--only", "blk*")
    with ggml.GGUFFile(target) as f:
        assert [info.dtype.name for info in f.tensors.values()] == ["Q8_0", "Q8_0", "F32", "F32"]


def test_quantize_with_importances(path, capsys):
    weights = {f"blk.0.attn_q.weight.{what}": np.ones((1, n)) for what, n in (("in_sum2", 256), ("counts", 1))}
    ggml.write_gguf(path.with_name("i.gguf"), {}, weights)
    target = path.with_name("q.gguf")
    assert "IQ2_XXS is useless without importances" in run(capsys, "quantize", path, target, "--type=iq2_xxs", code=2)
    run(capsys, "quantize", path, target, "--type", "iq2_xxs", "--imatrix", path.with_name("i.gguf"))
    with ggml.GGUFFile(target) as f:
        assert f.tensors["blk.0.attn_q.weight"].dtype is ggml.Type.IQ2_XXS


def test_bad_input_is_one_line_and_exit_code_2(path, capsys):
    text, target = path.with_name("text"), path.with_name("q.gguf")
    text.write_text("This is no model at all, only some text.")
    for command in (("gguf", "show", "{}"), ("quantize", "{}", target, "--type", "q4_k")):
        for source, message in (
            (text, "not a GGUF file"),
            (path.with_name("missing"), "No such file"),
            (path.parent, "Is a directory"),
        ):
            assert message in run(capsys, *(str(part).format(source) for part in command), code=2)
    for arguments, message in (
        (("--type", "q9"), "no element type for 'q9'"),
        (("--type", "i32"), "weights are not stored as I32"),
        (("--type", "q4_k", "--only", "x"), "no tensor that matches 'x'"),
        (("--type", "q4_k", "--threads", "0"), "threads must be at least 1"),
        (("--type", "q4_k", "--imatrix", path), "no importance matrix"),
        (("--type", "q4_k", "--max-size", "0"), "max_bytes must be at least 1"),
    ):
        assert message in run(capsys, "quantize", path, target, *arguments, code=2)
    assert "is a folder" in run(capsys, "quantize", path, path.parent, "--type", "q4_k", "--force", code=2)
    assert sorted(os.listdir(path.parent)) == ["m.gguf", "text"]


def test_bad_usage(capsys):
    for arguments in (
        ("gguf",),
        ("gguf", "show"),
        ("quantize", "a", "b"),
        ("quantize", "a", "b", "--type", "q4_k", "--max-size", "much"),
        ("quantize", "a", "b", "--type", "q4_k", "--max-size", "3x"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("5k", 5120), ("500M", 500 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 << 30)]
)
def test_sizes(path, capsys, monkeypatch, text, size):
    seen = []
    monkeypatch.setattr(
        "ggml_cffi.files.quantize_file.quantize_file", lambda *a, max_bytes, **kw: seen.append(max_bytes) or ()
    )
    run(capsys, "quantize", path, "q", "--type", "q4_k", "--max-size", text)
    assert seen == [size]


def test_progress_bar_on_a_terminal(path):
    """A bar where standard error is a terminal; nothing there otherwise, which the tests above look at."""
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    target = path.with_name("q.gguf")
    command = [sys.executable, "-m", "ggml_cffi", "quantize", str(path), str(target), "--type", "q4_k"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, check=True, timeout=100)
    os.set_blocking(main, False)
    shown = os.read(main, 65536)
    os.close(terminal)
    os.close(main)
    assert b"quantizing" in shown
    assert done.stdout.startswith(str(target).encode())
