"""The command ``ggml-cffi devices``: the devices of this machine with their memory, and the ggml that reaches them."""

from __future__ import annotations

import argparse
from typing import Any

import ggml_cffi
from ggml_cffi.c import cuda_peers, library
from ggml_cffi.core.device import same_cards
from ggml_cffi.core.text import size, table, to_json


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("devices", help="list the devices with their memory")
    command.add_argument(
        "--all", action="store_true", help="list a card that several backends show once for each of them"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_devices)


def _devices(args: argparse.Namespace) -> int:
    found, views = ggml_cffi.devices(all=args.all), same_cards()
    if args.json:
        print(to_json([_as_dict(d, views.get(d)) for d in found], indent=2))
        return 0
    print(f"{library.description()}\n")
    rows = [("device", "type", "free", "total", "description")]
    for d in found:
        memory = d.memory()
        rows.append((d.name, d.type.name, size(memory.free), size(memory.total), d.description))
    print(table(rows, right=(2, 3)))
    notes = [f"{other.name} is the card of {d.name}, by {other.backend_name}." for other, d in views.items()]
    if notes and not args.all:
        notes.append("It can be named, and --all lists it." if len(notes) == 1 else "They can be named; see --all.")
    if peers := cuda_peers.state():
        notes.append(f"CUDA peer access is {peers}.")
    if notes:
        print("", *notes, sep="\n")
    return 0


def _as_dict(d: ggml_cffi.Device, better: ggml_cffi.Device | None) -> dict[str, Any]:
    memory = d.memory()
    return {
        "name": d.name,
        "type": d.type.name,
        "backend": d.backend_name,
        "description": d.description,
        "memory_free": memory.free,
        "memory_total": memory.total,
        "pci_id": d.pci_id,
        "same_card_as": better.name if better else None,
        "ggml_version": library.version(),
    }
