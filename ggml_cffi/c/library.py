"""Search for the C libraries, and their loading.

The core (``base``, ``cpu``, ``ggml``) is looked for in ``$GGML_CFFI_LIBRARY_PATH``, in the package's own ``lib/``
(filled by ``build_lib.sh``), in the ``libggml-python`` wheel, in the environment's ``lib/`` (conda, Homebrew) and among
the system's libraries, in that order. The first place with a supported version is used. Plug-ins (``vulkan``, ``rpc``)
come from the same place or its folder of backends, else from ``$GGML_BACKEND_PATH``. They are loaded on first use only:
until then, no GPU driver is loaded.
"""

from __future__ import annotations

import os
import sys
import threading
from functools import cache
from typing import Any

from ggml_cffi.c import log, versions
from ggml_cffi.c._decl import VERSIONS, ffi
from ggml_cffi.c.places import PREFIX, backend_folders, folder_of, path, places, plugin_path, wheel
from ggml_cffi.errors import LibraryMismatchError, LibraryNotFoundError

PLUGINS = ("vulkan", "rpc")

_lock = threading.RLock()
_loaded: dict[str, Any] = {}
_missing: dict[str, LibraryNotFoundError] = {}
_opened: list[Any] = []  # also those of places that were refused: C may hold pointers into them
_place: str | None = None
_version = ""
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


def function(place: str, name: str) -> Any:
    """Return the C function ``name`` of a library.

    Raises
    ------
    LibraryMismatchError
        If the loaded version does not have it; the message says which version does.
    """
    library = load(place)
    try:
        return getattr(library, name)
    except (AttributeError, ffi.error):
        raise _lacking(name, name) from None


def version() -> str:
    """Load the core, and return its version."""
    load("base")
    return _version


def declarations() -> str:
    """Load the core, and return the newest supported version that is not newer than it."""
    return versions.nearest(version())


def description() -> str:
    """Load the core, and return its version and place in words, as in ``ggml 0.25.3, from /usr/lib``."""
    return f"ggml {version()}, from {_place or 'the system'}"


@cache
def provides(name: str) -> bool:
    """Load the core, and return whether its version has the C function ``name``."""
    return versions.provides(version(), name)


def require(name: str, feature: str) -> None:
    """Raise :class:`LibraryMismatchError` if the version lacks ``feature``, which came with the C function ``name``."""
    if not provides(name):
        raise _lacking(name, feature)


def _lacking(name: str, feature: str) -> LibraryMismatchError:
    return LibraryMismatchError(
        f"{feature} needs ggml {versions.since(name)} or newer; loaded is {description()}: build the newest with "
        "./build_lib.sh, or set GGML_CFFI_LIBRARY_PATH to a folder that holds it"
    )


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
    """Load the core, and return its folder, None if the system does not tell it."""
    load("base")
    return _place


def _load_core() -> None:
    global _place, _version
    # ggml would start a debugger for its backtrace when it aborts.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    reasons = []
    mismatch = False
    for label, folder in places():
        where = f"{label}: {folder}" if folder else label
        try:
            found, loaded, folder = _open_core(folder)
        except (OSError, LibraryMismatchError) as error:
            mismatch = mismatch or isinstance(error, LibraryMismatchError)
            reasons.append(f"  {where}\n    {error}")
            continue
        _loaded.update(found)
        _place, _version = folder, loaded
        return
    if not wheel():
        reasons.insert(-1, "  the libggml-python wheel\n    not installed")
    kind = LibraryMismatchError if mismatch else LibraryNotFoundError
    raise kind(
        f"no usable libggml was found; supported are {versions.supported()}. Tried, in this order:\n"
        + "\n".join(reasons)
        + "\nInstall the prebuilt CPU library with `pip install libggml-python`, or run ./build_lib.sh in a source "
        "checkout, or set GGML_CFFI_LIBRARY_PATH to a folder that holds libggml."
    )


def _open_core(folder: str | None) -> tuple[dict[str, Any], str, str | None]:
    """Open base, cpu and ggml from a folder, and check them against the declarations.

    Returns
    -------
    tuple
        The libraries, their version, and their folder.
    """
    base = _dlopen(path(folder, "ggml-base"))
    if folder is None:
        folder = folder_of(int(ffi.cast("uintptr_t", ffi.addressof(base, "ggml_version"))))
    loaded = ffi.string(base.ggml_version()).decode()
    versions.check_range(loaded)
    versions.check_sizes(base)
    log.install(base)
    core = _dlopen(path(folder, "ggml"))
    found = {"base": base, "cpu": _open_cpu(folder, core), "ggml": core}
    if loaded not in VERSIONS:
        versions.check_unknown(loaded, found)
    return found, loaded, folder


def _dlopen(file: str) -> Any:
    """Open a library, which stays loaded."""
    library = ffi.dlopen(file)
    _opened.append(library)
    return library


def _open_cpu(folder: str | None, core: Any) -> Any:
    """Open the CPU backend: the only one, or of several variants the best that runs on this machine."""
    try:
        return _dlopen(path(folder, "ggml-cpu"))
    except OSError:
        variants = [
            os.path.join(place, name)
            for place in backend_folders(folder)
            for name in sorted(os.listdir(place))
            if name.startswith(f"{PREFIX}ggml-cpu-")
        ]
        if not variants:
            raise
    best = max(variants, key=_score)
    if _score(best) == 0 or core.ggml_backend_load(os.fsencode(best)) == ffi.NULL:
        raise OSError(f"none of its {len(variants)} CPU variants runs on this machine")
    return _dlopen(best)


def _score(variant: str) -> int:
    """Return a CPU variant's score on this machine; 0 if it cannot run here."""
    import ctypes  # only a portable build needs it

    try:
        return int(ctypes.CDLL(variant).ggml_backend_score())
    except (OSError, AttributeError):
        return 0


def _load_plugin(name: str) -> None:
    if name in _missing:
        raise _missing[name]
    try:
        file = plugin_path(_place, name)
        library = _dlopen(file)  # raises with the reason, which ggml's own loader would only log
        if name == "vulkan" and sys.platform == "linux":
            _dlopen("libvulkan.so.1")  # a wheel's plug-in loads without it, but has no device then
    except OSError as error:
        remedy = "Install the Vulkan loader, Debian's package libvulkan1"
        if "libvulkan" not in str(error):
            remedy = (
                f"Build it with ./build_lib.sh, or set GGML_CFFI_LIBRARY_PATH to a folder that holds libggml-{name}"
            )
        _missing[name] = LibraryNotFoundError(f"the {name} plug-in of ggml cannot be loaded: {error}. {remedy}.")
        raise _missing[name] from None
    if _loaded["ggml"].ggml_backend_load(os.fsencode(file)) == ffi.NULL:
        _missing[name] = LibraryNotFoundError(f"the {name} plug-in was found at {file}, but it has no usable device")
        raise _missing[name]
    _pids[name] = os.getpid()
    _loaded[name] = library
