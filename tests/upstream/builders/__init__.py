"""Builders of cases: one function per test class of upstream, registered under the names of its operations.

A function gets the case's :class:`~upstream.draw.Inputs` and its parameters, and returns the result. It raises
``ValueError`` if ggml_cffi refuses the case, ``AttributeError`` if the operation does not exist, and
:class:`UnknownCaseError` if the meaning of a parameter is not known here. It reads every parameter, or registers those
that it does without: a list of another version may have new ones, and the result would be that of another case.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import ggml_cffi as ggml
from tests.upstream.draw import Inputs
from tests.upstream.text import Params

Builder = Callable[[Inputs, Params], ggml.Tensor]
BUILDERS: dict[str, Builder] = {}
UNUSED: dict[str, frozenset[str]] = {}


class UnknownCaseError(Exception):
    """Signal that a case cannot be built, since the meaning of a parameter is not known here."""


def builds(*ops: str, unused: str = "") -> Callable[[Builder], Builder]:
    """Register a function for the operations of these names, and the parameters that it does not need."""

    def register(function: Builder) -> Builder:
        for op in ops:
            BUILDERS[op] = function
            UNUSED[op] = frozenset(unused.split())
        return function

    return register


def build(op: str, inputs: Inputs, p: Params) -> ggml.Tensor:
    """Build a case."""
    result = load()[op](inputs, p)
    unread = p.unread() - UNUSED[op]
    if unread:
        raise UnknownCaseError(f"unknown parameters: {', '.join(sorted(unread))}")
    return result


def load() -> dict[str, Builder]:
    """Import all builders and return them."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return BUILDERS
