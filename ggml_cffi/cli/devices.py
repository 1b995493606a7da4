"""The command ``ggml-cffi devices``: the devices of this machine with their memory, and the ggml that reaches them."""

from __future__ import annotations

import argparse
from typing import Any

import ggml_cffi
from ggml_cffi.c import library
from ggml_cffi.core.text import size, table, to_json


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("devices", help="list the devices with their memory")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_devices)


def _devices(args: argparse.Namespace) -> int:
    found = ggml_cffi.devices()
    if args.json:
        print(to_json([_as_dict(d) for d in found], indent=2))
        return 0
    print(f"{library.description()}\n")
    rows = [("device", "type", "free", "total", "description")]
    for d in found:
        memory = d.memory()
        rows.append((d.name, d.type.name, size(memory.free), size(memory.total), d.description))
    print(table(rows, right=(2, 3)))
    return 0


def _as_dict(d: ggml_cffi.Device) -> dict[str, Any]:
    memory = d.memory()
    return {
        "name": d.name,
        "type": d.type.name,
        "description": d.description,
        "memory_free": memory.free,
        "memory_total": memory.total,
        "pci_id": d.pci_id,
        "ggml_version": library.version(),
    }
