"""Models of the Hugging Face hub by their ``hf://`` addresses, through ``huggingface_hub``.

The package's cache, tokens, offline mode and progress bars are used: what another program of the machine downloaded is
not downloaded again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from ggml_cffi.core.progress import Progress
from ggml_cffi.errors import missing_extra
from ggml_cffi.files.gguf import remote

_FORMS = "hf://ORG/REPO/FILE.gguf, hf://ORG/REPO:TYPE such as :Q4_K_M, with @REVISION after REPO if it is not main"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:@]+))?(?:/(?P<file>[^:]+\.gguf)|:(?P<type>[\w.-]+))?"
)
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_CANDIDATES = 20  # in a message


def is_hub_address(path: object) -> bool:
    """Return whether a path is an address of the hub."""
    return isinstance(path, str) and path.startswith("hf://")


@dataclass(frozen=True)
class HubAddress:
    """The parts of an address: a file, or a type of which the repository has one model."""

    repo: str
    revision: str | None
    file: str | None
    type: str | None

    @classmethod
    def parse(cls, address: str) -> HubAddress:
        """Return the parts of an address.

        Raises
        ------
        ValueError
            If it has another form.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise ValueError(f"{address!r} is no address of a model on the hub: write {_FORMS}")
        revision = found["revision"]
        return cls(found["repo"], None if revision is None else unquote(revision), found["file"], found["type"])

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.repo}{revision}{'/' + self.file if self.file else ''}{':' + self.type if self.type else ''}"


@dataclass(frozen=True)
class _Files:
    """The files of one model in a repository."""

    names: Sequence[str]
    """All parts of a split model, the first one first."""
    sizes: dict[str, int]
    """Bytes of each file, without those that the hub does not tell."""
    commit: str | None
    """The commit of the revision; None if the hub cannot be reached, and the cache has the names."""


def local_path(path: str | os.PathLike[str], *, progress: Progress | None = None) -> str | os.PathLike[str]:
    """Return a path as it is, and the path of the downloaded file for an address of the hub."""
    return fetch_from_hub(path, progress=progress) if isinstance(path, str) and is_hub_address(path) else path


