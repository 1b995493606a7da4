"""The reference pages: every name that they document can be imported."""

import importlib
import re

import pytest

from tests.support import ROOT

REFERENCE = ROOT / "docs" / "reference"
PAGES = sorted(path.name for path in REFERENCE.glob("*.md"))
OBJECT = re.compile(r"\.\. auto(function|class|exception|data|module):: (\S+)|\.\. (?:py:)?currentmodule:: (\S+)")


def documented_names(page):
    """Return the full dotted names of the objects and modules that a page documents."""
    module, names = "ggml_cffi", []
    for kind, name, current in OBJECT.findall((REFERENCE / page).read_text(encoding="utf-8")):
        if current:
            module = current
        else:
            names.append(name if kind == "module" or name.startswith("ggml_cffi.") else f"{module}.{name}")
    return names


def resolve(name):
    """Import the longest prefix of ``name`` that is a module, and return the attribute that the rest names."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_there_are_reference_pages():
    assert sum(len(documented_names(page)) for page in PAGES) > 60


@pytest.mark.parametrize("page", PAGES)
def test_every_documented_name_can_be_imported(page):
    for name in documented_names(page):
        assert resolve(name) is not None, name
