"""The command ``ggml-cffi convert``: a GGUF file from a Hugging Face folder."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ggml_cffi.cli._output import progress_bar
from ggml_cffi.core.text import size


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("convert", help="write a GGUF file from a Hugging Face folder")
    command.add_argument("folder", help="a folder with config.json, *.safetensors and the tokenizer's files")
    command.add_argument("target", help="the GGUF file to write")
    command.add_argument(
        "--type", default="f16", help="type of the matrices: f32, f16, bf16 or q8_0 (default: %(default)s)"
    )
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ggml_cffi.files.gguf import GGUFFile
    from ggml_cffi.models.convert.convert import convert

    with progress_bar("converting") as progress:
        convert(args.folder, args.target, args.type, progress=progress)
    with GGUFFile(args.target) as file:
        architecture, n = file.metadata["general.architecture"], len(file.tensors)
    print(f"{args.target}: {architecture}, {n} tensors, {size(os.path.getsize(args.target))}")
    return 0
