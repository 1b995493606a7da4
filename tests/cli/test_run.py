"""The command ``run``: one answer, conversations from a pipe and on a terminal."""

import json
import os
import re
import subprocess
import sys

import pexpect

from ggml_cffi import models
from ggml_cffi.cli.run import shorten_conversation
from tests.support import PATIENCE
from tests.support.byte_level_model import byte_level_model
from tests.support.command import run


def test_run_continues_a_prompt_and_prints_the_placement(smollm2):
    done = run("run", smollm2, "-p", "The capital of France is", "--raw", "-n", 8, "--devices", "CPU", "-v")
    assert done.stdout == " Paris.\n\nThe United States has\n"
    assert "0-29 + output + embeddings" in done.stderr
    assert "tokens/s" in done.stderr


def test_run_answers_through_the_chat_template(smollm2):
    done = run("run", smollm2, "-p", "Hi", "-n", 4, "--devices", "cpu", "--system", "Be brief.", "--threads", 1)
    assert done.stdout.strip()
    assert done.stderr == ""


def test_a_deterministic_run_has_the_answer_of_a_deterministic_model(smollm2):
    arguments = ("--raw", "-p", "Once upon a time", "-n", 8, "--temperature", 0.8, "--seed", 4, "--ctx", 256)
    done = run("run", smollm2, *arguments, "--devices", "CPU", "--threads", 1, "--deterministic")
    with models.load(smollm2, ["CPU"], n_ctx=256, n_threads=1, deterministic=True) as model:
        assert done.stdout == "".join(model.generate("Once upon a time", 8, temperature=0.8, seed=4)) + "\n"


def test_run_prints_json(smollm2):
    done = run("run", smollm2, "-p", "The capital of France is", "--raw", "-n", 8, "--devices", "CPU", "--json")
    found = json.loads(done.stdout)
    assert found["text"] == " Paris.\n\nThe United States has"
    assert (found["prompt_tokens"], found["reused_tokens"], found["decoded_tokens"]) == (5, 0, 8)
    assert found["finish_reason"] == "length"
    assert found["decoded_tokens_per_second"] > 0
    assert "need a prompt" in run("run", smollm2, "--json", code=2).stderr


def test_stop_texts_and_sampling_options_are_used(smollm2):
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
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert len(done.stdout.splitlines()) >= 3
    assert done.stderr.count("prompt:") == 3
    assert "of them reused" in done.stderr  # the second question reuses the KV cache of the first


def test_a_conversation_on_a_terminal(smollm2):
    """Ctrl-C stops the answer and not the program."""
    command = f"-m ggml_cffi run {smollm2} --devices CPU --threads 2 --ctx 2048"
    child = pexpect.spawn(sys.executable, command.split(), timeout=PATIENCE, encoding="utf-8", env={**os.environ})
    child.expect("Ctrl-C stops an answer")
    child.expect("> ")
    child.sendline("Write a very long story about the sea, with many chapters.")
    child.expect("chapters.\r\n.{40}")  # a part of the answer has been printed
    child.sendintr()
    child.expect(r"\[stopped\]")
    child.expect("> ")
    child.sendintr()  # at the prompt Ctrl-C discards the line
    child.expect("> ")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_question_that_fails_does_not_end_the_conversation(tmp_path):
    refuses = "{% if '!' in m.content %}{{ raise_exception('not this') }}{% endif %}"
    template = f"{{% for m in messages %}}{refuses}{{{{ m.content }}}}{{% endfor %}}"
    path = byte_level_model(tmp_path / "m.gguf", template)
    text = "a\n" + "x" * 400 + "\n!\nb\n"
    options = ("--devices", "CPU", "-n", 3, "--ctx", 128, "--threads", 1, "-v")
    done = run("run", path, *options, stdin=text)
    assert "400 tokens do not fit the context of 128" in done.stderr
    assert "not this" in done.stderr
    prompts = re.findall(r"prompt: (\d+) tokens", done.stderr)
    assert prompts[0] == "1"
    assert int(prompts[1]) < 20  # "a", its answer and "b"
    assert len(prompts) == 2


def test_characters_that_the_terminal_lacks_are_replaced(tmp_path, monkeypatch):
    path = byte_level_model(tmp_path / "m.gguf")
    options = ("--devices", "CPU", "--raw", "-p", "hi", "-n", 8, "--ctx", 256, "--threads", 1)
    full = run("run", path, *options).stdout
    assert not full.isascii()
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert run("run", path, *options).stdout == full.encode("ascii", "replace").decode()
    assert json.loads(run("run", path, *options, "--json").stdout)["text"] + "\n" == full


def test_a_conversation_longer_than_the_context_loses_its_oldest_messages(smollm2):
    with models.load(smollm2, ["CPU"], n_ctx=128, n_threads=1) as model:
        messages = [{"role": "system", "content": "Be brief."}]
        for i in range(6):
            messages += [
                {"role": "user", "content": f"Question {i}? " * 3},
                {"role": "assistant", "content": "Yes. " * 6},
            ]
        messages.append({"role": "user", "content": "And now?"})
        kept = shorten_conversation(model, messages)
        assert kept[0] == messages[0]
        assert kept[-1] == messages[-1]
        assert kept[1]["role"] == "user"
        assert 3 <= len(kept) < len(messages)
        assert len(model.tokenize(model.apply_chat_template(kept))) <= 96
        assert shorten_conversation(model, kept) == kept
