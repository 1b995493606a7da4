"""Places where libggml is looked for, and the files of a place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

PREFIX = "" if sys.platform == "win32" else "lib"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

#: Folders of backends beside the core: Debian's.
_BACKEND_FOLDERS = (os.path.join("ggml", "backends0"),)


def places() -> Iterator[tuple[str, str | None]]:
    """Yield each place in the order of the search: its name, and its folder, None for the system's libraries."""
    for entry in filter(None, os.environ.get("GGML_CFFI_LIBRARY_PATH", "").split(os.pathsep)):
        yield "$GGML_CFFI_LIBRARY_PATH", entry
    yield (
        "the package's own libraries (build_lib.sh)",
        os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"),
    )
    for root in wheel():
        for name in ("lib64", "lib", "bin"):
            if os.path.isdir(folder := os.path.join(root, name)):
                yield "the libggml-python wheel", folder
    yield "the environment's libraries", os.path.join(sys.prefix, "lib")
    if sys.platform == "darwin":
        yield "Homebrew's libraries", "/opt/homebrew/lib"
    yield "the system's libraries", None


def wheel() -> list[str]:
    """Return the folders of the installed libggml-python wheel."""
    import importlib.util

    found = importlib.util.find_spec("libggml")
    return list(found.submodule_search_locations or ()) if found else []


def path(folder: str | None, name: str) -> str:
    """Return the path of a library in a folder; without a folder, the name that the system's loader knows it by.

    Raises
    ------
    OSError
        If the folder does not have it.
    """
    file = f"{PREFIX}{name}{SUFFIX}"
    versioned = {"darwin": f"lib{name}.0.dylib", "win32": file}.get(sys.platform, f"{file}.0")
    if folder is None:
        return versioned
    if not os.path.isdir(folder):
        raise OSError("no such folder")
    for candidate in (os.path.join(folder, versioned), os.path.join(folder, file)):
        if os.path.exists(candidate):
            return os.path.realpath(candidate)
    raise OSError(f"no {versioned} in it")


def backend_folders(folder: str | None) -> list[str]:
    """Return the existing folders in which the backends of a core are: its own, and that of its distribution."""
    candidates = [folder, *(os.path.join(folder, name) for name in _BACKEND_FOLDERS)] if folder else []
    return [candidate for candidate in candidates if os.path.isdir(candidate)]


def plugin_path(place: str | None, name: str) -> str:
    """Return the path of a plug-in, or the name that the system's loader knows it by."""
    given = os.environ.get("GGML_BACKEND_PATH", "")
    if given and os.path.basename(given).startswith(f"{PREFIX}ggml-{name}"):
        return given
    for folder in [*backend_folders(place), *([given] if os.path.isdir(given) else ())]:
        try:
            return path(folder, f"ggml-{name}")
        except OSError:
            continue
    return path(place, f"ggml-{name}")


def folder_of(address: int) -> str | None:
    """Return the folder of the library that has a function at ``address``, None if the system does not tell."""
    import ctypes  # only libraries that the system's loader found need it

    class Found(ctypes.Structure):
        """The result of ``dladdr``."""

        _fields_ = (
            ("file", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("name", ctypes.c_char_p),
            ("at", ctypes.c_void_p),
        )

    found = Found()
    try:
        known = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(found))
    except (AttributeError, OSError, TypeError):
        return None
    return os.path.dirname(os.path.realpath(os.fsdecode(found.file))) if known and found.file else None
