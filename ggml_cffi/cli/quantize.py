"""The command ``ggml-cffi quantize``: a model with its weights in another type."""

from __future__ import annotations

import argparse
import os
from math import prod
from typing import Any

from ggml_cffi.cli._output import progress_bar
from ggml_cffi.core.text import parse_size, size


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("quantize", help="write a model with its weights in another type")
    command.add_argument("source", metavar="IN", help="a GGUF file; the first file of a split model")
    command.add_argument("target", metavar="OUT", help="the file to write")
    command.add_argument("--type", required=True, dest="dtype", help="such as q4_k_m, q8_0, iq4_xs, bf16")
    command.add_argument(
        "--only", action="append", metavar="PATTERN", help='convert only tensors with such names, e.g. "blk.*.ffn_*"'
    )
    command.add_argument("--keep", action="append", metavar="PATTERN", help="do not convert tensors with such names")
    command.add_argument("--imatrix", metavar="FILE", help="importance of each column, from llama-imatrix")
    command.add_argument(
        "--allow-requantize", action="store_true", help="quantize weights again that are quantized already"
    )
    command.add_argument("--max-size", type=_parse_size, metavar="SIZE", help="split files larger than this, e.g. 2G")
    command.add_argument("--threads", type=int, help="threads to use (default: all)")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_quantize)


def _parse_size(text: str) -> int:
    """Return the bytes of a size such as ``"500M"`` or ``"2GiB"``."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _quantize(args: argparse.Namespace) -> int:
    from ggml_cffi.files import quantize_file, read_imatrix

    imatrix = read_imatrix(args.imatrix) if args.imatrix is not None else None
    before = _weights(args.source)  # OUT may be IN
    with progress_bar("quantizing") as progress:
        try:
            paths = quantize_file(
                args.source,
                args.target,
                args.dtype,
                only=args.only,
                keep=args.keep,
                imatrix=imatrix,
                allow_requantize=args.allow_requantize,
                max_bytes=args.max_size,
                overwrite=args.force,
                threads=args.threads,
                progress=progress,
            )
        except FileExistsError as error:
            raise FileExistsError(f"{error}; --force replaces it") from None
    for path in paths:
        print(f"{path}: {size(os.path.getsize(path))}")
    print(f"weights: {before} before, {_weights(paths[0])} after")
    return 0


def _weights(path: str) -> str:
    """Return the bytes of a model's tensors, and the bits of each of their elements, as text."""
    from ggml_cffi.files import GGUFFile

    with GGUFFile(path) as file:
        n_bytes = sum(info.nbytes for info in file.tensors.values())
        n = sum(prod(info.shape) for info in file.tensors.values())
    return f"{size(n_bytes)} ({8 * n_bytes / max(n, 1):.2f} bits per weight)"
