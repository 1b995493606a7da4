"""The command: what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import gguf_writer
import llama_float64
import pytest

from ggml_cffi import cli


def run(*arguments, code=0):
    command = [sys.executable, "-m", "ggml_cffi", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=os.environ)
    assert done.returncode == code, done
    return done


def test_devices():
    lines = run("devices").stdout.splitlines()
    assert lines[0].split() == ["device", "type", "free", "total", "description"]
    assert lines[-1].startswith("CPU")
    assert "GiB" in lines[-1]


def test_devices_as_json():
    found = json.loads(run("devices", "--json").stdout)
    assert found[-1]["name"] == "CPU"
    assert found[-1]["memory_total"] >= found[-1]["memory_free"] > 0


def test_version():
    assert "ggml 0.20.2" in run("--version").stdout


def test_run(smollm2):
    done = run("run", smollm2, "-p", "The capital of France is", "--raw", "-n", 8, "--devices", "CPU", "-v")
    assert done.stdout == " Paris.\n\nThe United States has\n"
    assert "0-29 + output + embeddings" in done.stderr
    assert "tokens/s" in done.stderr


def test_run_as_a_chat(smollm2):
    done = run("run", smollm2, "-p", "Hi", "-n", 4, "--devices", "cpu", "--system", "Be brief.", "--threads", 1)
    assert done.stdout.strip()
    assert done.stderr == ""


@pytest.fixture
def model(tmp_path, rng):
    return llama_float64.random_model(tmp_path / "m.gguf", rng)


def refused(*arguments):
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
    assert "No such file" in refused(tmp_path / "missing.gguf", "-p", "x")
    assert "cut short" in refused(cut, "-p", "x")
    assert "'mamba' is not supported; bert, gemma3, llama" in refused(other, "-p", "x")
    assert "not a GGUF file" in refused(text, "-p", "x")
    assert "Is a directory" in refused(tmp_path, "-p", "x")
    assert "no device 'Vulkan9'" in refused(smollm2, "-p", "x", "--devices", "Vulkan9")
    assert "there is no device ''" in refused(smollm2, "-p", "x", "--devices", "")
    assert "n_ctx must be 1 to 8192" in refused(smollm2, "-p", "x", "--devices", "CPU", "--ctx", "8193")
    assert "do not fit the context of 64" in refused(
        smollm2, "-p", "x " * 200, "--raw", "--devices", "CPU", "--ctx", "64"
    )
    assert "no tokens" in refused(smollm2, "-p", "", "--raw", "--devices", "CPU")
    assert "temperature" in refused(smollm2, "-p", "x", "--devices", "CPU", "--temperature", "-1")
    assert "tokenizer" in refused(model, "-p", "x", "--devices", "CPU")


def test_bad_usage():
    for arguments in ((), ("run",), ("nonsense",), ("run", "m", "-p", "x", "-n", "many")):
        done = run(*arguments, code=2)
        assert "usage:" in done.stderr


def test_fetch_of_an_unknown_model():
    assert "no model 'gpt5' to fetch" in run("fetch", "gpt5", code=2).stderr


def test_a_reader_that_goes_away(smollm2):
    command = f"{sys.executable} -m ggml_cffi run {smollm2} -p Hi --raw -n 40 --devices CPU | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=300)
    assert "Traceback" not in done.stderr


def test_tables():
    assert cli.table([("a", "bbb"), ("cc", "d")], right=(1,)) == "a   bbb\ncc    d"
    assert cli.gib(2**31) == "2.0 GiB"
    assert cli.mib(2**20) == "1.0 MiB"


def test_main_in_process(capsys):
    assert cli.main(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
