"""Places where libggml is looked for, and the files of a place."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator

PREFIX = "" if sys.platform == "win32" else "lib"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

#: Folders of backends beside the core: Debian's.
_BACKEND_FOLDERS = (os.path.join("ggml", "backends0"),)

#: ggml's order of plug-ins. Where two reach the same GPU, the first one's device is used.
_ORDER = (
    *("blas", "zendnn", "cann", "cuda", "hip", "metal", "rpc", "sycl", "vulkan", "virtgpu", "opencl", "hexagon"),
    *("musa", "openvino"),
)

#: The name of a plug-in's file: ``libggml-NAME.so``, or ``libggml-NAME-VARIANT.so``.
_FILE = re.compile(rf"{PREFIX}ggml-([a-z0-9_]+)(?:-[\w-]+)?(?:\.0)?\.(?:so|dylib|dll)(?:\.0)?")
_VERSIONED = re.compile(r"\.(\d+\.\d+\.\d+)(?:\.dylib)?$")
_CORE = ("base", "cpu")


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


def files_of_plugins(place: str | None) -> dict[str, list[str]]:
    """Return the plug-ins of a core in ggml's order of loading: for each name the file, or the files of its variants.

    A file that ``$GGML_BACKEND_PATH`` names comes before the core's folders, and a folder that it names after them. If
    the system does not tell the core's folder, the values are the names that the system's loader knows the files by.
    """
    if place is None:
        return {name: [path(None, f"ggml-{name}")] for name in ("rpc", "vulkan")}
    given = os.environ.get("GGML_BACKEND_PATH", "")
    found: dict[str, list[str]] = {}
    if os.path.isfile(given):
        named = _FILE.fullmatch(os.path.basename(given))
        found[named[1] if named else os.path.basename(given).partition(".")[0]] = [given]
    for folder in [*backend_folders(place), *([given] if os.path.isdir(given) else ())]:
        here: dict[str, list[str]] = {}
        for file in sorted(os.listdir(folder)):
            named = _FILE.fullmatch(file)
            if named and named[1] not in _CORE:
                here.setdefault(named[1], []).append(os.path.join(folder, file))
        for name, files in here.items():
            found.setdefault(name, list({os.path.realpath(file): file for file in files}.values()))
    order = {name: i for i, name in enumerate(_ORDER)}
    return {name: found[name] for name in sorted(found, key=lambda name: (order.get(name, len(order)), name))}


def version_of_file(file: str) -> str | None:
    """Return the version in the name of a library's real file, as in ``libggml-cuda.so.0.25.3``; None without one."""
    named = _VERSIONED.search(os.path.basename(os.path.realpath(file)))
    return named[1] if named else None


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
