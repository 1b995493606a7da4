"""The commands ``ggml-cffi bench`` and ``ggml-cffi perplexity``."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._model_args import add_model, open_model
from ggml_cffi.cli._output import gib, progress_bar
from ggml_cffi.core.text import table

if TYPE_CHECKING:
    from ggml_cffi.models import Model

_TOKEN = 1  # what is computed does not matter


def register(commands: Any) -> None:
    """Add the commands to those of the parser."""
    command = commands.add_parser("bench", help="measure prompt and decode speed")
    add_model(command, several=True)
    command.add_argument("-p", "--prompt", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    command.add_argument("-n", "--decode", type=int, default=128, help="tokens to decode (default: %(default)s)")
    command.add_argument("-b", "--batch", type=int, default=512, help="most tokens of a run (default: %(default)s)")
    command.add_argument("-r", "--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_bench)

    command = commands.add_parser("perplexity", help="how well a model foretells a text")
    add_model(command)
    command.add_argument("file", help="a text file, - for standard input")
    command.add_argument("--ctx", type=int, default=512, help="tokens of a window (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(run=_perplexity)


def _bench(args: argparse.Namespace) -> int:
    if args.prompt < 0 or args.decode < 0 or args.rounds < 1:
        raise ValueError("--prompt and --decode must be at least 0, --rounds at least 1")
    found: list[dict[str, Any]] = []
    for devices in args.devices or [None]:
        n_ctx = max(args.prompt, args.decode) + 1
        with open_model(args, devices, n_ctx, n_batch=args.batch) as model:
            where = ",".join(s.backend.name for s in model.placement if s.weight_bytes or s.layers)
            size = sum(s.weight_bytes for s in model.placement)
            for test, n, measure in (("pp", args.prompt, _prompt), ("tg", args.decode, _decode)):
                if n:
                    rates = measure(model, n, args.rounds)
                    spread = statistics.stdev(rates) if len(rates) > 1 else 0.0
                    found.append(
                        {
                            "model": Path(args.model).name,
                            "size": size,
                            "devices": where,
                            "split": args.split,
                            "test": f"{test}{n}",
                        }
                    )
                    found[-1] |= {"tokens_per_second": round(statistics.mean(rates), 2), "stdev": round(spread, 2)}
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("model", "size", "devices", "split", "test", "tokens/s")]
    for f in found:
        rate = f"{f['tokens_per_second']:.2f} ± {f['stdev']:.2f}"
        rows.append((f["model"], gib(f["size"]), f["devices"], f["split"], f["test"], rate))
    print(table(rows, right=(1, 5)))
    return 0


def _prompt(model: Model, n: int, rounds: int) -> list[float]:
    """Tokens a second of prompts of ``n``, after one that does not count."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model.forward([_TOKEN] * n, last=True)
        rates.append(n / (time.perf_counter() - start))
    return rates[1:]


def _decode(model: Model, n: int, rounds: int) -> list[float]:
    """Tokens a second of ``n`` decoded one by one, after a round that does not count."""
    rates = []
    for _ in range(rounds + 1):
        model.clear_cache()
        for _token in model.generate_tokens([_TOKEN], n + 1, stop_at_end=False):
            pass
        rates.append(model.timings.decode_rate)
    return rates[1:]


def _perplexity(args: argparse.Namespace) -> int:
    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text(encoding="utf-8", errors="replace")
    with (
        open_model(args, args.devices, max(args.ctx, 2), n_batch=min(args.ctx, 512)) as model,
        progress_bar("scoring") as progress,
    ):
        found = model.perplexity(text, n_ctx=args.ctx, progress=progress)
    if args.json:
        print(json.dumps({"perplexity": found.value, "error": found.error, "tokens": found.n_tokens}))
    else:
        print(f"perplexity {found} over {found.n_tokens} tokens")
    return 0
