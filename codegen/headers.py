"""Parser of ggml's public headers: functions, enums, structs, typedefs and integer macros, as plain data."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pycparser import c_ast, c_generator, c_parser

from codegen.versions import Version

#: Public headers in the order of their includes, with the library that exports their functions.
HEADERS = {
    "ggml.h": "base",
    "ggml-alloc.h": "base",
    "ggml-backend.h": "base",
    "ggml-cpu.h": "cpu",
    "ggml-opt.h": "base",
    "gguf.h": "base",
    "ggml-vulkan.h": "vulkan",
    "ggml-rpc.h": "rpc",
}
#: Functions that these sources define are in libggml (the registry), regardless of the header that declares them.
REGISTRY_SOURCES = ("ggml-backend-reg.cpp", "ggml-backend-dl.cpp")

#: Public functions that are not bound, each with its reason.
SKIPPED = {
    "ggml_threadpool_get_n_threads": "declared, but exported by no library",
    "ggml_abort": "variadic; ends the process",
    "ggml_format_name": "variadic; format in Python and call ggml_set_name",
    "ggml_fopen": "returns a FILE *; open files in Python",
    "gguf_init_from_file_ptr": "takes a FILE *; use gguf_init_from_file",
    "gguf_write_to_file_ptr": "takes a FILE *; use gguf_write_to_file",
}

# Types of the system headers, for the parser; cffi knows them.
_PRELUDE = "".join(
    f"typedef {base} {name};\n"
    for name, base in {
        "bool": "_Bool",
        "size_t": "unsigned long",
        "int8_t": "signed char",
        "int16_t": "short",
        "int32_t": "int",
        "int64_t": "long",
        "uint8_t": "unsigned char",
        "uint16_t": "unsigned short",
        "uint32_t": "unsigned int",
        "uint64_t": "unsigned long",
        "FILE": "void",
    }.items()
)
_SIZEOF = {"int32_t": 4}


@dataclass(frozen=True)
class Function:
    """Public C function; ``params`` are (name, C type) pairs."""

    name: str
    header: str
    library: str
    returns: str
    params: tuple[tuple[str, str], ...]
    deprecated: bool


@dataclass
class Headers:
    """Declarations of the public headers of one version."""

    version: str
    from_source: bool
    functions: list[Function] = field(default_factory=list)
    enums: dict[str, dict[str, int]] = field(default_factory=dict)
    structs: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each C type its size in bytes, under the empty name, and the offsets of its fields."""
    macros: dict[str, int | str] = field(default_factory=dict)
    cdef: dict[str, str] = field(default_factory=dict)
    """Text of each declaration by its name."""

    def constants(self) -> dict[str, int | str]:
        """Return the macros and the constants of all enums."""
        return self.macros | {name: value for members in self.enums.values() for name, value in members.items()}


def read(version: Version) -> Headers:
    """Parse the public headers of a version.

    Raises
    ------
    MissingHeadersError
        If the headers cannot be fetched.
    """
    folder = version.folder()
    include = folder / "include"
    out = Headers(version.name, version.has_source)
    registry = _defined_in(folder / "src" / name for name in REGISTRY_SOURCES) if version.has_source else set()
    deprecated = set(_deprecated(include))
    generator = c_generator.CGenerator()
    fields: dict[str, list[str]] = {}

    for node in c_parser.CParser().parse(_preprocessed(include)).ext:
        header = Path(node.coord.file).name if node.coord and node.coord.file else ""
        if header not in HEADERS:
            continue
        _fold_constants(node)
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            function = _function(node, header, generator, registry, deprecated)
            if function.name in {f.name for f in out.functions}:
                continue
            out.functions.append(function)
            if function.name in SKIPPED:
                continue
        elif isinstance(node, c_ast.Decl) and "static" in node.storage:
            continue  # GGML_TENSOR_SIZE: sizeof in a constant, which cffi cannot evaluate
        for found in _Types.of(node):
            if isinstance(found, c_ast.Enum):
                out.enums[found.name] = {e.name: int(e.value.value) for e in found.values.enumerators}
            elif found.name:
                fields[f"struct {found.name}"] = [d.name for d in found.decls]
            elif isinstance(node, c_ast.Typedef):
                fields[node.name] = [d.name for d in found.decls]
        # Some typedefs stand in two headers.
        out.cdef.setdefault(_declared_name(node), generator.visit(node).removeprefix("extern ") + ";\n")

    out.structs = _layouts(include, fields)
    out.macros = _macros(include)
    return out


def _declared_name(node: c_ast.Node) -> str:
    """Return the name of a declaration; that of a struct or an enum is its tag."""
    if node.name is not None:
        return f"typedef {node.name}" if isinstance(node, c_ast.Typedef) else str(node.name)
    kind = type(node.type).__name__.lower()
    return f"{kind} {node.type.name}" + ("" if getattr(node.type, "decls", True) else " forward")


def _layouts(include: Path, structs: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """Return the size of each struct and the offsets of its fields; a small C program tells them."""
    queries = [(s, "", f"sizeof({s})") for s in structs]
    queries += [(s, name, f"offsetof({s}, {name})") for s, names in structs.items() for name in names]
    lines = [f'#include "{name}"\n' for name in HEADERS] + [
        "#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n"
    ]
    lines += [f'printf("%zu\\n", {expression});\n' for _, _, expression in queries]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "layouts")
        command = [_compiler(), f"-I{include}", "-x", "c", "-o", str(program), "-"]
        subprocess.run(command, input="".join([*lines, "}\n"]), text=True, check=True)
        numbers = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    found: dict[str, dict[str, int]] = {s: {} for s in structs}
    for (struct, name, _), number in zip(queries, numbers, strict=True):
        found[struct][name] = int(number)
    return found


