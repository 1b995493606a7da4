"""Names of a package that are imported when they are first used, so that the import of the package stays short."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from ggml_cffi.core.known_names import hint


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package (PEP 562).

    Parameters
    ----------
    package
        ``__name__`` of the package.
    modules
        For each module, its names, separated by spaces. A module inside the package is a name too.
    """
    places = {name: module for module, names in modules.items() for name in names.split()}

    def getattr_of_package(name: str) -> Any:
        if f"{package}.{name}" in modules:
            return import_module(f"{package}.{name}")
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint(name)}")
        value = getattr(import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return getattr_of_package
