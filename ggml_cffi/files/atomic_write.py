"""Atomic writes: files that appear under their names when they are complete, and not before."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from typing import BinaryIO


def write_files(paths: Sequence[str], write: Callable[[int, BinaryIO], None], *, overwrite: bool = True) -> None:
    """Write several files atomically: ``write(i, file)`` writes file ``i``, and all get their names at the end.

    Until all files are on the disk they have temporary names beside their targets. An exception, also that of Ctrl-C,
    removes them. A file that replaces another one gets its mode, and its owner if the process may give it.

    Raises
    ------
    FileExistsError
        If a target exists and ``overwrite`` is false.
    OSError
        If a target is not a regular file, or cannot be written.
    """
    targets = [os.path.realpath(path) for path in paths]  # a symbolic link stays; its target is replaced
    for path, target in zip(paths, targets, strict=True):
        _check(path, target, overwrite)
    temporary = [os.path.join(os.path.dirname(t), f".{os.urandom(8).hex()}.tmp") for t in targets]
    done: list[str] = []
    try:
        for i, name in enumerate(temporary):
            with open(name, "xb") as file:
                write(i, file)
                file.flush()
                _copy_mode(targets[i], file.fileno())
                os.fsync(file.fileno())
        # The first file gets its name last: a reader that finds it finds the others too.
        for name, target in reversed(list(zip(temporary, targets, strict=True))):
            os.replace(name, target)
            done.append(target)
    except BaseException:
        for name in [*temporary, *(done if len(done) < len(targets) else ())]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        raise
    for folder in {os.path.dirname(target) for target in targets}:
        _sync_folder(folder)


def _copy_mode(target: str, fd: int) -> None:
    """Give an open file the owner and the mode of the file ``target``, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target)
        with contextlib.suppress(PermissionError):
            os.fchown(fd, old.st_uid, old.st_gid)  # before the mode: it clears set-user-id
        os.fchmod(fd, stat.S_IMODE(old.st_mode))


def _check(path: str, target: str, overwrite: bool) -> None:
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is not a regular file: it cannot be replaced")
    if not overwrite:
        raise FileExistsError(f"{path} exists already")


def _sync_folder(folder: str) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