def _function(
    node: c_ast.Decl, header: str, generator: c_generator.CGenerator, registry: set[str], deprecated: set[str]
) -> Function:
    params = []
    for i, param in enumerate(node.type.args.params if node.type.args else ()):
        if isinstance(param, c_ast.EllipsisParam):
            params.append(("args", "..."))
            continue
        name = param.name or f"arg{i}"
        if isinstance(param, c_ast.Decl):
            _set_declname(param.type, None)
        text = generator.visit(param.type)
        if isinstance(param, c_ast.Decl):
            _set_declname(param.type, name)
        if text != "void":
            params.append((name, text))
    _set_declname(node.type.type, None)
    returns = generator.visit(node.type.type)
    _set_declname(node.type.type, node.name)
    library = "ggml" if node.name in registry else HEADERS[header]
    return Function(node.name, header, library, returns, tuple(params), node.name in deprecated)


def _set_declname(node: c_ast.Node, name: str | None) -> None:
    while not isinstance(node, c_ast.TypeDecl):
        node = node.type
    node.declname = name


class _Types(c_ast.NodeVisitor):
    """Collector of the enum and struct definitions inside a declaration."""

    def __init__(self) -> None:
        self.found: list[c_ast.Enum | c_ast.Struct] = []

    @classmethod
    def of(cls, node: c_ast.Node) -> list[c_ast.Enum | c_ast.Struct]:
        visitor = cls()
        visitor.visit(node)
        return visitor.found

    def visit_Enum(self, node: c_ast.Enum) -> None:
        if node.values:
            self.found.append(node)

    def visit_Struct(self, node: c_ast.Struct) -> None:
        if node.decls:
            self.found.append(node)
            self.generic_visit(node)


class _Folder(c_ast.NodeVisitor):
    """Replacement of array sizes and enum values by literals: cffi's parser evaluates no expressions."""

    def visit_ArrayDecl(self, node: c_ast.ArrayDecl) -> None:
        if node.dim is not None:
            node.dim = c_ast.Constant("int", str(_value(node.dim, {})))
        self.generic_visit(node)

    def visit_Enum(self, node: c_ast.Enum) -> None:
        known: dict[str, int] = {}
        next_value = 0
        for member in node.values.enumerators if node.values else ():
            value = next_value if member.value is None else _value(member.value, known)
            member.value = c_ast.Constant("int", str(value))
            known[member.name] = value
            next_value = value + 1


def _fold_constants(node: c_ast.Node) -> None:
    _Folder().visit(node)


def _value(node: c_ast.Node, known: dict[str, int]) -> int:
    match node:
        case c_ast.Constant():
            return int(node.value.rstrip("uUlL"), 0)
        case c_ast.ID():
            return known[node.name]
        case c_ast.UnaryOp(op="-"):
            return -_value(node.expr, known)
        case c_ast.UnaryOp(op="sizeof"):
            return _SIZEOF[node.expr.type.type.names[0]]
        case c_ast.BinaryOp():
            left, right = _value(node.left, known), _value(node.right, known)
            match node.op:
                case "*":
                    return left * right
                case "/":
                    return left // right
                case "+":
                    return left + right
                case "<<":
                    return left << right
                case "|":
                    return left | right
    raise ValueError(f"codegen cannot evaluate {node}")


def _compiler() -> str:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        raise SystemExit("codegen needs a C preprocessor: install gcc or set CC")
    return found


def _cpp(include: Path, *options: str) -> str:
    text = "".join(f'#include "{name}"\n' for name in HEADERS)
    # From C23 on, which newer compilers choose by default, bool is no macro for _Bool.
    command = [
        _compiler(),
        "-E",
        "-std=gnu11",
        *options,
        f"-I{include}",
        "-D__attribute__(x)=",
        "-D_Noreturn=",
        "-x",
        "c",
        "-",
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _preprocessed(include: Path) -> str:
    """Return the text of the headers after preprocessing, with line markers and without system headers."""
    kept: list[str] = []
    ours = False
    for line in _cpp(include).splitlines():
        marker = re.match(r'# (\d+) "([^"]*)"', line)
        if marker:
            ours = Path(marker[2]).name in HEADERS and str(include) in marker[2]
            if ours:
                kept.append(f'#line {marker[1]} "{marker[2]}"')
        elif ours:
            kept.append(line)
    return _PRELUDE + "\n".join(kept)


def _macros(include: Path) -> dict[str, int | str]:
    """Return the macros of the headers that are an integer or a string."""
    text = "".join((include / name).read_text() for name in HEADERS)
    names = set(re.findall(r"^\s*#\s*define\s+(\w+)[ \t]+\S", text, re.M))
    found: dict[str, int | str] = {}
    for name, value in re.findall(r"^#define (\w+) (.+)$", _cpp(include, "-dM"), re.M):
        if name in names and re.fullmatch(r'"[^"]*"|0[xX][0-9a-fA-F]+|\d+', value):
            found[name] = ast.literal_eval(value)
    return dict(sorted(found.items()))


def _defined_in(paths: Iterator[Path]) -> set[str]:
    """Return the names of functions whose definitions start a line in these C++ sources."""
    return {name for p in paths for name in re.findall(r"^\w[\w *]*?\b(ggml_\w+)\([^;]*?\{$", p.read_text(), re.M)}


def _deprecated(include: Path) -> Iterator[str]:
    for name in HEADERS:
        yield from re.findall(r"^\s*GGML_DEPRECATED\(.*?\b(ggml_\w+)\s*\(", (include / name).read_text(), re.M | re.S)
