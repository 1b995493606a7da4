"""The pages of the command line: one for each command, with examples that run and print what the page says."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from ggml_cffi import models
from ggml_cffi.cli import make_parser
from tests.docs.test_docs import DOCS, PAGES, fences
from tests.support import PATIENCE, ROOT

COMMAND_PAGES = sorted(name for name in PAGES if name.startswith("commands/"))
SHELL = 'set -e\nggml-cffi() { "$PYTHON" -m ggml_cffi "$@"; }\npython() { "$PYTHON" "$@"; }\n'


def commands():
    """Return the names of the commands, which the help text lists."""
    return sorted(re.findall(r"^    ([a-z-]+)", make_parser().format_help(), re.M))


def shell_lines(text):
    """Return the commands of a block of a page."""
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


def calls(text):
    """Return the arguments of each call of ``ggml-cffi`` in the lines of a shell."""
    found = []
    for line in text.splitlines():
        inner = re.findall(r"\$\((ggml-cffi [^)]*)\)", line)
        outer = re.sub(r'"\$\(ggml-cffi [^)]*\)"', "FILE", line)
        for part in (*inner, *re.split(r"[|;&<>]", outer)):
            words = shlex.split(part.removeprefix("$"), comments=True) if "ggml-cffi " in part else []
            if words[:1] == ["ggml-cffi"]:
                found.append(words[1:])
    return found


def test_each_command_has_a_page():
    assert len(commands()) > 10
    assert sorted(f"commands/{name}.md" for name in ("index", *commands())) == COMMAND_PAGES


@pytest.mark.parametrize("page", [name for name in COMMAND_PAGES if name != "commands/index.md"])
def test_the_page_of_a_command_has_its_arguments_examples_and_exit_codes(page):
    text = (DOCS / page).read_text()
    command = page.removeprefix("commands/").removesuffix(".md")
    assert re.match(rf"# `ggml-cffi {command}\b.*`\n\n[A-Z]", text)
    assert re.search(rf"^```\{{command\}} {command}\b", text, re.M)
    assert text.count(f"$ ggml-cffi {command}") >= 1
    assert "## Exit code" in text


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_the_parser_accepts_the_calls_on_a_page(page):
    parser = make_parser()
    for language, _, text in fences(page):
        for words in calls(text) if language in ("console", "text") else ():
            if "--help" not in words and "--version" not in words:
                parser.parse_args(words)


@pytest.mark.parametrize("page", COMMAND_PAGES)
def test_the_examples_of_a_command_print_the_output_on_the_page(page, tmp_path):
    # On the CPU, where they take seconds. A block of text after a command has figures that depend on the machine.
    (tmp_path / "smollm2.gguf").symlink_to(models.fetch("smollm2"))
    env = {**os.environ, "GGML_VK_VISIBLE_DEVICES": "99", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    printed = ""
    for language, _, text in fences(page):
        if language == "console":
            script = SHELL + "\n".join(line for line in shell_lines(text) if not line.startswith("ln "))
            done = subprocess.run(
                ["bash", "-c", script],
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
                cwd=tmp_path,
                env=env,
            )
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        elif language == "output":
            assert text in printed
