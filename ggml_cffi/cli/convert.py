"""The command ``ggml-cffi convert``: a Hugging Face folder to a GGUF file."""

from __future__ import annotations

import argparse
import os
from typing import Any


def register(commands: Any) -> None:
    """Add the command to those of the parser."""
    command = commands.add_parser("convert", help="make a GGUF file of a Hugging Face folder")
    command.add_argument("folder", help="with config.json, *.safetensors and the tokenizer's files")
    command.add_argument("target", help="the GGUF file to write")
    command.add_argument("--type", default="f16", help="of the matrices: f32, f16, bf16 or q8_0 (default: %(default)s)")
    command.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from ggml_cffi.files.gguf.reader import GGUFFile
    from ggml_cffi.models.convert.convert import convert

    convert(args.folder, args.target, args.type)
    with GGUFFile(args.target) as file:
        kind, n = file.metadata["general.architecture"], len(file.tensors)
    print(f"{args.target}: {kind}, {n} tensors, {os.path.getsize(args.target) / 2**20:.1f} MiB")
    return 0
