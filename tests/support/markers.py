"""Markers that follow from a test's code: nobody has to remember them.

``two_gpus`` and ``gpu`` follow from the names of Vulkan devices in parameters, fixtures and constants, ``model`` from
``fetch``, ``subprocess`` from the ways to start a process, ``slow`` from the folder. Functions of the tests that a test
calls, and its fixtures, count.
"""

from __future__ import annotations

import sys
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import pytest

_SUBPROCESS = frozenset(
    {"run_python", "subprocess", "Popen", "Worker", "Server", "serve", "pexpect", "multiprocessing"}
)
_SLOW_FOLDERS = ("tests.docs.", "tests.fuzzing.", "tests.upstream.")


def markers_of(item: pytest.Item) -> set[str]:
    """Return the names of the markers of a test."""
    words: set[str] = set()
    if isinstance(item, pytest.Function):
        words |= _words(item.function)
        callspec = getattr(item, "callspec", None)
        words |= _constants(tuple(callspec.params.values()) if callspec else ())
        for name, definitions in item._fixtureinfo.name2fixturedefs.items():
            if name != "at_least_two_vulkan_devices":
                words |= _words(definitions[-1].func)
        words |= set(item.fixturenames)
    found = set()
    if "Vulkan0" in words:
        found.add("gpu")
    if "Vulkan1" in words or "two_gpus" in words:
        found |= {"gpu", "two_gpus"}
    if words & {"fetch", "smollm2"}:
        found.add("model")
    if words & _SUBPROCESS:
        found.add("subprocess")
    if item.module.__name__.startswith(_SLOW_FOLDERS):  # type: ignore[attr-defined]
        found.add("slow")
    return found


@cache
def _words(function: Any) -> frozenset[str]:
    """Return the names and strings in the code of ``function`` and of the functions of the tests that it calls."""
    words: set[str] = set()
    seen, todo = set(), [function]
    while todo:
        at = todo.pop()
        at = getattr(at, "__wrapped__", at)
        if not isinstance(at, FunctionType) or at in seen or not at.__module__.startswith("tests."):
            continue
        seen.add(at)
        names = _code_words(at.__code__)
        words |= names
        module = sys.modules[at.__module__]
        for name in names:
            called = getattr(module, name, None)
            todo += list(vars(called).values()) if isinstance(called, type) else [called]
    return frozenset(words)


def _code_words(code: CodeType) -> set[str]:
    words = {*code.co_names, *_constants(code.co_consts)}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            words |= _code_words(constant)
    return words


def _constants(values: tuple[object, ...]) -> set[str]:
    words: set[str] = set()
    for value in values:
        if isinstance(value, str):
            words.add(value)
        elif isinstance(value, tuple | list | frozenset):
            words |= _constants(tuple(value))
    return words
