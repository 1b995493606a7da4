"""The supported versions of ggml, and where their headers are."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class MissingHeadersError(Exception):
    """Signal that the headers of a version could not be fetched, with the reason."""


@dataclass(frozen=True)
class Version:
    """One line of ``vendor/versions.txt``."""

    name: str
    origin: str

    @property
    def has_source(self) -> bool:
        """True if there is more than headers, so that the version can be built."""
        return self.origin.startswith("pypi:")

    def folder(self) -> Path:
        """Return the folder with ``include/``, and ``src/`` if there is source; ``build_lib.sh`` fetches it if needed.

        ``GGML_SOURCE_DIR`` is a folder to use for the newest version with source.

        Raises
        ------
        MissingHeadersError
            If it cannot be fetched.
        """
        given = os.environ.get("GGML_SOURCE_DIR")
        if given and self == newest_with_source():
            return Path(given)
        folder = ROOT / "vendor" / "ggml" / self.name
        if not (folder / "include" / "ggml.h").exists():
            command = [str(ROOT / "build_lib.sh"), "--source-only", "--version", self.name]
            env = os.environ | {"PYTHON": sys.executable}  # whose pip downloads the source
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
            if done.returncode:
                raise MissingHeadersError(done.stderr.strip())
        return folder


@cache
def supported() -> tuple[Version, ...]:
    """Return the supported versions, oldest first."""
    lines = (ROOT / "vendor" / "versions.txt").read_text().splitlines()
    return tuple(Version(*line.split()[:2]) for line in lines if line and not line.startswith("#"))


def newest_with_source() -> Version:
    """Return the version that ``build_lib.sh`` builds by default."""
    return next(v for v in reversed(supported()) if v.has_source)
