"""Copies of the loaded libraries, and libraries that tests compile: plug-ins, also broken ones, and a Vulkan loader."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ggml_cffi.c import library


def copy_libraries(
    target: Path, *, changed: Sequence[tuple[bytes, bytes]] = (), plugins: Sequence[str] = ("rpc",)
) -> Path:
    """Copy the core and some plug-ins, with texts of libggml-base replaced by others of the same length."""
    folder = Path(library.location() or "missing")
    if not any(folder.glob("libggml-cpu*")):
        pytest.skip("needs a library with its CPU backend in the same folder, such as that of build_lib.sh")
    target.mkdir(exist_ok=True)
    for file in folder.glob("libggml*"):
        if not any(part in file.name for part in ("libggml.", "libggml-base", "libggml-cpu", *plugins)):
            continue
        data = file.read_bytes()
        for old, new in changed if "base" in file.name else ():
            assert old in data
            assert len(old) == len(new)
            data = data.replace(old, new)
        (target / file.name).write_bytes(data)
    return target


def compile_stub(file: Path, *, dependency: Path | None = None, **macros: object) -> Path:
    """Compile ``plugin_stub.c``. Macros are its names, such as ``API=1``; a text is passed as a C string."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler to make a plug-in")
    values = {"NAME": file.name.removeprefix("libggml-").partition(".")[0].upper(), **macros}
    defines = [f'-D{k}="{v}"' if isinstance(v, str) else f"-D{k}={v}" for k, v in values.items()]
    source = Path(__file__).with_name("plugin_stub.c")
    command = [compiler, "-shared", "-fPIC", "-o", file, *defines, source, *([dependency] if dependency else [])]
    subprocess.run(command, check=True)
    return file


def compile_crash(file: Path, message: str = "") -> Path:
    """Compile a plug-in that writes a message to standard error and ends the process when it is loaded."""
    source = (
        "#include <stdlib.h>\n#include <unistd.h>\n"
        f'void *ggml_backend_init(void) {{ if (write(2, "{message}", {len(message)}) < 0) exit(1); abort(); }}\n'
    )
    return compile_source(file, source)


def use_stub_loader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new processes find a Vulkan loader in a folder, which they prefer to that of the machine.

    Without a loader, the package loads no Vulkan plug-in, stubs included.
    """
    source = "int vkEnumerateInstanceVersion(unsigned *version) { *version = 1 << 22 | 3 << 12; return 0; }\n"
    compile_source(folder / "libvulkan.so.1", source)
    others = os.environ.get("LD_LIBRARY_PATH")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{folder}:{others}" if others else str(folder))


def compile_source(file: Path, source: str) -> Path:
    """Compile a library from the text of a C program."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler to make a library")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-o", file, "-"]
    subprocess.run(command, input=source, text=True, check=True)
    return file


def compile_with_missing_dependency(file: Path) -> Path:
    """Compile a stub that needs the library ``libneeded-by-test.so``, which is not there."""
    needed = file.with_name("libneeded-by-test.so")
    source = file.with_name("needed.c")
    source.write_text("int needed(void) { return 1; }\n")
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler to make a plug-in")
    options = ["-shared", "-fPIC", f"-Wl,-soname,{needed.name}"]
    subprocess.run([compiler, *options, "-o", needed, source], check=True)
    compile_stub(file, dependency=needed, NEEDS=1)
    needed.unlink()
    source.unlink()
    return file
