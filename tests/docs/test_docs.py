"""The documentation: every Python block runs and prints what the page says, and the site builds without warnings."""

import inspect
import os
import re
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from io import StringIO

import pytest
from markdown_it import MarkdownIt

import ggml_cffi
from ggml_cffi import flat, isolate, models, parallel, rpc, server, viz
from ggml_cffi.cli import make_parser
from tests.support import PATIENCE, ROOT, need, run_python

DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "_build" not in path.parts)


def fences(name):
    """Return the fenced blocks of a page: language, first line counted from 0, text."""
    tokens = MarkdownIt().parse((DOCS / name).read_text())
    return [(t.info.strip(), t.map[0] + 1, t.content) for t in tokens if t.type == "fence"]


def code(name):
    """Return the Python code of a page, with its line numbers, which tracebacks name."""
    lines = []
    for language, start, text in fences(name):
        if language == "python":
            lines += [""] * (start - len(lines)) + text.splitlines()
    return "\n".join(lines)


def needs_model(text):
    """Return the markers of a test that runs this code: ``model`` if the code downloads one."""
    return [pytest.mark.model] if "fetch(" in text else []


def gpus(name):
    """Return the number of Vulkan devices that a page needs, from the lines before its title."""
    found = re.match(r"---\ngpus: (\d)\n---\n", (DOCS / name).read_text())
    return int(found[1]) if found else 0


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_model(code(n))) for n in PAGES if code(n)])
def test_the_code_of_a_page_prints_the_output_on_the_page(name):
    # In one process and in order, as a reader runs it. On the CPU, where it takes seconds, unless the page needs a GPU.
    n = gpus(name)
    visible = "99"
    if n:
        need(tuple(f"Vulkan{i}" for i in range(n)))
        visible = os.environ.get("GGML_VK_VISIBLE_DEVICES", "")
    env = {"GGML_VK_VISIBLE_DEVICES": visible} if visible else {}
    done = run_python(code(name), check=False, **env)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    for language, _, text in fences(name):
        if language == "output":
            assert text in done.stdout


@pytest.mark.parametrize("name", PAGES)
def test_every_block_has_a_language_that_the_tests_know(name):
    """No block escapes the tests: they run Python and compare output. The rest is commands and directives."""
    for language, _, _ in fences(name):
        assert language in ("python", "output", "console", "r", "c", "text") or language.startswith("{")


def test_the_site_builds_without_warnings_and_has_names_operations_and_options(tmp_path):
    """One test, so that the site is built once, also by several processes of tests."""
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "GGML_VK_VISIBLE_DEVICES": "99"},
    )
    assert done.returncode == 0, done.stderr
    check_the_reference_has_all_public_names(tmp_path)
    assert "ggml_soft_max_ext" in (tmp_path / "operations.html").read_text()
    check_the_page_of_a_command_has_all_its_options(tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_as_short_as_those_of_the_code(name):
    """Tables, blocks of code, and images cannot be wrapped."""
    lines = (DOCS / name).read_text().splitlines()
    code_lines = {i for t in MarkdownIt().parse("\n".join(lines)) if t.type == "fence" for i in range(*t.map)}
    long = [i + 1 for i, line in enumerate(lines) if len(line) > 120 and i not in code_lines]
    assert [i for i in long if not lines[i - 1].lstrip().startswith(("|", "!["))] == []


def documented(site):
    """Return every Python name that the site describes."""
    raw = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(raw).decode().splitlines()
    return {line.split()[0] for line in lines if re.match(r"\S+ py:", line)}


def check_the_reference_has_all_public_names(site):
    names = documented(site)
    modules = (ggml_cffi, flat, isolate, models, parallel, rpc, server, viz)
    want = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert sorted(want - names) == []


def check_the_page_of_a_command_has_all_its_options(site):
    # Those of `ggml-cffi quantize` stand for all: one directive makes every table from the parser.
    page = (site / "commands" / "quantize.html").read_text()
    parser = make_parser()
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as printed:
        parser.parse_args(["quantize", "--help"])
    options = set(re.findall(r"--[a-z-]+", printed.getvalue())) - {"--help"}
    assert len(options) > 5
    assert [option for option in sorted(options) if option not in page] == []


def test_no_text_installs_the_package_from_an_index_that_lacks_it():
    # From a checkout: `pip install .`, `pip install '.[models]'`.
    files = [
        *(DOCS / name for name in PAGES),
        *ROOT.glob("*.md"),
        *ROOT.glob("examples/*.py"),
        *ROOT.glob("tests/*.md"),
    ]
    files += ROOT.glob("ggml_cffi/**/*.py")
    wrong = re.compile(r"pip install [^`\n]*\bggml-cffi\b")
    assert [str(path) for path in files if wrong.search(path.read_text(encoding="utf-8"))] == []


def test_the_table_of_loading_has_every_argument_of_load():
    table = (DOCS / "models.md").read_text().partition("## Loading")[2].partition("## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == set(inspect.signature(models.load).parameters) - {"path"}


def test_links_to_files_of_the_repository_lead_somewhere():
    # Sphinx does not follow these.
    for name in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (DOCS / name).read_text()):
            assert (DOCS / name).parent.joinpath(target).exists(), f"{name}: {target}"
