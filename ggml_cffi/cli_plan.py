"""The command ``ggml-cffi plan``: what a model would take, and where."""

from __future__ import annotations

import argparse
import json
from typing import Any


def register(commands: Any) -> None:
    """Add the command to those of the parser."""
    command = commands.add_parser("plan", help="say what a model would take on each device, without loading it")
    command.add_argument("model", help="a GGUF file")
    command.add_argument("--devices", help="names, separated by commas (default: every GPU, then the CPU)")
    command.add_argument("--ctx", type=int, help="most tokens of prompt and answer (default: up to 4096)")
    command.add_argument("--batch", type=int, default=512, help="most tokens computed at once (default: %(default)s)")
    command.add_argument("--kv-type", default="f16", help="type of the KV cache (default: %(default)s)")
    command.add_argument(
        "--balance",
        default="memory",
        help="memory, speed, or a number for each device, such as 3,1 (default: memory)",
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_plan)


def balance_of(text: str) -> str | list[float]:
    """``"memory"`` and ``"speed"`` as they are, ``"3,1"`` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def _plan(args: argparse.Namespace) -> int:
    """0 if it fits, 1 if not."""
    from ggml_cffi import models

    names = [name.strip() for name in args.devices.split(",")] if args.devices is not None else None
    found = models.plan(
        args.model, names, args.ctx, n_batch=args.batch, kv_dtype=args.kv_type, balance=balance_of(args.balance)
    )
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0 if found.fits else 1
