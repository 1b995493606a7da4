"""Rules of the house that only the source shows: imports point down, modules stay small, docstrings begin well.

These tests read the code instead of running it: CONTRIBUTING says what each rule is for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "ggml_cffi"
GENERATED = {"enums", "c.__init__", "c._decl", "ops.__init__", "flat._ops"}

#: Packages from the top down; those of one line do not import one another.
ORDER = [
    "cli",
    "server",
    "onnx",
    "models",
    "parallel isolate flat",
    "session viz",
    "train",
    "scheduler",
    "ops files rpc",
    "core",
    "c",
    "errors enums",
]
LEVEL = {name: -i for i, names in enumerate(ORDER) for name in names.split()}

#: Imports that point up, each with its reason.
SANCTIONED = {
    ("core.operators", "ops"): "numpy's operators of a tensor are operations: one-line methods that delegate",
    ("core.tensor_metadata", "core.context"): "for types only: a tensor names the context that holds it",
    ("scheduler.graph", "train.gradients"): "Graph.backward is a one-line method that delegates",
    ("scheduler.graph", "viz"): "Graph.draw is a one-line method that delegates",
    ("scheduler.scheduler", "viz"): "Scheduler.report, draw and profile are one-line methods that delegate",
}

LONGEST_MODULE, LONGEST_FUNCTION, MOST_METHODS = 500, 50, 30
#: First words of a docstring that make a reader guess.
BAD_FIRST = re.compile(
    r"(what|who|whom|whose|which|whether|how|that|those|where|when|why|as|has|have)\b", re.IGNORECASE
)
#: A function's docstring begins with an imperative verb: none of these, which begin a noun phrase or a statement.
NOUN_FIRST = re.compile(
    r"(the|a|an|this|these|some|any|all|each|every|one|two|no|it|its|of|for|from|to|in|on|by|with|without|not|true|"
    r"bytes|tokens|number|numbers|name|names|if|how)\b|``|:|-?\d",
    re.IGNORECASE,
)


def modules() -> dict[str, ast.Module]:
    """Parse every module that a person wrote; the key is its dotted name inside the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name not in GENERATED and not name.startswith("lib."):
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules of the package that ``tree`` imports anywhere, lazily or for types only included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "ggml_cffi":
            base = node.module.split(".")[1:]
            for alias in node.names:
                parts = [*base, alias.name]
                while parts and not _is_module(parts):
                    parts.pop()
                yield ".".join(parts)


def _is_module(parts: list[str]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


EDGES = {(name, target) for name, tree in MODULES.items() for target in imports(tree)}


def sanctioned(name: str, target: str) -> bool:
    return any(name == a and (target == b or target.startswith(f"{b}.")) for a, b in SANCTIONED)


def test_imports_point_down():
    up = [
        f"{name} imports {target}"
        for name, target in sorted(EDGES)
        if (here := name.partition(".")[0]) in LEVEL
        and (there := target.partition(".")[0]) != here
        and LEVEL.get(there, 1) >= LEVEL[here]
        and not sanctioned(name, target)
    ]
    assert not up


def test_no_module_takes_part_in_a_circle_of_imports():
    graph: dict[str, set[str]] = {}
    for name, target in EDGES:
        if not sanctioned(name, target):
            end = f"{target}.__init__" if f"{target}.__init__" in MODULES else target
            graph.setdefault(name, set()).add(end)
    circles = []
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += graph.get(at, ())
        if start in seen:
            circles.append(start)
    assert not sorted(circles)


def test_each_sanctioned_import_is_still_there():
    gone = [pair for pair in SANCTIONED if not any(sanctioned(*edge) and edge[0] == pair[0] for edge in EDGES)]
    assert not gone


def test_the_root_holds_packages_only():
    assert {name for name in MODULES if "." not in name} == {"__init__", "__main__", "errors"}


@pytest.mark.parametrize("name", MODULES)
def test_sizes(name):
    """A module, class or function past the limit says why in its docstring ("long because ...")."""
    tree = MODULES[name]
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    found = []
    if len(path.read_text(encoding="utf-8").splitlines()) > LONGEST_MODULE and not _excused(tree):
        found.append(f"{name} has more than {LONGEST_MODULE} lines")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            length = (node.end_lineno or 0) - (doc or 0)
            if length > LONGEST_FUNCTION and not _excused(node):
                found.append(f"{name}.{node.name} has {length} lines")
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef) for m in node.body)
            if methods > MOST_METHODS and not _excused(node):
                found.append(f"{name}.{node.name} has {methods} methods")
    assert not found


