"""List of upstream's cases, from ``test-backend-ops``: the program of the distribution that ggml is from, or one built
with the loaded ggml, once per source, compiler and version.
"""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from codegen import versions
from ggml_cffi.c import library

PROGRAM = "test-backend-ops"
_SYSTEM = Path("/usr")


class NoListError(Exception):
    """Signal that the program could not be built or run, with the reason."""


@dataclass(frozen=True)
class Listed:
    """Case as upstream lists it."""

    number: int
    op: str
    text: str
    on_cpu: bool
    """True if ggml's CPU backend supports the case."""

    def __str__(self) -> str:
        return f"{self.op}({self.text})"


def cases(table: Path | str | None = None) -> list[Listed]:
    """Return every case that upstream's program lists, in its order.

    Parameters
    ----------
    table
        What the program wrote with ``support --output csv``, for example that of another version. Default: the list of
        the program for the loaded ggml.

    Raises
    ------
    NoListError
        If there is no list in the cache, and no compiler or source to make one.
    """
    with Path(table or _table()).open(newline="") as file:
        rows = csv.DictReader(file)
        return [Listed(i, r["op_name"], r["op_params"], r["supported"] == "1") for i, r in enumerate(rows)]


def cache() -> Path:
    """Return the folder in which ``build_lib.sh`` keeps its builds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GGML_CFFI_CACHE") or Path(base) / "ggml_cffi")


def _table() -> Path:
    """Return the path of the list in the user's cache."""
    shipped = _shipped()
    if shipped:
        key = _digest([shipped.read_bytes(), library.version().encode()])
        table = cache() / "upstream" / f"{PROGRAM}-{key}.csv"
        if not table.exists():
            _write(table, _ask(shipped))
        return table
    program = _built()
    table = program.with_suffix(".csv")
    if not table.exists():
        _write(table, _ask(program))
    return table


def _shipped() -> Path | None:
    """Return the program that the distribution ships beside the loaded ggml, None if there is none."""
    if not _libraries().is_relative_to(_SYSTEM):
        return None
    return next(_SYSTEM.glob(f"libexec/*/ggml/{PROGRAM}"), None)


def _built() -> Path:
    """Return the path of the program in the user's cache; its name is a digest of everything that it depends on."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise NoListError(f"no C++ compiler ({compiler}) to build upstream's {PROGRAM} with; install g++ or set CXX")
    try:
        version, source = _source()
        headers = next(v for v in versions.supported() if v.name == library.declarations())
        include = headers.folder() / "include"
    except versions.MissingHeadersError as error:
        raise NoListError(f"upstream's source could not be fetched: {error}") from error
    compiled_by = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [source.read_text(), *_lines({version.name, headers.name}), library.version(), compiled_by]
    program = cache() / "upstream" / f"{PROGRAM}-{_digest(text.encode() for text in texts)}"
    if not program.exists():
        _compile(compiler, source, include, program)
    return program


def _source() -> tuple[versions.Version, Path]:
    """Return the newest version whose source has the program, and its file."""
    for version in reversed(versions.supported()):
        if version.has_source:
            source = version.folder() / "tests" / f"{PROGRAM}.cpp"
            if source.exists():
                return version, source
    raise NoListError(f"no version of vendor/versions.txt has tests/{PROGRAM}.cpp in its source")


def _lines(names: set[str]) -> list[str]:
    """Return the lines of these versions in ``vendor/versions.txt``, which hold the digests of their files."""
    lines = (versions.ROOT / "vendor" / "versions.txt").read_text().splitlines()
    return [line for line in lines if line.split()[:1] and line.split()[0] in names]


def _digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _libraries() -> Path:
    folder = library.location()
    if folder is None:
        raise NoListError("this system does not tell the folder of the loaded ggml, to link the program with")
    return Path(folder)


def _compile(compiler: str, source: Path, include: Path, program: Path) -> None:
    folder = _libraries()
    program.parent.mkdir(parents=True, exist_ok=True)
    part = program.with_suffix(f".{os.getpid()}")
    # Without optimization the build takes seconds instead of minutes; the program only prints.
    command = [compiler, "-std=c++17", "-O0", "-w", "-I", str(include), str(source), "-o", str(part)]
    command += [str(next(folder.glob(f"lib{name}.*"))) for name in ("ggml", "ggml-base")]
    command += [f"-Wl,-rpath-link,{folder}", "-Wl,--allow-shlib-undefined"] if sys.platform == "linux" else []
    done = subprocess.run([*command, "-lpthread"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoListError(f"upstream's {PROGRAM} did not compile:\n{done.stderr[-2000:]}")
    part.replace(program)


def _ask(program: Path) -> str:
    paths = os.pathsep.join(filter(None, [str(_libraries()), os.environ.get("LD_LIBRARY_PATH", "")]))
    # ggml looks for the CPU variants of a portable build in the current folder.
    done = subprocess.run(
        [program, "support", "--output", "csv", "-b", "CPU"],
        capture_output=True,
        text=True,
        check=False,
        cwd=_libraries(),
        env=os.environ | {"LD_LIBRARY_PATH": paths, "DYLD_LIBRARY_PATH": paths, "GGML_VK_VISIBLE_DEVICES": ""},
    )
    if done.returncode or not done.stdout.startswith('"backend_name"'):
        raise NoListError(f"upstream's {PROGRAM} ended with code {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(path)
