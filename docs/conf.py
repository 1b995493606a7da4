"""Configuration of Sphinx for these pages: ``make docs``."""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.ext.napoleon import Config, NumpyDocstring
from sphinx.util.docutils import SphinxDirective

import ggml_cffi
from ggml_cffi.cli import make_parser

project = "ggml_cffi"
copyright = "the ggml_cffi authors"  # noqa: A001 - Sphinx's name
version = release = ggml_cffi.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore = [
    ("py:class", "_R"),  # a type variable beside a name that only type checkers import
    ("py:class", "fastapi.applications.FastAPI"),  # FastAPI's own documentation names it fastapi.FastAPI
]
smartquotes = False  # would turn the two hyphens of options into a dash

html_theme = "furo"
html_title = f"ggml_cffi {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

add_module_names = False
autoclass_content = "class"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_type_aliases = {f"npt.{name}": f"numpy.typing.{name}" for name in ("ArrayLike", "DTypeLike")}
suppress_warnings = ["config.cache"]

_NAPOLEON = Config(napoleon_use_rtype=False)
#: Modules that the reference names in full; the names of all others are given as ``ggml_cffi.name``.
_OWN_PAGES = tuple(
    f"ggml_cffi.{name}" for name in ("enums", "flat", "viz", "models", "isolate", "parallel", "rpc", "server")
)


def _complete(_app: Any, docname: str, source: list[str]) -> None:
    """Add the lists to a page that only the code has."""
    if docname == "reference/operations":
        source[0] += "\n\n".join(_operations())
    if docname == "reference/flat":
        source[0] += _flat_numbers()


def _operations() -> list[str]:
    """List every operation, module by module, by the name that users call."""
    folder = Path(ggml_cffi.ops.__path__[0])
    parts = [""]
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        if path.stem.startswith("_") or not any(_is_all(node) for node in tree.body):
            continue
        module = importlib.import_module(f"ggml_cffi.ops.{path.stem}")
        summary = (module.__doc__ or "").split("\n")[0].rstrip(".").replace("``", "`")
        lines = [f"## {summary}", "", "```{eval-rst}", ".. currentmodule:: ggml_cffi"]
        for name in sorted(module.__all__):
            kind = "autoclass" if isinstance(getattr(module, name), type) else "autofunction"
            lines.append(f".. {kind}:: {name}")
        parts.append("\n".join([*lines, "```"]))
    return [*parts, ""]


def _flat_numbers() -> str:
    """List the constants of the flat API, with their values."""
    from ggml_cffi import flat

    names = [name for name in flat.__all__ if not callable(getattr(flat, name))]
    lines = [f".. py:data:: {name}\n   :value: {int(getattr(flat, name))}" for name in names]
    return "\n".join(["", "## Numbers", "", "```{eval-rst}", ".. currentmodule:: ggml_cffi.flat", *lines, "```", ""])


class CommandDirective(SphinxDirective):
    """The directive ``command``: the usage line of a command and a table of its arguments, from its parser."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the usage line and the tables of the command that the argument names, such as ``gguf show``.

        Without an argument it is the command ``ggml-cffi`` itself.
        """
        parser = make_parser()
        for word in " ".join(self.arguments).split():
            parser = next(action for action in parser._actions if _is_commands(action)).choices[word]
        formatter = argparse.HelpFormatter(parser.prog, width=88)  # the default width depends on the terminal
        formatter.add_usage(None, parser._actions, parser._mutually_exclusive_groups, prefix="")
        usage = formatter.format_help().strip()
        commands = [
            (c.dest, c.help) for action in filter(_is_commands, parser._actions) for c in action._choices_actions
        ]
        shown = [action for action in parser._actions if action.help and "--help" not in action.option_strings]
        arguments = [(_invocation(action), _help(action, parser)) for action in shown]
        tables = [
            _table((head, "meaning"), rows) for head, rows in (("command", commands), ("argument", arguments)) if rows
        ]
        return [nodes.literal_block(usage, usage, language="text"), *tables]


def _is_commands(action: argparse.Action) -> bool:
    return isinstance(action, argparse._SubParsersAction)


