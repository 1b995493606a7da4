"""Build hook for wheels: the libraries inside, the platform they are for, and the dependency without them."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Libraries(BuildHookInterface):
    """Libraries of ``build_lib.sh`` in a wheel, from ``$GGML_CFFI_WHEEL_LIBRARIES`` or else ``ggml_cffi/lib``.

    A wheel with them is for one platform (``py3-none-<platform>``). Without them it is for any, and depends on the
    prebuilt library of the extra ``prebuilt``, as an editable installation without them does.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries, the tag and the dependency; hatchling calls this before it builds."""
        folder = Path(os.environ.get("GGML_CFFI_WHEEL_LIBRARIES") or Path(self.root, "ggml_cffi", "lib"))
        files = sorted(folder.glob("*"))
        if not any("ggml-base" in file.name for file in files):
            build_data["dependencies"] += self.metadata.core.optional_dependencies["prebuilt"]
        elif version == "standard":
            build_data["force_include"] |= {str(file): f"ggml_cffi/lib/{file.name}" for file in files}
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform(folder)}"


def _platform(folder: Path) -> str:
    """Return the platform tag that ``build_lib.sh --portable`` noted, else that of this machine.

    A plug-in that ``--backend`` added was built for this machine, whatever the rest of the folder is for.
    """
    notes = folder / "BUILD"
    lines = [line.split() for line in notes.read_text().splitlines()] if notes.exists() else []
    noted = [line[1] for line in lines if line[0] == "platform"]
    if noted and not any("added" in line for line in lines):
        return noted[0]
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
