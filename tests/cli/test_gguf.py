"""The command ``gguf show``: metadata and tensors as text and as JSON, and the errors of ``gguf`` and ``quantize``."""

import json
import os

import pytest

import ggml_cffi as ggml
from ggml_cffi import cli
from ggml_cffi.core.text import size


def test_show_prints_metadata_and_tensors(path, run_main):
    head, metadata, tensors = run_main("gguf", "show", path).split("\n\n")
    assert head.endswith(
        f"m.gguf: GGUF version 3, {size(os.path.getsize(path))}, 4 tensors, 3,329 weights, 32.00 bits each"
    )
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


def test_show_can_be_limited_to_metadata_or_tensors(path, run_main):
    assert "attn_q" not in run_main("gguf", "show", path, "--metadata")
    assert "general.name" not in run_main("gguf", "show", path, "--tensors")
    both = run_main("gguf", "show", path, "--tensors", "--metadata")
    assert "attn_q" in both
    assert "general.name" in both


def test_show_prints_json(path, run_main):
    found = json.loads(run_main("gguf", "show", path, "--json"))
    assert (found["files"], found["version"]) == ([str(path)], 3)
    assert found["metadata"]["words"][:3] == ["größe", "\udcff", "w"]
    assert len(found["metadata"]["words"]) == 102
    assert found["metadata"]["numbers"] == [0, 1, 2]
    assert found["metadata"]["nested"] == [[1], ["x"]]
    with ggml.GGUFFile(path) as f:
        offset = f.tensors["scalar"].offset
    want = {"name": "scalar", "type": "F32", "shape": [], "bytes": 4, "file": 0, "offset": offset}
    assert found["tensors"][3] == want
    assert "tensors" not in json.loads(run_main("gguf", "show", path, "--json", "--metadata"))
    assert "metadata" not in json.loads(run_main("gguf", "show", path, "--json", "--tensors"))


def test_show_covers_all_files_of_a_split_model(path, run_main):
    run_main("quantize", path, path.with_name("s.gguf"), "--type", "f16", "--max-size", "3k")
    shown = run_main("gguf", "show", path.with_name("s-00001-of-00003.gguf"))
    assert "3 files, " in shown
    assert shown.splitlines()[-1].split() == ["scalar", "F32", "-", "4", "3"]
    assert "open the first part" in run_main("gguf", "show", path.with_name("s-00002-of-00003.gguf"), code=2)


def test_bad_input_is_one_line_and_exit_code_2(path, run_main):
    text, target = path.with_name("text"), path.with_name("q.gguf")
    text.write_text("This is no model at all, only some text.")
    for command in (("gguf", "show", "{}"), ("quantize", "{}", target, "--type", "q4_k")):
        for source, message in (
            (text, "not a GGUF file"),
            (path.with_name("missing"), "No such file"),
            (path.parent, "Is a directory"),
        ):
            assert message in run_main(*(str(part).format(source) for part in command), code=2)
    for arguments, message in (
        (("--type", "q9"), "weights have no type 'q9'"),
        (("--type", "i32"), "weights are not stored as I32"),
        (("--type", "q4_k", "--only", "x"), "no tensor that matches 'x'"),
        (("--type", "q4_k", "--threads", "0"), "threads must be at least 1"),
        (("--type", "q4_k", "--imatrix", path), "no importance matrix"),
        (("--type", "q4_k", "--max-size", "0"), "max_bytes must be at least 1"),
    ):
        assert message in run_main("quantize", path, target, *arguments, code=2)
    assert "is a folder" in run_main("quantize", path, path.parent, "--type", "q4_k", "--force", code=2)
    assert sorted(os.listdir(path.parent)) == ["m.gguf", "text"]


def test_bad_usage_prints_the_usage(capsys):
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