def header_path(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return a path as it is, and for an address of the hub a path or URL from which the header can be read.

    It is the file in the cache if that is there, else its URL, of which nothing is downloaded.

    Raises
    ------
    ValueError, ImportError, OSError
        See :func:`fetch_from_hub`.
    """
    if not (isinstance(path, str) and is_hub_address(path)):
        return path
    address, hub = HubAddress.parse(path), _package()
    with _plain_errors(address):
        files = _find(hub, address)
        revision = files.commit or address.revision
        cached = [hub.try_to_load_from_cache(address.repo, name, revision=revision) for name in files.names]
        if all(isinstance(each, str) for each in cached):
            return str(cached[0])
        token = hub.get_token()
        api = hub.HfApi()
        if token:
            remote.authorize(f"{api.endpoint}/{address.repo}/", f"Bearer {token}")
        url: str = hub.hf_hub_url(address.repo, files.names[0], revision=revision, endpoint=api.endpoint)
        return url


def fetch_from_hub(address: str, *, progress: Progress | None = None) -> Path:
    """Return the path of a model of the hub, which is downloaded into the cache of ``huggingface_hub`` on first use.

    Parameters
    ----------
    address
        ``hf://org/repo/file.gguf``, or ``hf://org/repo:Q4_K_M`` for the file whose name has that type;
        ``hf://org/repo`` if the repository has one model. A revision follows the repository: ``hf://org/repo@v1:Q8_0``.
    progress
        Called with the bytes downloaded so far and the bytes in all; default the bars of ``huggingface_hub``.

    Returns
    -------
    Path
        The file; the first one of a split model, with the others beside it.

    Raises
    ------
    ValueError
        If the address has another form, or several models have the type. The message lists them.
    FileNotFoundError
        If there is no such repository, revision or file, or the repository is private and there is no token for it; in
        offline mode, if the cache has no such file.
    PermissionError
        If the repository asks for consent first.
    OSError
        If the hub cannot be reached or refuses.
    ImportError
        If ``huggingface_hub`` is not installed: the extra ``hub``.
    """
    parsed, hub = HubAddress.parse(address), _package()
    with _plain_errors(parsed):
        files = _find(hub, parsed)
        total = sum(files.sizes.get(name, 0) for name in files.names)
        paths: list[str] = []
        done = 0
        for name in files.names:
            bar = None if progress is None else _bar_class(progress, done, total)
            # By the revision, so that the cache has its commit for offline mode; then by the commit, so that all parts
            # are of one. What the cache has without the hub is not looked for there again.
            revision = files.commit if paths and files.commit else parsed.revision
            only_cache = files.commit is None
            paths.append(
                hub.hf_hub_download(parsed.repo, name, revision=revision, tqdm_class=bar, local_files_only=only_cache)
            )
            done += files.sizes.get(name, 0)
    return Path(paths[0])


def _package() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise missing_extra("a model of the hub (hf://)", "huggingface_hub", "hub") from None
    return huggingface_hub


# ---------------------------------------------------------------------- the choice of files


def _find(hub: Any, address: HubAddress) -> _Files:
    """Return the files of the model: by the list of the hub, or by the cache if the hub cannot be reached."""
    from huggingface_hub import errors

    try:
        info = hub.HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
    except errors.HFValidationError as error:
        raise ValueError(f"{address} is no address of a model on the hub: {error}") from None
    except errors.HfHubHTTPError as error:
        if error.response is None or error.response.status_code < 500:
            raise
        reason: Exception = error
    except Exception as error:  # its type is of the HTTP library, which is another one in other versions
        reason = error
    else:
        sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
        names = [file.rfilename for file in info.siblings or ()]
        return _Files(choose_files(names, address), sizes, info.sha)
    names = _cached_names(hub, address)
    try:
        return _Files(choose_files(names, address), {}, None)
    except (FileNotFoundError, ValueError) as error:
        if names and isinstance(error, ValueError):
            raise
        why = "HF_HUB_OFFLINE is set" if isinstance(reason, errors.OfflineModeIsEnabled) else f"not reached: {reason}"
        held = f"; it has {_listed(names)}" if names else ""
        raise FileNotFoundError(f"{address} is not in the cache of huggingface_hub{held} (the hub: {why})") from None


def choose_files(names: Iterable[str], address: HubAddress) -> list[str]:
    """Return the files of the model that an address names, all parts of a split one.

    Parameters
    ----------
    names
        Names of all files of the repository.

    Raises
    ------
    FileNotFoundError
        If there is none, or a part of it is missing. The message lists the models that are there.
    ValueError
        If there are several.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        part = _PART.fullmatch(name)
        models.setdefault(part["stem"] + ".gguf" if part else name, []).append(name)
    if address.file is not None:
        part = _PART.fullmatch(address.file)
        found = [part["stem"] + ".gguf" if part else address.file]
    else:
        # Projectors of images and importance matrices are no models.
        whole = [name for name in models if not re.search("mmproj|imatrix", PurePosixPath(name).name, re.IGNORECASE)]
        found = [name for name in whole if address.type is None or _has_type(name, address.type)]
    parts = models.get(found[0], []) if len(found) == 1 else []
    if len(found) > 1:
        wish = "several models" if address.type is None else f"several models of the type {address.type}"
        raise ValueError(f"{address}: the repository has {wish}: {_listed([models[name][0] for name in found])}")
    if not parts:
        held = f": it has {_listed([parts[0] for parts in models.values()])}" if models else ", and no other GGUF file"
        wish = address.file or (f"model of the type {address.type}" if address.type else "model")
        raise FileNotFoundError(f"{address}: the repository has no {wish}{held}")
    last = _PART.fullmatch(parts[-1])
    if last is not None and len(parts) != int(last["count"]):
        raise FileNotFoundError(f"{address}: the repository has {len(parts)} of {int(last['count'])} parts: {parts}")
    return parts


def _has_type(name: str, wanted: str) -> bool:
    """Return whether a file's name, or its folder's, has a type such as ``Q4_K_M``: not ``Q4_K``, which is another."""
    stem = name.removesuffix(".gguf")
    return re.search(rf"(^|[-._/]){re.escape(wanted)}([-./]|$)", stem, re.IGNORECASE) is not None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_CANDIDATES} more" if len(names) > _MAX_CANDIDATES else ""
    return ", ".join(names[:_MAX_CANDIDATES]) + more


def _cached_names(hub: Any, address: HubAddress) -> list[str]:
    """Return the names of the files of the repository's revision that the cache has."""
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    wanted = address.revision or "main"
    return [
        file.file_path.relative_to(revision.snapshot_path).as_posix()
        for repo in repos
        if (repo.repo_type, repo.repo_id) == ("model", address.repo)
        for revision in repo.revisions
        if wanted in revision.refs or wanted == revision.commit_hash
        for file in revision.files
    ]


# ---------------------------------------------------------------------- errors and progress


@contextmanager
def _plain_errors(address: HubAddress) -> Iterator[None]:
    """Raise errors of the hub as those of files, with the way out."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{address}: {address.repo} asks for your consent on its page; then set HF_TOKEN or log in (hf auth login)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{address}: there is no repository {address.repo}, or it is private: set HF_TOKEN or log in "
            "(hf auth login)"
        ) from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{address}: {address.repo} has no revision {address.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"{address} is not in the cache, and cannot be downloaded: {error}") from None
    except errors.HfHubHTTPError as error:
        raise OSError(f"{address}: the hub refused: {str(error).splitlines()[0]}") from None


def _bar_class(report: Progress, before: int, total: int) -> Callable[..., Any]:
    """Return a class for ``huggingface_hub`` that reports the bytes of a file in place of showing a bar.

    Parameters
    ----------
    report
        Gets the bytes so far and the bytes in all.
    before
        Bytes of the files before.
    total
        Bytes of all files.
    """
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            report(before + int(self.n), total)
            return None

    return Bar
