"""Build hook for wheels: with built libraries they are for one platform, without libraries for any."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PlatformTag(BuildHookInterface):
    """Platform tag ``py3-none-<platform>`` of a wheel, if ``build_lib.sh`` has filled ``ggml_cffi/lib``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Set the tag; hatchling calls this before it builds."""
        if version != "standard" or not any(Path(self.root, "ggml_cffi", "lib").glob("*ggml*")):
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
