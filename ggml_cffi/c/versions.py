"""Supported versions of ggml, and the checks of one that is not known."""

from __future__ import annotations

import sys
from typing import Any

from ggml_cffi.c._decl import FUNCTIONS, NEWEST_BUILT, SINCE, VERSIONS, ffi
from ggml_cffi.enums import Op, Type
from ggml_cffi.errors import LibraryMismatchError


def supported() -> str:
    """Return the range of supported versions in words."""
    return f"{VERSIONS[0]} to {VERSIONS[-1].rpartition('.')[0]}"


def numbers(version: str) -> tuple[int, ...]:
    """Return a version as numbers, which compare as versions do. A suffix after a hyphen is ignored."""
    parts = version.partition("-")[0].split(".")
    return tuple(int(part) if part.isdecimal() else -1 for part in parts)


def nearest(version: str) -> str:
    """Return the newest known version that is not newer than ``version``."""
    known: list[str] = [v for v in VERSIONS if numbers(v) <= numbers(version)]
    return known[-1]


def since(name: str) -> str:
    """Return the first known version that has a C function."""
    first: str = SINCE.get(name, VERSIONS[0])
    return first


def provides(version: str, name: str) -> bool:
    """Return whether a version has a C function."""
    return numbers(since(name)) <= numbers(version)


def can_build(version: str) -> bool:
    """Return whether ``build_lib.sh`` builds a version, or a newer one."""
    return numbers(version) <= numbers(NEWEST_BUILT)


def check_range(version: str) -> None:
    """Raise :class:`LibraryMismatchError` if a version is not supported. Newer patches of the newest one are."""
    if not numbers(VERSIONS[0]) <= numbers(version) < (*numbers(VERSIONS[-1])[:2], sys.maxsize):
        raise LibraryMismatchError(f"it is version {version}; supported are {supported()}")


def check_sizes(base: Any) -> None:
    """Raise :class:`LibraryMismatchError` if structs whose sizes a library tells have others than the declared ones."""
    first, second = (int(ffi.cast("uintptr_t", base.ggml_get_type_traits(i))) for i in (0, 1))
    sizes = {
        "struct ggml_tensor": base.ggml_tensor_overhead() - 32,  # the pool's own header of an object
        "struct ggml_type_traits": second - first,  # neighbours in a table
    }
    for struct, size in sizes.items():
        if size != ffi.sizeof(struct):
            name = struct.removeprefix("struct ")
            raise LibraryMismatchError(f"its {name} takes {size} bytes, not {ffi.sizeof(struct)}")


def check_unknown(version: str, libraries: dict[str, Any]) -> None:
    """Check a version that this package was not made for against the declarations of the nearest older one.

    Raises
    ------
    LibraryMismatchError
        If a function is missing, or an operation or a type has another number.
    """
    for place, library in libraries.items():
        for name in FUNCTIONS[place].split():
            if provides(version, name) and not _has(library, name):
                raise LibraryMismatchError(f"version {version} has no {name}, unlike {nearest(version)}")
    base = libraries["base"]
    named = [(int(op), op.name, base.ggml_op_name(op)) for op in Op]
    named += [(int(dtype), dtype.name, base.ggml_type_name(dtype)) for dtype in Type]
    for number, want, have in named:
        found = ffi.string(have).decode()
        if found.lower() != want.lower():
            raise LibraryMismatchError(f"version {version} calls number {number} {found}, not {want}")
    import logging

    message = "ggml %s is none of the versions that ggml_cffi was made for (%s): it is used like %s"
    logging.getLogger("ggml_cffi").warning(message, version, ", ".join(VERSIONS), nearest(version))


def _has(library: Any, name: str) -> bool:
    try:
        return getattr(library, name) is not None
    except (AttributeError, ffi.error):
        return False
