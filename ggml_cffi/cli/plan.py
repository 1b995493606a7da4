"""The command ``ggml-cffi plan``: what a model would take, and where."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ggml_cffi.cli._model_args import add_place, device_names


def register(commands: Any) -> None:
    """Add the command to those of the parser."""
    command = commands.add_parser("plan", help="say what a model would take on each device, without loading it")
    add_place(command)
    command.add_argument("--ctx", type=int, help="most tokens of prompt and answer (default: up to 4096)")
    command.add_argument("--batch", type=int, default=512, help="most tokens computed at once (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    """0 if it fits, 1 if not."""
    from ggml_cffi import models

    found = models.plan(
        args.model,
        device_names(args.devices),
        args.split,
        args.ctx,
        n_batch=args.batch,
        kv_dtype=args.kv_type,
        balance=args.balance,
        expect=args.expect,
    )
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0 if found.fits else 1
