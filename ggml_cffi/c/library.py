"""Search for the C libraries, and their loading.

The core (``base``, ``cpu``, ``ggml``) is looked for in ``$GGML_CFFI_LIBRARY_PATH``, in the package's own ``lib/``
(filled by ``build_lib.sh``), in the ``libggml-python`` wheel and among the system's libraries, in that order. The
first place with the right version is used. Plug-ins (``vulkan``, ``rpc``) come from the same place, and are
loaded on first use only: until then, no GPU driver is loaded.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ggml_cffi.c import log
from ggml_cffi.c._decl import GGML_VERSION, ffi
from ggml_cffi.errors import LibraryMismatchError, LibraryNotFoundError

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"
PLUGINS = ("vulkan", "rpc")

_lock = threading.RLock()
_loaded: dict[str, Any] = {}
_missing: dict[str, LibraryNotFoundError] = {}
_place: str | None = None
_pids: dict[str, int] = {}  # the process in which a plug-in was loaded


def load(name: str) -> Any:
    """Return the cffi library ``base``, ``cpu``, ``ggml``, ``vulkan`` or ``rpc``, and load it on first use.

    Raises
    ------
    LibraryNotFoundError
        If it is not found; the message lists the places, the reasons and the remedy.
    """
    try:
        return _loaded[name]
    except KeyError:
        pass
    with _lock:
        if "base" not in _loaded:
            _load_core()
        if name not in _loaded:
            _load_plugin(name)
        return _loaded[name]


def available(plugin: str) -> bool:
    """Load a plug-in, and return whether that was possible."""
    try:
        load(plugin)
    except LibraryNotFoundError:
        if "base" not in _loaded:
            raise
        return False
    return True


def inherited(plugin: str) -> bool:
    """Return whether a plug-in was loaded before this process was forked: its driver does not work here."""
    return _pids.get(plugin, os.getpid()) != os.getpid()


def location() -> str | None:
    """Load the core, and return its folder, None for the system's library."""
    load("base")
    return _place


def places() -> Iterator[tuple[str, str | None]]:
    """Yield each place in the order of the search: its name, and its folder, None for the system's libraries."""
    for entry in filter(None, os.environ.get("GGML_CFFI_LIBRARY_PATH", "").split(os.pathsep)):
        yield "$GGML_CFFI_LIBRARY_PATH", entry
    yield (
        "the package's own libraries (build_lib.sh)",
        os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "lib"),
    )
    for root in _wheel():
        for name in ("lib64", "lib", "bin"):
            if os.path.isdir(folder := os.path.join(root, name)):
                yield "the libggml-python wheel", folder
    yield "the system's libraries", None


def _wheel() -> list[str]:
    """Return the folders of the installed libggml-python wheel."""
    import importlib.util

    found = importlib.util.find_spec("libggml")
    return list(found.submodule_search_locations or ()) if found else []


def _load_core() -> None:
    global _place
    # ggml would start a debugger for its backtrace when it aborts.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    reasons = []
    mismatch = False
    for label, folder in places():
        where = f"{label}: {folder}" if folder else label
        try:
            _loaded.update(_open_core(folder))
        except (OSError, LibraryMismatchError) as error:
            mismatch = mismatch or isinstance(error, LibraryMismatchError)
            reasons.append(f"  {where}\n    {error}")
            continue
        _place = folder
        return
    if not _wheel():
        reasons.insert(-1, "  the libggml-python wheel\n    not installed")
    kind = LibraryMismatchError if mismatch else LibraryNotFoundError
    raise kind(
        f"no usable libggml {GGML_VERSION} was found. Tried, in this order:\n" + "\n".join(reasons) + "\n"
        "Install the prebuilt CPU library with `pip install libggml-python==0.20.2.post1`, or run ./build_lib.sh in a "
        "source checkout, or set GGML_CFFI_LIBRARY_PATH to a folder that holds libggml."
    )


def _open_core(folder: str | None) -> dict[str, Any]:
    """Open base, cpu and ggml from ``folder``, and check that they match the declarations."""
    base = ffi.dlopen(_path(folder, "ggml-base"))
    version = ffi.string(base.ggml_version()).decode()
    if version != GGML_VERSION:
        raise LibraryMismatchError(f"it is version {version}, not {GGML_VERSION}")
    size = base.ggml_tensor_overhead() - 32  # the pool's own header of an object
    if size != ffi.sizeof("struct ggml_tensor"):
        raise LibraryMismatchError(f"its ggml_tensor takes {size} bytes, not {ffi.sizeof('struct ggml_tensor')}")
    log.install(base)
    try:
        cpu = ffi.dlopen(_path(folder, "ggml-cpu"))
        return {"base": base, "cpu": cpu, "ggml": ffi.dlopen(_path(folder, "ggml"))}
    except OSError:
        names = sorted(os.listdir(folder)) if folder else []
        variants = [os.path.join(folder or "", n) for n in names if n.startswith(f"{_PREFIX}ggml-cpu-")]
        if not variants:
            raise
    core = ffi.dlopen(_path(folder, "ggml"))
    best = max(variants, key=_score)
    if _score(best) == 0 or core.ggml_backend_load(os.fsencode(best)) == ffi.NULL:
        raise OSError(f"none of its {len(variants)} CPU variants runs on this machine")
    return {"base": base, "cpu": ffi.dlopen(best), "ggml": core}


def _score(variant: str) -> int:
    """Return a CPU variant's score on this machine; 0 if it cannot run here."""
    import ctypes  # only a portable build needs it

    try:
        return int(ctypes.CDLL(variant).ggml_backend_score())
    except (OSError, AttributeError):
        return 0


def _path(folder: str | None, name: str) -> str:
    file = f"{_PREFIX}{name}{_SUFFIX}"
    versioned = {"darwin": f"lib{name}.0.dylib", "win32": file}.get(sys.platform, f"{file}.0")
    if folder is None:
        return versioned
    if not os.path.isdir(folder):
        raise OSError("no such folder")
    for candidate in (os.path.join(folder, versioned), os.path.join(folder, file)):
        if os.path.exists(candidate):
            return os.path.realpath(candidate)
    raise OSError(f"no {versioned} in it")


def _load_plugin(name: str) -> None:
    if name in _missing:
        raise _missing[name]
    try:
        path = _path(_place, f"ggml-{name}")
        library = ffi.dlopen(path)  # raises with the reason, which ggml's own loader would only log
    except OSError as error:
        _missing[name] = LibraryNotFoundError(
            f"the {name} plug-in of ggml cannot be loaded: {error}. "
            + ("Install the Vulkan loader (libvulkan1). " if "libvulkan" in str(error) else "")
            + f"Build it with ./build_lib.sh, or set GGML_CFFI_LIBRARY_PATH to a folder that holds libggml-{name}."
        )
        raise _missing[name] from None
    if _loaded["ggml"].ggml_backend_load(os.fsencode(path)) == ffi.NULL:
        _missing[name] = LibraryNotFoundError(f"the {name} plug-in was found at {path}, but it has no usable device")
        raise _missing[name]
    _pids[name] = os.getpid()
    _loaded[name] = library
