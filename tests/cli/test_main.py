"""The command as a whole: exit codes, one-line errors, usage."""

import json
import subprocess
import sys

import pytest

import ggml_cffi
from ggml_cffi import cli
from tests.support import PATIENCE, gguf_writer, llama_float64
from tests.support.command import run


def test_the_version_names_ggmls():
    assert f"(ggml {ggml_cffi.GGML_VERSION}, from " in run("--version").stdout


@pytest.fixture
def model(tmp_path, rng):
    return llama_float64.random_model(tmp_path / "m.gguf", rng)


def error_of_run(*arguments):
    done = run("run", *arguments, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("ggml-cffi: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_bad_input_is_one_line_and_exit_code_2(model, tmp_path, smollm2):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2.read_bytes()[:2_000_000])
    other = gguf_writer.write(tmp_path / "other.gguf", {"general.architecture": "mamba"}, {})
    text = tmp_path / "text.gguf"
    text.write_text("This is no model at all, only some text.")
    assert "No such file" in error_of_run(tmp_path / "missing.gguf", "-p", "x")
    assert "cut short" in error_of_run(cut, "-p", "x")
    assert "'mamba' is not supported; bert, gemma3, llama" in error_of_run(other, "-p", "x")
    assert "not a GGUF file" in error_of_run(text, "-p", "x")
    assert "Is a directory" in error_of_run(tmp_path, "-p", "x")
    assert "no device 'Vulkan9'" in error_of_run(smollm2, "-p", "x", "--devices", "Vulkan9")
    assert "there is no device ''" in error_of_run(smollm2, "-p", "x", "--devices", "")
    assert "n_ctx must be 1 to 8192" in error_of_run(smollm2, "-p", "x", "--devices", "CPU", "--ctx", "8193")
    assert "do not fit the context of 64" in error_of_run(
        smollm2, "-p", "x " * 200, "--raw", "--devices", "CPU", "--ctx", "64"
    )
    assert "no tokens" in error_of_run(smollm2, "-p", "", "--raw", "--devices", "CPU")
    assert "temperature" in error_of_run(smollm2, "-p", "x", "--devices", "CPU", "--temperature", "-1")
    assert "tokenizer" in error_of_run(model, "-p", "x", "--devices", "CPU")


def test_bad_usage_prints_the_usage():
    for arguments in ((), ("run",), ("nonsense",), ("run", "m", "-p", "x", "-n", "many")):
        done = run(*arguments, code=2)
        assert "usage:" in done.stderr


def test_a_reader_that_closes_the_pipe_causes_no_traceback(smollm2):
    command = f"{sys.executable} -m ggml_cffi run {smollm2} -p Hi --raw -n 40 --devices CPU | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert "Traceback" not in done.stderr


def test_main_can_be_called_in_this_process(capsys):
    assert cli.main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
