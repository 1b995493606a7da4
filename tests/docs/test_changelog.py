"""The renaming tables of CHANGELOG: every new module exists."""

import re

from tests.support import ROOT

PACKAGE = ROOT / "ggml_cffi"


def renamed_modules():
    """Return the full names of the new modules. A name with a leading dot is in the folder of the name before it."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    table = re.search(r"^Modules .*?\n\n(.*?)\n\n", text, re.S | re.M)
    assert table
    names = []
    for row in table[1].splitlines()[2:]:
        for name in re.findall(r"`([\w.]+)`", row.split("|")[2]):
            names.append(f"{names[-1].rpartition('.')[0]}{name}" if name.startswith(".") else name)
    return [name for name in names if "." in name or name in ("c", "flat")]


def test_every_new_module_of_the_renaming_table_exists():
    missing = []
    for name in renamed_modules():
        path = PACKAGE.joinpath(*name.split("."))
        if not path.with_suffix(".py").exists() and not (path / "__init__.py").exists():
            missing.append(name)
    assert missing == []