def _excused(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "ong because" in (ast.get_docstring(node) or "").partition("\n\n")[0]


def _documented(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                yield getattr(node, "name", "module"), node, doc


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_begin_with_a_verb_or_a_noun_phrase(name):
    bad = []
    for where, node, doc in _documented(MODULES[name]):
        first = doc.partition("\n")[0]
        if BAD_FIRST.match(first) or (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node) and _is_noun(first)
        ):
            bad.append(f"{where}: {first}")
    assert not bad


SENTENCE = re.compile(r"(?:^|[.!?] )((?:What|Who|Whom|Which|Whether|How|Those that)\b[^.?!]{0,60})")


@pytest.mark.parametrize("name", MODULES)
def test_no_sentence_opens_with_a_question_word(name):
    """Sentences of docstrings, those of attributes included, name their subject first."""
    texts = (
        " ".join(node.value.value.split())
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )
    assert not [opening for text in texts for opening in SENTENCE.findall(text)]


def _is_noun(line: str) -> bool:
    return NOUN_FIRST.match(line) is not None


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function reads as an attribute: its docstring is a noun phrase then."""
    names = [d.id if isinstance(d, ast.Name) else getattr(d, "attr", "") for d in node.decorator_list]
    return any(name in ("property", "cached_property", "setter") for name in names)


def test_a_gguf_header_is_read_without_device_code():
    """Modules that ``files`` imports, followed to the end, have no device, backend or buffer among them."""
    seen, todo = set(), [name for name in MODULES if name.startswith("files.")]
    while todo:
        at = todo.pop()
        if at not in seen:
            seen.add(at)
            todo += [target for name, target in EDGES if name == at]
    assert not seen & {"core.device", "core.backend", "core.buffer", "core.context", "core.tensor"}


def test_every_package_has_a_place_in_the_order_of_imports():
    """Every package of the house has a place in the order of imports."""
    rooms = {path.name for path in Path(PACKAGE).iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(LEVEL)


#: Underscore names of others that tests outside this folder may use, each with its owner.
FOREIGN = {
    "_exit": "os",
    "_fixtureinfo": "pytest",
    "_ipython_display_": "IPython, which asks every object for it",
    "_src_transpose": "a parameter of ggml's own test cases",
}
PRIVATE = re.compile(r"_[a-z]\w*", re.IGNORECASE)
#: A private name of another object in a string, such as code for a process.
PRIVATE_IN_TEXT = re.compile(r"\b(?!(?:self|cls)\.)\w+\.(_[a-z]\w*)", re.IGNORECASE)
#: Functions whose second argument names an attribute of the first; the last one is mock's.
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "object"}


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of each use of a private name of another object, in strings with code as well."""
    for node in ast.walk(tree):
        owner: ast.expr | None = None
        names: list[str] = []
        match node:
            case ast.Attribute(owner, name):
                names = [name]
            case ast.Call(function, [owner, ast.Constant(str(name)), *_]):
                names = [name] if ast.unparse(function).rpartition(".")[2] in BY_NAME else []
            case ast.ImportFrom(str(module), aliases) if module.partition(".")[0] == "ggml_cffi":
                names = [*module.split("."), *(alias.name for alias in aliases)]
            case ast.Constant(str(text)):
                names = PRIVATE_IN_TEXT.findall(text)
        if owner is None or ast.unparse(owner) not in ("self", "cls", "super()"):
            yield from ((node.lineno, name) for name in names if PRIVATE.fullmatch(name))


def test_tests_outside_this_folder_use_no_private_names():
    """Tests of behaviour survive a change of the code inside; those that look inside belong to this folder."""
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if "internals" not in path.parts
        for line, name in private_names(ast.parse(path.read_text(encoding="utf-8")))
        if name not in FOREIGN
    ]
    assert not found
