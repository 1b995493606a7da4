"""Builders of cases: one function per test class of upstream, registered under the names of its operations.

A function gets the case's :class:`~upstream.draw.Inputs` and its parameters, and returns the result. It raises
``ValueError`` if ggml_cffi refuses the case, and ``AttributeError`` if the operation does not exist.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import SimpleNamespace

import ggml_cffi as ggml
from tests.upstream.draw import Inputs

Builder = Callable[[Inputs, SimpleNamespace], ggml.Tensor]
BUILDERS: dict[str, Builder] = {}


def builds(*ops: str) -> Callable[[Builder], Builder]:
    """Register a function for the operations of these names."""

    def register(function: Builder) -> Builder:
        for op in ops:
            BUILDERS[op] = function
        return function

    return register


def load() -> dict[str, Builder]:
    """Import all builders and return them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return BUILDERS
