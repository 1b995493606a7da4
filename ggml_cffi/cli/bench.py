"""The command ``ggml-cffi bench``: prefill and decode speed of a model."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._model_args import add_model_arguments, open_model
from ggml_cffi.cli._output import progress_bar
from ggml_cffi.core.text import size, table, to_json

if TYPE_CHECKING:
    from ggml_cffi.core.progress import Progress
    from ggml_cffi.models import Model

_TOKEN = 1  # any token will do: the speed does not depend on it


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("bench", help="measure prefill and decode speed")
    add_model_arguments(command, repeat_devices=True)
    command.add_argument("-p", "--prompt", type=int, default=512, help="tokens of a prompt (default: %(default)s)")
    command.add_argument("-n", "--decode", type=int, default=128, help="tokens to decode (default: %(default)s)")
    command.add_argument("-b", "--batch", type=int, default=512, help="tokens of a batch (default: %(default)s)")
    command.add_argument("-r", "--rounds", type=int, default=5, help="measurements of each (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> int:
    if args.prompt < 0 or args.decode < 0 or args.rounds < 1:
        raise ValueError("--prompt and --decode must be at least 0, --rounds at least 1")
    results = [result for devices in args.devices or [None] for result in _measure(args, devices)]
    if args.json:
        print(to_json(results, indent=2))
        return 0
    rows = [("model", "size", "devices", "split", "test", "tokens/s")]
    for r in results:
        rate = f"{r['tokens_per_second']:.2f} ± {r['stdev']:.2f}"
        rows.append((r["model"], size(r["size"]), r["devices"], r["split"], r["test"], rate))
    print(table(rows, right=(1, 5)))
    return 0


def _measure(args: argparse.Namespace, devices: str | None) -> list[dict[str, Any]]:
    """Return the results on one list of devices: of prefill ("pp") and of decode ("tg")."""
    results: list[dict[str, Any]] = []
    n_ctx = max(args.prompt, args.decode) + 1
    with open_model(args, devices, n_ctx, n_batch=args.batch) as model:
        used = ",".join(p.device for p in model.placement if p.weight_bytes or p.layers)
        weight_bytes = sum(p.weight_bytes for p in model.placement)
        for test, n, measure in (("pp", args.prompt, _prefill_rates), ("tg", args.decode, _decode_rates)):
            if not n:
                continue
            with progress_bar(f"measuring {test}{n} on {used}", "tok") as progress:
                rates = measure(model, n, args.rounds, progress)
            deviation = statistics.stdev(rates) if len(rates) > 1 else 0.0
            results.append(
                {
                    "model": Path(args.model).name,
                    "size": weight_bytes,
                    "devices": used,
                    "split": args.split,
                    "test": f"{test}{n}",
                    "tokens_per_second": round(statistics.mean(rates), 2),
                    "stdev": round(deviation, 2),
                }
            )
    return results


def _prefill_rates(model: Model, n: int, rounds: int, progress: Progress | None) -> list[float]:
    """Return the tokens per second of prompts of ``n`` tokens, without the first round, which warms up."""
    rates = []
    for i in range(rounds + 1):
        start = time.perf_counter()
        model.forward([_TOKEN] * n, last=True)
        rates.append(n / (time.perf_counter() - start))
        if progress is not None:
            progress((i + 1) * n, (rounds + 1) * n)
    return rates[1:]


def _decode_rates(model: Model, n: int, rounds: int, progress: Progress | None) -> list[float]:
    """Return the tokens per second of decoding ``n`` tokens one by one, without the first round, which warms up."""
    rates = []
    for i in range(rounds + 1):
        model.clear_cache()
        for _token in model.generate_tokens([_TOKEN], n + 1, stop_at_end=False):
            pass
        rates.append(model.timings.decode_rate)
        if progress is not None:  # between rounds, not between tokens: a bar takes time
            progress((i + 1) * n, (rounds + 1) * n)
    return rates[1:]
