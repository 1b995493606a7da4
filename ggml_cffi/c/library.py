"""Search for the C libraries, and their loading.

The core (``base``, ``cpu``, ``ggml``) is looked for in ``$GGML_CFFI_LIBRARY_PATH``, in the package's own ``lib/``
(filled by ``build_lib.sh``), in the ``libggml-python`` wheel, in the environment's ``lib/`` (conda, Homebrew) and among
the system's libraries, in that order. The first place with a supported version is used. Plug-ins (``vulkan``, ``cuda``,
``rpc``, …) come from the same place or its folder of backends, else from ``$GGML_BACKEND_PATH``. They are loaded when
devices are first listed: until then, no GPU driver is loaded. ``$GGML_CFFI_BACKENDS`` restricts them.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ggml_cffi.c import cuda_peers, log, versions
from ggml_cffi.c._decl import NEWEST_BUILT, VERSIONS, ffi
from ggml_cffi.c.places import (
    PREFIX,
    backend_folders,
    files_of_plugins,
    folder_of,
    path,
    places,
    version_of_file,
    wheel,
)
from ggml_cffi.errors import GgmlError, LibraryMismatchError, LibraryNotFoundError

#: Plug-ins whose C functions :mod:`ggml_cffi.c` declares.
PLUGINS = ("vulkan", "rpc")
#: Environment variable with the names of the plug-ins to load, separated by commas.
BACKENDS = "GGML_CFFI_BACKENDS"
#: The end of a message about a missing GPU or plug-in.
ADVICE = "run `ggml-cffi doctor` to see what is missing"


@dataclass(frozen=True)
class Plugin:
    """A plug-in that was found, and the result of loading it."""

    name: str
    """Name, such as ``"vulkan"``."""
    file: str
    """Path of its file."""
    loaded: bool = False
    """True if it was loaded."""
    n_devices: int | None = None
    """Number of its devices; None if it was not loaded, or is linked to the core, which loads it."""
    reason: str = ""
    """Reason why it was not loaded; empty if it was."""
    excluded: bool = False
    """True if it was not tried, because ``$GGML_CFFI_BACKENDS`` or ``load_backends`` excludes it."""
    messages: tuple[str, ...] = ()
    """Messages of ggml and of the plug-in while it was loaded."""


class RefusedPlace(NamedTuple):
    """A place that has no usable core, and comes before the one that was used."""

    label: str
    """Kind of the place, such as ``"$GGML_CFFI_LIBRARY_PATH"``."""
    folder: str | None
    """Its folder, None for the system's libraries."""
    reason: str
    """Reason why it was not used."""


_lock = threading.RLock()
_loaded: dict[str, Any] = {}
_plugins: dict[str, Plugin] = {}  # those that were tried, or excluded
_opened: list[Any] = []  # also those of places that were refused: C may hold pointers into them
_refused: list[RefusedPlace] = []
_place: str | None = None
_label = ""
_version = ""
_cpu_file = ""
_pids: list[int] = []  # the process of each plug-in with devices that was loaded
_all_tried = False  # all plug-ins were loaded, have failed or are excluded