def _invocation(action: argparse.Action) -> str:
    """Return an argument as users write it: ``-p, --prompt PROMPT``."""
    name = str(action.metavar or (action.dest.upper() if action.option_strings else action.dest))
    value = {"+": f"{name}...", "?": f"[{name}]", 0: ""}.get(action.nargs, name)  # type: ignore[arg-type]
    return f"{', '.join(action.option_strings)} {value}".strip()


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    return f"{text} (required)" if action.required and action.option_strings else text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    """Return a table whose first column is code and whose other columns are plain text."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in head), cols=len(head))
    for kind, lines in ((nodes.thead, [head]), (nodes.tbody, rows)):
        part = kind()
        for line in lines:
            first = nodes.Text(line[0]) if kind is nodes.thead else nodes.literal(line[0], line[0])
            cells = [first, *map(nodes.Text, line[1:])]
            part += nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))
        group += part
    return nodes.table("", group)


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def _docstring(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Convert a numpy-style docstring to the form that Sphinx reads.

    Napoleon as an extension takes the first colon of a property for the end of a type, and a paragraph after a section
    for a part of that section. The paragraphs that name the C function therefore go before the first section.
    """
    paragraphs = [p.split("\n") for p in "\n".join(lines).strip("\n").split("\n\n")]
    sections = [i for i, p in enumerate(paragraphs) if _is_section(p)]
    if sections:
        first = sections[0]
        prose = [p for p in paragraphs[first:] if not _is_section(p) and not any(x[:1] in (" ", ">") for x in p if x)]
        rest = [p for p in paragraphs[first:] if p not in prose]
        paragraphs = [*paragraphs[:first], *prose, *rest]
    text = "\n\n".join("\n".join(p) for p in paragraphs)
    lines[:] = [*str(NumpyDocstring(text, _NAPOLEON)).split("\n"), ""]


def _signature(
    _app: Any, _what: str, _name: str, _obj: Any, _options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Give numpy's types the names that they have in the source."""
    alias = re.compile(r"[~\w.]*TypeAliasForwardRef\('([\w.]+)'\)")
    return arguments and alias.sub(r"~\1", arguments), returns and alias.sub(r"~\1", returns)


def _is_section(paragraph: list[str]) -> bool:
    return len(paragraph) > 1 and len(paragraph[1]) > 2 and not paragraph[1].strip("-")


def _resolve(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolve a reference by the defining module, such as ``ggml_cffi.core.tensor.Tensor``, as ``ggml_cffi.Tensor``.

    References to other packages are plain text: the build needs no network.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"].lstrip("~.")
    domain = env.get_domain("py")
    last = target.rpartition(".")[2]
    documented = [name for name in domain.objects if name.rpartition(".")[2] == last]
    for name in (*_spellings(target), *(documented if len(documented) == 1 else ())):
        if name in domain.objects:
            where = domain.objects[name]
            return _link(app, node, content, where.docname, where.node_id, name)
    return content if _foreign(target) or _is_internal(target) else None


def _is_internal(target: str) -> bool:
    """Return whether ``target`` is the full name of an object of the package that no public module exports."""
    module, _, name = target.rpartition(".")
    if not module.startswith("ggml_cffi.") or any(name in _exports(page) for page in ("ggml_cffi", *_OWN_PAGES)):
        return False
    try:
        return hasattr(importlib.import_module(module), name)
    except ImportError:
        return False


def _exports(module: str) -> list[str]:
    return getattr(importlib.import_module(module), "__all__", [])


def _spellings(target: str) -> list[str]:
    parts = target.removeprefix("ggml_cffi.").split(".")
    short = [".".join(parts[i:]) for i in range(len(parts))]
    return [f"{module}.{name}" for name in short for module in ("ggml_cffi", *_OWN_PAGES)]


def _link(app: Any, node: Any, content: Any, docname: str, anchor: str, title: str) -> Any:
    from sphinx.util.nodes import make_refnode

    return make_refnode(app.builder, node["refdoc"], docname, anchor, [content], title)


def _foreign(target: str) -> bool:
    root, _, _ = target.partition(".")
    known = (
        "numpy",
        "np",
        "npt",
        "os",
        "collections",
        "concurrent",
        "asyncio",
        "contextlib",
        "logging",
        "mmap",
        "enum",
        "typing",
        "pathlib",
        "threading",
    )
    names = (
        "Any",
        "Callable",
        "Collection",
        "Iterable",
        "Mapping",
        "PathLike",
        "Path",
        "Sequence",
        "Future",
        "ndarray",
    )
    types = ("ArrayLike", "DTypeLike", "NDArray", "IntEnum", "Self")
    inner = ("Head", "Trace", "check_tokens")  # named without their modules, and not public
    private = "._" in target or target.split(".")[-1] in inner
    return root in known or private or target in (*names, *types) or hasattr(builtins, root)


def setup(app: Any) -> None:
    """Connect the functions of this file to Sphinx."""
    app.add_directive("command", CommandDirective)
    app.connect("source-read", _complete)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("missing-reference", _resolve)
