"""The map in CONTRIBUTING: every file of the package is there, with a description, and every file in the map exists."""

import re

from tests.support import ROOT

PACKAGE = ROOT / "ggml_cffi"


def mapped_files():
    """Return each path of the map, relative to the package, with its description.

    Two spaces of indentation are one folder. The line of a package stands for its ``__init__.py``.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```text\nggml_cffi/\n(.*?)```", text, re.S)
    assert block, "CONTRIBUTING.md has no map: a block of text that begins with ggml_cffi/"
    folders, found = [], {}
    for line in block[1].splitlines():
        indent, name, description = re.fullmatch(r"( +)(\S+)\s*(.*)", line).groups()
        depth = len(indent) // 2 - 1
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
            name = "__init__.py"
        path = "".join(folders) + name
        assert path not in found, f"{path} is in the map twice"
        found[path] = description
    return found


def package_files():
    paths = [path.relative_to(PACKAGE) for pattern in ("*.py", "*.pyi") for path in PACKAGE.rglob(pattern)]
    return {path.as_posix() for path in paths if path.parts[0] not in ("lib", "lib.tmp")}


def test_every_file_of_the_package_is_in_the_map():
    assert sorted(package_files() - set(mapped_files())) == []


def test_every_file_in_the_map_exists():
    assert sorted(set(mapped_files()) - package_files()) == []


def test_every_file_in_the_map_has_a_description():
    assert [path for path, description in mapped_files().items() if not description] == []


def test_the_functions_that_contributing_names_exist():
    """A ``path.py:name`` of CONTRIBUTING is a file of the package and a name that the file defines."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = []
    for path, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        file = PACKAGE / path
        *_, last = name.split(".")
        if not file.exists() or not re.search(rf"(def|class) {last}\b|^ *{last}\b.*=", file.read_text("utf-8"), re.M):
            missing.append(f"{path}:{name}")
    assert missing == []
