"""The command ``ggml-cffi plan``: the bytes that a model would take on each device."""

from __future__ import annotations

import argparse
from typing import Any

from ggml_cffi.cli._model_args import add_placement_arguments, parse_devices
from ggml_cffi.core.text import to_json


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("plan", help="print the memory that a model would take on each device")
    add_placement_arguments(
        command,
        model_help="a GGUF file, its URL, or hf://ORG/REPO:TYPE; the header is enough",
        devices_help="names, or the memory of another machine's devices, such as 24G,24G,CPU:64G (default: every GPU, "
        "then the CPU)",
    )
    command.add_argument("--ctx", type=int, help="largest number of tokens in a sequence (default: up to 4096)")
    command.add_argument("--batch", type=int, default=512, help="tokens of a batch (default: %(default)s)")
    command.add_argument(
        "--measure-speed", action="store_true", help="time products on the devices, to estimate tokens/s"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    """Print the plan; return 0 if the model fits, 1 if not."""
    from ggml_cffi import models

    found = models.plan(
        args.model,
        parse_devices(args.devices),
        args.split,
        args.ctx,
        n_batch=args.batch,
        kv_dtype=args.kv_type,
        balance=args.balance,
        expected_tokens=args.expect,
        reserve=args.reserve,
        repack=args.repack,
        measure_speed=args.measure_speed,
    )
    print(to_json(found.as_dict(), indent=2) if args.json else found)
    return 0 if found.fits else 1
