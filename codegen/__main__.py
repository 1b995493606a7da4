"""Entry point of ``python -m codegen [--check]``."""

from __future__ import annotations

import argparse
import difflib
import sys

from codegen import declarations, emit, flat, operations
from codegen.versions import ROOT

TARGETS = {
    "ggml_cffi/c/_decl.py": emit.decl,
    "ggml_cffi/c/__init__.py": emit.c_module,
    "ggml_cffi/c/__init__.pyi": emit.c_stub,
    "ggml_cffi/enums.py": emit.enums,
    "codegen/report.md": emit.report,
    "ggml_cffi/ops/__init__.py": operations.namespace,
    "ggml_cffi/flat/_ops.py": flat.operations,
    "docs/operations.md": operations.table,
}


def stale() -> dict[str, str]:
    """Return the generated files whose text differs from what the headers give, each with its diff.

    A version whose headers cannot be fetched is taken as its file in the repository declares it.
    """
    wanted, _ = declarations.files()
    merged = declarations.merged()
    wanted |= {name: render(merged) for name, render in TARGETS.items()}
    found = {}
    for name, want in wanted.items():
        path = ROOT / name
        have = path.read_text() if path.exists() else ""
        if have != want:
            lines = difflib.unified_diff(have.splitlines(), want.splitlines(), name, "regenerated", lineterm="", n=1)
            found[name] = "\n".join(line[:200] for line in lines)
    return found


def write() -> None:
    """Write the generated files."""
    versions, missing = declarations.files()
    for version, reason in missing.items():
        print(f"codegen: kept the declarations of ggml {version}, whose headers are missing: {reason}", file=sys.stderr)
    _write(versions)
    merged = declarations.merged()
    _write({name: render(merged) for name, render in TARGETS.items()})


def _write(files: dict[str, str]) -> None:
    for name, text in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(text)
        print(f"wrote {name}", file=sys.stderr)


def main() -> int:
    """Write the generated files, or list those that are stale."""
    description = "Generate Python files and docs from the headers of the supported versions of ggml."
    parser = argparse.ArgumentParser(prog="python -m codegen", description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; fail with a diff of each stale file")
    if parser.parse_args().check:
        found = stale()
        for diff in found.values():
            print(diff)
        print(f"codegen: {len(found)} files are stale" if found else "codegen: up to date")
        return 1 if found else 0
    write()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
