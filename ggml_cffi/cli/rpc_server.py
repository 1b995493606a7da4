"""The command ``ggml-cffi rpc-server``: this machine's devices for another machine."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

from ggml_cffi.cli._model_args import parse_devices


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("rpc-server", help="offer this machine's devices to another machine")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=50052, help="0 for a free one (default: %(default)s)")
    command.add_argument(
        "--devices",
        help="names, PCI ids or positions, separated by commas (default: every GPU, else the CPU)",
    )
    command.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    command.add_argument("--cache", help="folder that keeps large tensors, so that they need not be sent again")
    command.add_argument("--stop-with-stdin", action="store_true", help="stop when standard input ends")
    command.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from ggml_cffi import rpc

    # Python's default format shows a line of source code, which is of no use to the command's user.
    warnings.showwarning = lambda message, *_rest, **_more: print(f"WARNING: {message}", file=sys.stderr, flush=True)
    rpc.serve(
        parse_devices(args.devices),
        host=args.host,
        port=args.port,
        n_threads=args.threads,
        cache=args.cache,
        stop_with_stdin=args.stop_with_stdin,
        announce=lambda endpoint: print(f"listening on {endpoint}", flush=True),
    )
    sys.stderr.flush()
    os._exit(0)  # ggml's server still runs in its thread and cannot be stopped
