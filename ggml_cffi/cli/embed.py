"""The command ``ggml-cffi embed``: vectors of texts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ggml_cffi.cli._model_args import add_reserve_argument, model_file, parse_devices
from ggml_cffi.cli._output import progress_bar
from ggml_cffi.core.text import to_json


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("embed", help="turn texts into vectors")
    command.add_argument("model", help="a GGUF file")
    command.add_argument(
        "-t", "--text", nargs="+", action="extend", help="texts to embed (default: each line of standard input)"
    )
    command.add_argument("-o", "--output", metavar="FILE", help="a .npy file to write (default: lines of JSON)")
    command.add_argument("--pooling", help="mean, cls or last (default: the pooling that the model was trained with)")
    command.add_argument("--raw", action="store_true", help="do not normalize the vectors to length 1")
    command.add_argument("--devices", help="names, separated by commas (default: every GPU, then the CPU)")
    command.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    add_reserve_argument(command)
    command.set_defaults(run=_embed)


def _embed(args: argparse.Namespace) -> int:
    import numpy as np

    from ggml_cffi import models

    path = model_file(args.model)
    with progress_bar("loading") as progress:
        model = models.load(
            path,
            parse_devices(args.devices),
            n_threads=args.threads,
            reserve=args.reserve,
            progress=progress,
        )
    with model:
        texts = args.text or [line.rstrip("\r\n") for line in sys.stdin]
        vectors = model.embed(texts, pooling=args.pooling, normalize=not args.raw)
    if args.output is not None:
        with open(args.output, "wb") as file:  # given a name, np.save would append .npy
            np.save(file, vectors)
        return 0
    for vector in vectors:
        print(to_json([float(f"{x:.7g}") for x in vector]))
    return 0
