"""Arguments of the commands that load a model, and the function that loads it with a progress bar."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._output import progress_bar

if TYPE_CHECKING:
    from ggml_cffi.models import Model

DEVICES_HELP = "names, PCI ids or positions, separated by commas (default: every GPU, then the CPU)"
_RESERVE_HELP = "free memory of each GPU to leave free, such as 1G (default: 512M, less on GPUs with less than 8G free)"


def add_model_arguments(
    command: argparse.ArgumentParser, *, repeat_devices: bool = False, several_models: bool = False
) -> None:
    """Add the arguments for loading a model, or several. ``repeat_devices`` allows ``--devices`` several times."""
    add_placement_arguments(command, repeat_devices=repeat_devices, several_models=several_models)
    command.add_argument("--threads", type=int, help="threads of the CPU (default: all)")
    command.add_argument(
        "--deterministic", action="store_true", help="equal calls have equal results; one text at a time per device"
    )


def add_placement_arguments(
    command: argparse.ArgumentParser,
    *,
    repeat_devices: bool = False,
    model_help: str = "a GGUF file, or hf://ORG/REPO/FILE.gguf or hf://ORG/REPO:TYPE",
    devices_help: str = DEVICES_HELP,
    several_models: bool = False,
) -> None:
    """Add the arguments for the model file, or several files, and the placement on devices."""
    if several_models:
        command.add_argument("model", nargs="+", help=f"{model_help}, or NAME=FILE to give it a name")
    else:
        command.add_argument("model", help=model_help)
    if repeat_devices:
        command.add_argument("--devices", action="append", help=f"{devices_help}; may be repeated")
    else:
        command.add_argument("--devices", help=devices_help)
    command.add_argument(
        "--split",
        default="layer",
        help="how devices share the model: layer, pipeline, data, tensor, auto (default: %(default)s)",
    )
    command.add_argument(
        "--balance",
        type=parse_balance,
        default="memory",
        help="how layers are distributed: memory, speed, or a number per device, such as 3,1 (default: %(default)s)",
    )
    command.add_argument(
        "--expect",
        type=parse_expect,
        metavar="PROMPT,ANSWER",
        help="usual tokens of a prompt and of its answer, such as 4096,128, for --split auto (default: unknown)",
    )
    command.add_argument("--kv-type", default="f16", help="type of the KV cache (default: %(default)s)")
    command.add_argument(
        "--repack",
        action=argparse.BooleanOptionalAction,
        help="arrange weights of the CPU in some types for its fastest kernels, in memory that cannot be dropped "
        "(default: if there are no GPUs, and all weights take at most half of the free memory)",
    )
    add_reserve_argument(command)


def add_reserve_argument(command: argparse.ArgumentParser) -> None:
    """Add the argument for the memory that stays free."""
    command.add_argument("--reserve", metavar="SIZE", help=_RESERVE_HELP)


def parse_balance(text: str) -> str | list[float]:
    """Return ``"memory"`` and ``"speed"`` as they are, and ``"3,1"`` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return text


def parse_expect(text: str) -> tuple[int, int]:
    """Return the tokens of a prompt and of an answer, written ``"4096,128"``."""
    try:
        prompt, answer = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers of tokens such as 4096,128") from None
    return prompt, answer


def parse_devices(text: str | None) -> list[str] | None:
    """Return the device names of ``"Vulkan0, CPU"``, None for None."""
    return None if text is None else [name.strip() for name in text.split(",")]


def model_file(path: str) -> str | os.PathLike[str]:
    """Return the path of a model, which is downloaded with a progress bar for an address of the Hugging Face hub."""
    from ggml_cffi.models.hub import fetch_from_hub, is_hub_address

    if not is_hub_address(path):
        return path
    with progress_bar("downloading") as progress:
        return fetch_from_hub(path, progress=progress)


def open_model(args: argparse.Namespace, devices: str | None, n_ctx: int | None, **options: Any) -> Model:
    """Load the model that the arguments describe, with a progress bar. An encoder is refused: it generates no text.

    Parameters
    ----------
    args
        The arguments that :func:`add_model_arguments` added.
    devices
        Names, separated by commas; None for the default.
    n_ctx, options
        Further arguments of :func:`ggml_cffi.models.load`.
    """
    from ggml_cffi import models
    from ggml_cffi.files import GGUFFile
    from ggml_cffi.models.architectures import architecture_of

    path = model_file(args.model)
    with GGUFFile(path) as file:
        architecture_of(file).check_decoder()
    with progress_bar("loading") as progress:
        return models.load(path, **load_options(args, devices, n_ctx), progress=progress, **options)


def load_options(args: argparse.Namespace, devices: str | None, n_ctx: int | None) -> dict[str, Any]:
    """Return the arguments of :func:`ggml_cffi.models.load` for the arguments of :func:`add_model_arguments`."""
    return {
        "devices": parse_devices(devices),
        "split": args.split,
        "n_ctx": n_ctx,
        "balance": args.balance,
        "expected_tokens": args.expect,
        "n_threads": args.threads,
        "kv_dtype": args.kv_type,
        "deterministic": args.deterministic,
        "reserve": args.reserve,
        "repack": args.repack,
    }
