"""Entry point of ``python -m codegen [--check]``."""

from __future__ import annotations

import argparse
import difflib
import sys

from codegen import emit, flat, headers, operations

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
    """Return the generated files whose text differs from what the headers give, each with its diff."""
    parsed = headers.read()
    found = {}
    for name, render in TARGETS.items():
        path = headers.ROOT / name
        have = path.read_text() if path.exists() else ""
        want = render(parsed)
        if have != want:
            lines = difflib.unified_diff(have.splitlines(), want.splitlines(), name, "regenerated", lineterm="", n=1)
            found[name] = "\n".join(line[:200] for line in lines)
    return found


def main() -> int:
    """Write the generated files, or list those that are stale."""
    description = "Generate Python files and docs from the headers of the pinned ggml."
    parser = argparse.ArgumentParser(prog="python -m codegen", description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; fail with a diff of each stale file")
    if parser.parse_args().check:
        found = stale()
        for diff in found.values():
            print(diff)
        print(f"codegen: {len(found)} of {len(TARGETS)} files are stale" if found else "codegen: up to date")
        return 1 if found else 0
    parsed = headers.read()
    for name, render in TARGETS.items():
        (headers.ROOT / name).write_text(render(parsed))
        print(f"wrote {name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