def load(name: str) -> Any:
    """Return the cffi library ``base``, ``cpu``, ``ggml`` or that of a plug-in, and load it on first use.

    Raises
    ------
    LibraryNotFoundError
        If it is not found or not loaded; the message has the places, the reasons and the remedy.
    ValueError
        If ``$GGML_CFFI_BACKENDS`` has the name of a plug-in that is not there.
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


def load_plugins(names: Collection[str] | None = None) -> None:
    """Load the core, and once in the life of the process its plug-ins. A failure is kept for :func:`plugins`.

    Parameters
    ----------
    names
        The plug-ins to load; default those of ``$GGML_CFFI_BACKENDS``, or all.

    Raises
    ------
    ValueError
        If there is no plug-in of a name.
    GgmlError
        If ``names`` comes too late, because plug-ins have been loaded.
    LibraryNotFoundError
        If a plug-in of ``names`` cannot be loaded.
    """
    global _all_tried
    with _lock:
        load("base")
        if names is not None and (_all_tried or _plugins):
            raise GgmlError("the plug-ins are loaded already: choose them before the first use of a device")
        if _all_tried:
            return
        files = plugin_files()
        chosen, source = _chosen(names, files)
        for name in files:
            if name not in _plugins:
                _plugins[name] = _try_plugin(name, files[name], chosen, source)
        _all_tried = True
        for name in sorted((names and chosen) or ()):
            load(name)  # raises with the reason


def are_plugins_loaded() -> bool:
    """Return whether :func:`load_plugins` was called."""
    return _all_tried


def plugin_files() -> dict[str, list[str]]:
    """Load the core, and return the files of its plug-ins, several of one name if it has variants."""
    load("base")
    return files_of_plugins(_place)


def plugin_names(names: Collection[str]) -> frozenset[str]:
    """Return the plug-ins that ``names`` ask for, in lower case. The CPU is always there."""
    return frozenset(name.strip().lower() for name in names) - {"", "cpu"}


def plugins() -> list[Plugin]:
    """Load the plug-ins as :func:`load_plugins` does, and return all that were found, in the order of loading."""
    load_plugins()
    return [_plugins[name] for name in plugin_files() if name in _plugins]


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
    first = versions.since(name)
    remedy = "build the newest with ./build_lib.sh, or set GGML_CFFI_LIBRARY_PATH to a folder that holds it"
    if not versions.can_build(first):
        remedy = "set GGML_CFFI_LIBRARY_PATH to a folder that holds it, such as that of Debian's libggml0; build_lib.sh"
        remedy += f" builds {NEWEST_BUILT} at most"
    return LibraryMismatchError(f"{feature} needs ggml {first} or newer; loaded is {description()}: {remedy}")


def available(plugin: str) -> bool:
    """Load a plug-in, and return whether that was possible."""
    try:
        load(plugin)
    except LibraryNotFoundError:
        if "base" not in _loaded:
            raise
        return False
    return True


def inherited() -> bool:
    """Return whether a plug-in was loaded before this process was forked: its driver does not work here."""
    return any(pid != os.getpid() for pid in _pids)


def location() -> str | None:
    """Load the core, and return its folder, None if the system does not tell it."""
    load("base")
    return _place


def place_label() -> str:
    """Load the core, and return the kind of its place, such as ``"the system's libraries"``."""
    load("base")
    return _label


def refused_places() -> list[RefusedPlace]:
    """Return the places that the search for the core has refused so far."""
    return list(_refused)


def cpu_file() -> str:
    """Load the core, and return the file of its CPU backend: the only one, or the variant for this machine."""
    load("base")
    return _cpu_file


def _load_core() -> None:
    global _place, _label, _version
    # ggml would start a debugger for its backtrace when it aborts.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    _refused.clear()
    mismatch = False
    for label, folder in places():
        try:
            found, loaded, opened = _open_core(folder)
        except (OSError, LibraryMismatchError) as error:
            mismatch = mismatch or isinstance(error, LibraryMismatchError)
            _refused.append(RefusedPlace(label, folder, str(error)))
            continue
        _loaded.update(found)
        _place, _label, _version = opened, label, loaded
        return
    reasons = [f"  {label}{f': {folder}' if folder else ''}\n    {reason}" for label, folder, reason in _refused]
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
    global _cpu_file
    try:
        _cpu_file = path(folder, "ggml-cpu")
        return _dlopen(_cpu_file)
    except OSError:
        variants = [
            os.path.join(place, name)
            for place in backend_folders(folder)
            for name in sorted(os.listdir(place))
            if name.startswith(f"{PREFIX}ggml-cpu-")
        ]
        if not variants:
            raise
    _cpu_file = max(variants, key=_score)
    if _score(_cpu_file) == 0 or core.ggml_backend_load(os.fsencode(_cpu_file)) == ffi.NULL:
        raise OSError(f"none of its {len(variants)} CPU variants runs on this machine")
    return _dlopen(_cpu_file)


def _score(variant: str) -> int:
    """Return the score of a variant of a backend on this machine; 0 if it cannot run here, or has no score."""
    import ctypes  # only backends with variants need it

    try:
        return int(ctypes.CDLL(variant).ggml_backend_score())
    except (OSError, AttributeError):
        return 0


def _load_plugin(name: str) -> None:
    """Load one plug-in if that was not tried yet; raise if it is not loaded."""
    if name not in _plugins:
        files = plugin_files()
        if name not in files:
            raise LibraryNotFoundError(
                f"there is no {name} plug-in for {description()}: build it with ./build_lib.sh, or set "
                f"GGML_CFFI_LIBRARY_PATH to a folder that holds libggml-{name}; {ADVICE}"
            )
        _plugins[name] = _try_plugin(name, files[name], *_chosen(None, files))
    found = _plugins[name]
    if not found.loaded:
        raise LibraryNotFoundError(f"the {name} plug-in at {found.file} is not loaded: {found.reason}; {ADVICE}")


def _chosen(names: Collection[str] | None, found: Collection[str]) -> tuple[frozenset[str] | None, str]:
    """Return the plug-ins to load, None for all, and the origin of the choice. The CPU is always there."""
    source = "the call of load_backends"
    if names is None:
        if BACKENDS not in os.environ:
            return None, ""
        names, source = os.environ[BACKENDS].split(","), f"${BACKENDS}"
    chosen = plugin_names(names)
    if unknown := sorted(chosen - set(found)):
        raise ValueError(
            f"{source} has {', '.join(unknown)}, but the plug-ins of {description()} are "
            f"{', '.join(found) or 'none'}; {ADVICE}"
        )
    return chosen, source


def _try_plugin(name: str, files: list[str], chosen: frozenset[str] | None, source: str) -> Plugin:
    """Load a plug-in unless it is excluded, write the result to the log, and return it."""
    import logging

    logger = logging.getLogger("ggml_cffi")
    if chosen is not None and name not in chosen:
        return Plugin(name, files[0], reason=f"{source} excludes it", excluded=True)
    linked = next(filter(_is_linked, files), None)
    if linked:  # ggml registered its devices with the core
        plugin = Plugin(name, linked, loaded=True)
        _loaded[name] = _dlopen(linked)
    else:
        plugin = _open_plugin(name, files[0] if len(files) == 1 else max(files, key=_score))
    if plugin.loaded:
        if plugin.n_devices != 0:
            _pids.append(os.getpid())
        logger.info("loaded the %s plug-in from %s", name, plugin.file)
    else:
        level = logging.INFO if chosen is None else logging.WARNING
        logger.log(level, "the %s plug-in at %s is not loaded: %s", name, plugin.file, plugin.reason)
    return plugin


def _open_plugin(name: str, file: str) -> Plugin:
    try:
        _check_version(file)
        if name == "vulkan" and sys.platform == "linux":
            _dlopen("libvulkan.so.1")  # a wheel's plug-in loads without it, but has no device then
        library = _dlopen(file)  # raises with the reason, which ggml's own loader would only log
    except (OSError, LibraryMismatchError) as error:
        return Plugin(name, file, reason=re.sub("^cannot load library '[^']*': ", "", str(error)))
    if name == "cuda":
        cuda_peers.turn_on()
    quiet = log.without_missing_devices() if name == "vulkan" else nullcontext()
    with log.captured() as messages, quiet:
        registered = _loaded["ggml"].ggml_backend_load(os.fsencode(file))
    if registered == ffi.NULL:
        last = messages[-1] if messages else "ggml refused it"
        reason = last.partition(f" from {file}: ")[2] or last.removeprefix("load_backend: ")
        return Plugin(name, file, reason=reason, messages=tuple(messages))
    _loaded[name] = library
    n_devices = _loaded["base"].ggml_backend_reg_dev_count(registered)
    return Plugin(name, file, loaded=True, n_devices=n_devices, messages=tuple(messages))


def _is_linked(file: str) -> bool:
    """Return whether a library is loaded already, because the core is linked to it."""
    import ctypes  # cffi's dlopen crashes where this flag finds nothing

    try:
        ctypes.CDLL(file, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except (OSError, AttributeError):  # Windows has no such flag
        return False
    return True


def _check_version(file: str) -> None:
    """Raise :class:`LibraryMismatchError` if a plug-in is of another version than the core.

    ggml would load it, and then call functions of the wrong types. A plug-in does not tell its version. The name of its
    file may, and a core in its folder. Beside the loaded core, it is trusted.
    """
    known = version_of_file(file)
    folder = os.path.realpath(os.path.dirname(file))
    if known is None and os.path.dirname(file) and folder not in map(os.path.realpath, backend_folders(_place)):
        try:
            known = ffi.string(_dlopen(path(folder, "ggml-base")).ggml_version()).decode()
        except OSError:
            return
    if known is not None and versions.numbers(known) != versions.numbers(_version):
        raise LibraryMismatchError(f"it is of ggml {known}, not {_version} as the core")
