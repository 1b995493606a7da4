"""List of upstream's cases: ``test-backend-ops`` is built and run once per pinned source and compiler."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ggml_cffi.c import library

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "vendor" / "ggml"
PROGRAM = "test-backend-ops"


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


def cases() -> list[Listed]:
    """Return every case that upstream's program lists, in its order.

    Raises
    ------
    NoListError
        If there is no list in the cache, and no compiler or source to make one.
    """
    program = _program()
    table = program.with_suffix(".csv")
    if not table.exists():
        _write(table, _ask(program))
    with table.open(newline="") as file:
        rows = csv.DictReader(file)
        return [Listed(i, r["op_name"], r["op_params"], r["supported"] == "1") for i, r in enumerate(rows)]


def _program() -> Path:
    """Return the path of the program in the user's cache; its name is a digest of all its sources."""
    source = SOURCE / "tests" / f"{PROGRAM}.cpp"
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise NoListError(f"no C++ compiler ({compiler}) to build upstream's {PROGRAM} with; install g++ or set CXX")
    if not source.exists():
        _fetch()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    pins = (ROOT / "vendor" / "pins.env").read_bytes()
    key = hashlib.sha256(b"\0".join([source.read_bytes(), pins, version.encode()])).hexdigest()[:16]
    program = cache() / "upstream" / f"{PROGRAM}-{key}"
    if not program.exists():
        _compile(compiler, source, program)
    return program


def cache() -> Path:
    """Return the folder in which ``build_lib.sh`` keeps its builds."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GGML_CFFI_CACHE") or Path(base) / "ggml_cffi")


def _fetch() -> None:
    command = [str(ROOT / "build_lib.sh"), "--source-only"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable}
    )
    if done.returncode:
        raise NoListError(f"upstream's source could not be fetched: {done.stderr.strip()}")


def _libraries() -> Path:
    folder = library.location()
    if folder is None:
        raise NoListError("ggml is one of the system's libraries: build_lib.sh makes one to link the program with")
    return Path(folder)


def _compile(compiler: str, source: Path, program: Path) -> None:
    folder = _libraries()
    program.parent.mkdir(parents=True, exist_ok=True)
    part = program.with_suffix(f".{os.getpid()}")
    # Without optimization the build takes seconds instead of minutes; the program only prints.
    command = [compiler, "-std=c++17", "-O0", "-w", "-I", str(SOURCE / "include"), str(source), "-o", str(part)]
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
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(path)
