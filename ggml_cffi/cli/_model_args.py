"""What the commands that load a model share: its arguments, loading with a progress bar."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._output import progress_bar

if TYPE_CHECKING:
    from ggml_cffi.models import Model


def add_model(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The arguments that say which model is loaded, and where. ``several`` allows ``--devices`` to be repeated."""
    add_place(command, several=several)
    command.add_argument("--threads", type=int, help="threads of the CPU (default: all)")


def add_place(command: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The arguments that say what goes where."""
    command.add_argument("model", help="a GGUF file")
    what = "names, separated by commas (default: every GPU, then the CPU)"
    if several:
        command.add_argument("--devices", action="append", help=f"{what}; may be repeated")
    else:
        command.add_argument("--devices", help=what)
    command.add_argument(
        "--split",
        default="layer",
        help="how devices share the model: layer, pipeline, data, tensor, auto (default: %(default)s)",
    )
    command.add_argument(
        "--balance",
        type=balance_of,
        default="memory",
        help="how layers are shared out: memory, speed, or a number a device, such as 3,1 (default: %(default)s)",
    )
    command.add_argument(
        "--expect",
        type=expected,
        metavar="PROMPT,ANSWER",
        help="tokens that a text will usually have, such as 4096,128, for --split auto (default: whatever comes)",
    )
    command.add_argument("--kv-type", default="f16", help="type of the KV cache (default: %(default)s)")


def balance_of(text: str) -> str | list[float]:
    """``"memory"`` and ``"speed"`` as they are, ``"3,1"`` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def expected(text: str) -> tuple[int, int]:
    """``"4096,128"`` as numbers."""
    prompt, answer = (int(part) for part in text.split(","))
    return prompt, answer


def device_names(text: str | None) -> list[str] | None:
    """A list of devices as an argument gives it."""
    return None if text is None else [name.strip() for name in text.split(",")]


def open_model(args: argparse.Namespace, devices: str | None, n_ctx: int | None, **options: Any) -> Model:
    """The model that the arguments name."""
    from ggml_cffi import models

    with progress_bar("loading") as progress:
        return models.load(
            args.model,
            device_names(devices),
            args.split,
            n_ctx,
            balance=args.balance,
            expect=args.expect,
            n_threads=args.threads,
            kv_dtype=args.kv_type,
            progress=progress,
            **options,
        )
