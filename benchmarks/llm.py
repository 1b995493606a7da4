"""Speed, load time and memory of a model beside llama-cpp-python and the llama.cpp under it: same file, same threads.

Each runs in a process of its own, in turns, so that other work on the machine affects all alike. ``llama-cpp-python``
is measured with its Python interface (``Llama.eval``), ``llama.cpp`` with the C calls below it, without choosing
tokens. Both come from the Python that ``--peer`` names, which needs ``pip install --no-binary llama-cpp-python
llama-cpp-python==0.3.36`` (a native build of some minutes).

    python -m benchmarks.llm [--peer PYTHON] [--model FILE] [--threads 2] [--rounds 3] [--busy 2] [--flash off]

``--busy`` starts that many processes that compute in a loop until the end. ``llama.cpp`` has flash attention, its own
default, unless it is turned off; llama-cpp-python's default is without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

N_PROMPT, N_DECODE = 512, 128
SIDES = {"ours": "ours", "wrapped": "llama-cpp-python", "peer": "llama.cpp"}
PROMPT_TOKEN, FIRST_TOKENS = 100, [1, 2, 3, 4, 5]


def ours(model: str, threads: int, devices: list[str]) -> dict[str, float]:
    """Measure ggml_cffi once."""
    from ggml_cffi import models

    start = time.perf_counter()
    with models.load(model, devices, n_ctx=1024, n_threads=threads) as m:
        loaded = time.perf_counter() - start
        prompt = [PROMPT_TOKEN] * N_PROMPT
        m.forward(prompt, last=True)  # warm
        start = time.perf_counter()
        m.forward(prompt, last=True)
        prompt_rate = N_PROMPT / (time.perf_counter() - start)
        for n in (8, N_DECODE):  # the first is warm-up
            for _ in m.generate_tokens(FIRST_TOKENS, n, stop_at_end=False, reuse=False):
                pass
        return {"load_s": loaded, "prompt": prompt_rate, "decode": m.timings.decode_rate, **resident()}


def peer(model: str, threads: int, *, flash: bool) -> dict[str, float]:
    """Measure llama.cpp once, through the C API that llama-cpp-python wraps, without the time for choosing tokens."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    start = time.perf_counter()
    m = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = int(flash)
    ctx = lib.llama_init_from_model(m, params)
    loaded = time.perf_counter() - start
    memory, n_vocab = lib.llama_get_memory(ctx), lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(m))

    def evaluate(ids: list[int]) -> float:
        tokens = (lib.llama_token * len(ids))(*ids)
        start = time.perf_counter()
        if lib.llama_decode(ctx, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(ctx)
        return time.perf_counter() - start

    for _ in range(2):  # the first is warm-up
        lib.llama_memory_clear(memory, True)
        prompt_rate = N_PROMPT / evaluate([PROMPT_TOKEN] * N_PROMPT)
    lib.llama_memory_clear(memory, True)
    evaluate(FIRST_TOKENS)
    seconds = 0.0
    for i in range(8 + N_DECODE):  # the first are warm-up
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, -1), (n_vocab,))
        taken = evaluate([int(logits.argmax())])
        seconds += taken if i >= 8 else 0.0
    return {"load_s": loaded, "prompt": prompt_rate, "decode": N_DECODE / seconds, **resident()}


def wrapped(model: str, threads: int) -> dict[str, float]:
    """Measure llama-cpp-python once."""
    from llama_cpp import Llama

    start = time.perf_counter()
    m = Llama(model, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    loaded = time.perf_counter() - start
    for _ in range(2):  # the first is warm-up
        m.reset()
        start = time.perf_counter()
        m.eval([PROMPT_TOKEN] * N_PROMPT)
        prompt_rate = N_PROMPT / (time.perf_counter() - start)
    m.reset()
    m.eval(FIRST_TOKENS)
    for i in range(8 + N_DECODE):  # the first are warm-up
        if i == 8:
            start = time.perf_counter()
        m.eval([m.sample(temp=0.0)])
    return {"load_s": loaded, "prompt": prompt_rate, "decode": N_DECODE / (time.perf_counter() - start), **resident()}


def resident() -> dict[str, float]:
    """Return the resident memory of this process in MiB, current and peak, with the pages of mapped weights."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {"rss": int(status["VmRSS"].split()[0]) / 1024, "peak": int(status["VmHWM"].split()[0]) / 1024}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has llama_cpp (default: this one)")
    parser.add_argument("--model", help="a GGUF file (default: the demonstration model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside the measured one")
    parser.add_argument("--devices", default="CPU", help="devices of ggml_cffi, separated by commas")
    parser.add_argument("--flash", choices=("on", "off"), default="on", help="llama.cpp's attention in one operation")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    devices = args.devices.split(",")
    if args.side == "ours":
        print(json.dumps(ours(args.model, args.threads, devices)))
        return 0
    if args.side:
        sides = {"wrapped": wrapped, "peer": partial(peer, flash=args.flash == "on")}
        print(json.dumps(sides[args.side](args.model, args.threads)))
        return 0
    from ggml_cffi import models

    model = args.model or str(models.fetch("smollm2"))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    try:
        for _ in range(args.rounds):
            for side in SIDES:
                result = measure(sys.executable if side == "ours" else args.peer, side, model, args)
                if result is not None:
                    found[side].append(result)
    finally:
        for other in others:
            other.kill()
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
        "--flash",
        args.flash,
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
    print(f"{Path(model).name}, {args.threads} threads, {args.busy} busy processes, median of {args.rounds}")
    print(f"{'':10}" + "".join(f"{name:>18}{'' if side == 'ours' else '  ours':>6}" for side, name in SIDES.items()))
    labels = {
        "prompt": f"pp{N_PROMPT}",
        "decode": f"tg{N_DECODE}",
        "load_s": "load s",
        "rss": "RSS MiB",
        "peak": "peak MiB",
    }
    for key, label in labels.items():
        each = {s: statistics.median(r[key] for r in found[s]) if found[s] else float("nan") for s in SIDES}
        table[label] = each | {f"ratio to {s}": each["ours"] / each[s] for s in SIDES if s != "ours"}
        text = "".join(
            f"{x:18.3f}{'' if s == 'ours' else format(each['ours'] / x, '5.2f') + 'x':>6}" for s, x in each.items()
        )
        print(f"{label:10}{text}")
    print(
        save(
            "llm",
            {"model": Path(model).name, "threads": args.threads, "busy": args.busy, "results": table, "rounds": found},
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
