"""The command ``ggml-cffi perplexity``: the perplexity of a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ggml_cffi.cli._model_args import add_model_arguments, open_model
from ggml_cffi.cli._output import progress_bar
from ggml_cffi.core.text import to_json


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("perplexity", help="measure how well a model predicts a text")
    add_model_arguments(command)
    command.add_argument("file", help="a text file, - for standard input")
    command.add_argument("--ctx", type=int, default=512, help="tokens of a window (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_perplexity)


def _perplexity(args: argparse.Namespace) -> int:
    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8", errors="replace")
    with (
        open_model(args, args.devices, max(args.ctx, 2), n_batch=min(args.ctx, 512)) as model,
        progress_bar("scoring", "tok") as progress,
    ):
        result = model.perplexity(text, n_ctx=args.ctx, progress=progress)
    if args.json:
        print(to_json({"perplexity": result.value, "error": result.error, "tokens": result.n_tokens}))
    else:
        print(f"perplexity {result} over {result.n_tokens} tokens")
    return 0
