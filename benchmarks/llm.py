"""Prompt and decode speed of a model beside llama.cpp (llama-cpp-python), on the same file and threads.

The two run in processes of their own, in turns, so that whatever else the machine does falls on both. The peer is
taken from the Python that ``--peer`` names, which needs ``pip install --no-binary llama-cpp-python
llama-cpp-python==0.3.36`` (a native build, minutes).

    python -m benchmarks.llm [--peer PYTHON] [--model FILE] [--threads 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

N_PROMPT, N_DECODE = 512, 128
PROMPT_TOKEN, FIRST_TOKENS = 100, [1, 2, 3, 4, 5]


def ours(model: str, threads: int, devices: list[str]) -> dict[str, float]:
    """One measurement of ggml_cffi."""
    from ggml_cffi import models

    start = time.perf_counter()
    with models.load(model, devices, n_ctx=1024, n_threads=threads) as m:
        loaded = time.perf_counter() - start
        prompt = [PROMPT_TOKEN] * N_PROMPT
        m.forward(prompt, last=True)  # warm
        start = time.perf_counter()
        m.forward(prompt, last=True)
        prompt_rate = N_PROMPT / (time.perf_counter() - start)
        for _ in m.generate_tokens(FIRST_TOKENS, N_DECODE, stop_at_end=False):
            pass
        return {"load_s": loaded, "prompt": prompt_rate, "decode": m.timings.decode_rate}


def peer(model: str, threads: int) -> dict[str, float]:
    """One measurement of llama.cpp, through llama-cpp-python's low-level decode."""
    from llama_cpp import Llama

    start = time.perf_counter()
    m = Llama(model, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    loaded = time.perf_counter() - start
    prompt = [PROMPT_TOKEN] * N_PROMPT
    for _ in range(2):  # the first is warm-up
        m.reset()
        start = time.perf_counter()
        m.eval(prompt)
        prompt_rate = N_PROMPT / (time.perf_counter() - start)
    m.reset()
    m.eval(FIRST_TOKENS)
    seconds = 0.0
    for _ in range(N_DECODE):
        token = int(m._scores[-1].argmax()) if len(m._scores) else 0
        start = time.perf_counter()
        m.eval([token])
        seconds += time.perf_counter() - start
    return {"load_s": loaded, "prompt": prompt_rate, "decode": N_DECODE / seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has llama_cpp (default: this one)")
    parser.add_argument("--model", help="a GGUF file (default: the demonstration model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", default="CPU", help="for ours, separated by commas")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    devices = args.devices.split(",")
    if args.side:
        print(
            json.dumps(
                ours(args.model, args.threads, devices) if args.side == "ours" else peer(args.model, args.threads)
            )
        )
        return 0
    from ggml_cffi import models

    model = args.model or str(models.fetch("smollm2"))
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        for side, python in (("ours", sys.executable), ("peer", args.peer)):
            result = measure(python, side, model, args)
            if result is not None:
                found[side].append(result)
    report(found, model, args)
    return 0


def measure(python: str, side: str, model: str, args: argparse.Namespace) -> dict[str, float] | None:
    command = [
        python,
        __file__,
        "--side",
        side,
        "--model",
        model,
        "--threads",
        str(args.threads),
        "--devices",
        args.devices,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{side}: {reason}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def report(found: dict[str, list[dict[str, float]]], model: str, args: argparse.Namespace) -> None:
    from benchmarks import save

    table: dict[str, Any] = {}
    print(f"{Path(model).name}, {args.threads} threads, median of {args.rounds}")
    print(f"{'':10}{'ours':>10}{'llama.cpp':>12}{'ratio':>8}")
    for what, label in (("prompt", f"pp{N_PROMPT}"), ("decode", f"tg{N_DECODE}"), ("load_s", "load s")):
        a, b = (statistics.median(r[what] for r in found[s]) if found[s] else float("nan") for s in ("ours", "peer"))
        table[label] = {"ours": a, "peer": b, "ratio": a / b}
        print(f"{label:10}{a:10.2f}{b:12.2f}{a / b:8.2f}")
    print(save("llm", {"model": Path(model).name, "threads": args.threads, "results": table, "rounds": found}))


if __name__ == "__main__":
    raise SystemExit(main())
