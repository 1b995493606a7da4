"""The command: what it prints, and how it fails."""

import json
import os
import subprocess
import sys

import pytest

from ggml_cffi import cli
from tests.support import gguf_writer, llama_float64


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


def test_json(smollm2):
    done = run("run", smollm2, "-p", "The capital of France is", "--raw", "-n", 8, "--devices", "CPU", "--json")
    found = json.loads(done.stdout)
    assert found["text"] == " Paris.\n\nThe United States has"
    assert (found["prompt_tokens"], found["reused_tokens"], found["decoded_tokens"]) == (5, 0, 7)
    assert found["decoded_tokens_per_second"] > 0
    assert "need a prompt" in run("run", smollm2, "--json", code=2).stderr


def test_stop_and_sampling(smollm2):
    done = run("run", smollm2, "-p", "The capital of France is", "--raw", "-n", 8, "--devices", "CPU", "--stop", "\n")
    assert done.stdout == " Paris.\n"
    options = ("--temperature", 1, "--seed", 3, "--min-p", 0.1, "--repeat-penalty", 1.1)
    texts = {run("run", smollm2, "-p", "Hi", "-n", 6, "--devices", "CPU", *options).stdout for _ in range(2)}
    assert len(texts) == 1


def test_a_conversation_from_a_pipe(smollm2):
    command = [
        sys.executable,
        "-m",
        "ggml_cffi",
        "run",
        str(smollm2),
        "--devices",
        "CPU",
        "-n",
        "6",
        "--ctx",
        "512",
        "-v",
    ]
    text = "Hi\n\nWhat did I say?\n/new\nHello\n/exit\nnever asked\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=300)
    assert len(done.stdout.splitlines()) >= 3
    assert done.stderr.count("prompt:") == 3
    assert "of them reused" in done.stderr  # the second question goes on where the first answer ended


def test_a_conversation_on_a_terminal(smollm2):
    """Ctrl-C stops the answer, not the program."""
    import pexpect

    command = f"-m ggml_cffi run {smollm2} --devices CPU --threads 2 --ctx 2048"
    child = pexpect.spawn(sys.executable, command.split(), timeout=120, encoding="utf-8", env={**os.environ})
    child.expect("Ctrl-C stops an answer")
    child.expect("> ")
    child.sendline("Write a very long story about the sea, with many chapters.")
    child.expect("chapters.\r\n.{40}")  # some of the answer is there
    child.sendintr()
    child.expect(r"\[stopped\]")
    child.expect("> ")
    child.sendintr()  # at the prompt it drops the line
    child.expect("> ")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_conversations_that_outgrow_the_context(smollm2):
    from ggml_cffi import models
    from ggml_cffi.cli.run import _shortened

    with models.load(smollm2, ["CPU"], n_ctx=128, n_threads=1) as model:
        messages = [{"role": "system", "content": "Be brief."}]
        for i in range(6):
            messages += [
                {"role": "user", "content": f"Question {i}? " * 3},
                {"role": "assistant", "content": "Yes. " * 6},
            ]
        messages.append({"role": "user", "content": "And now?"})
        kept = _shortened(model, messages)
        assert kept[0] == messages[0]
        assert kept[-1] == messages[-1]
        assert kept[1]["role"] == "user"
        assert 3 <= len(kept) < len(messages)
        assert len(model.tokenize(model.apply_chat_template(kept))) <= 96
        assert _shortened(model, kept) == kept


def test_bench(smollm2):
    done = run("bench", smollm2, "--devices", "CPU", "-p", 16, "-n", 4, "-r", 2, "--threads", 2)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "size", "devices", "split", "test", "tokens/s"]
    assert [line.split()[5] for line in lines[1:]] == ["pp16", "tg4"]
    found = json.loads(run("bench", smollm2, "--devices", "CPU", "-p", 0, "-n", 4, "-r", 1, "--json").stdout)
    assert [(f["test"], f["devices"]) for f in found] == [("tg4", "CPU")]
    assert found[0]["tokens_per_second"] > 0
    assert "--rounds at least 1" in run("bench", smollm2, "-r", 0, code=2).stderr


def test_perplexity(smollm2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    done = run("perplexity", smollm2, text, "--ctx", 32, "--devices", "CPU")
    assert done.stdout.startswith("perplexity ")
    found = json.loads(run("perplexity", smollm2, text, "--ctx", 32, "--devices", "CPU", "--json").stdout)
    assert 1 < found["perplexity"] < 100
    assert found["tokens"] == 15 * (len(text.read_text().split()) // 29)
    assert "do not fill a window" in run("perplexity", smollm2, text, "--devices", "CPU", code=2).stderr


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
