"""The command ``ggml-cffi rpc-server``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any


def register(commands: Any) -> None:
    """Add the command to ``commands``, argparse's."""
    command = commands.add_parser("rpc-server", help="offer this machine's devices to another machine")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=50052, help="0 for one that is free (default: %(default)s)")
    command.add_argument("--devices", help="names, separated by commas (default: every GPU, or the CPU without one)")
    command.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    command.add_argument("--cache", help="folder in which large tensors are kept, not to be sent again")
    command.add_argument("--stop-with-stdin", action="store_true", help="stop when standard input ends")
    command.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    from ggml_cffi import rpc

    # In the way of a command: no line of its source.
    warnings.showwarning = lambda message, *_rest, **_more: print(f"WARNING: {message}", file=sys.stderr, flush=True)
    rpc.serve(
        [name.strip() for name in args.devices.split(",")] if args.devices is not None else None,
        host=args.host,
        port=args.port,
        n_threads=args.threads,
        cache=args.cache,
        stop_with_stdin=args.stop_with_stdin,
        announce=lambda endpoint: print(f"listening on {endpoint}", flush=True),
    )
    sys.stderr.flush()
    os._exit(0)  # ggml's server goes on in its thread
