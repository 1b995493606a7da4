"""A model split over GPUs in every way, beside one GPU, and beside llama.cpp with the same splits.

    python -m benchmarks.parallel [--shapes 1B,8B] [--dtypes f16,q4_k] [--splits ...] [--peer PYTHON] [DEVICE ...]

The models have random weights; they are made in ``--folder`` and kept there. Each line has tokens/s of prompts of 512
tokens one after another, of a prompt of 4096 and of 128 tokens decoded one by one, all of one sequence at a time (with
``data`` of one sequence on each GPU at the same time, added up), then the memory of the GPUs: planned, and taken by the
device's own count. ``auto`` gets the expected tokens of each case, and reports its choice. Where `nvidia-smi` is, lines
have the median clock and utilization of each GPU during decode, and a mark for a clock below half of its largest value.
``--peer`` names an interpreter with llama-cpp-python built for the backend of the devices, Vulkan or CUDA. Software
devices take ``--shapes tiny --prompts 64``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ggml_cffi as ggml
from benchmarks import save, shapes
from benchmarks.clocks import Clocks
from ggml_cffi import models

_LEAST = 1.0  # seconds
SPLITS = ("one", "layer", "pipeline", "data", "tensor", "auto")


def best(run: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of the quickest of some rounds, which take a second at least, after one that does not count.

    GPUs need a while to reach their speed.
    """
    run()
    found: list[float] = []
    while len(found) < rounds or sum(found) < _LEAST:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def ours(path: Path, devices: Sequence[str], split: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one split; of ``auto`` for each case, with its expected tokens."""
    cases = [f"prompt {n}" for n in args.prompts] + ["decode"]
    if split != "auto":
        return measured(path, devices[:1] if split == "one" else devices, split, cases, None, args)
    expected = [(n, 0) for n in args.prompts] + [(1, args.decode)]
    found: dict[str, Any] = {}
    for case, expect in zip(cases, expected, strict=True):
        part = measured(path, devices, split, [case], expect, args)
        keys = (case, f"{case} clocks", "planned", "taken")
        found |= {key: part[key] for key in keys} | {f"{case} by": part["split"]}
    return found


def measured(
    path: Path,
    used: Sequence[str],
    split: str,
    cases: Sequence[str],
    expect: tuple[int, int] | None,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Load the model, run the cases and return their figures."""
    kind, n_ctx = "layer" if split == "one" else split, max(args.prompts) + args.decode
    plan = models.plan(path, used, kind, n_ctx, expected_tokens=expect)
    before = {d: ggml.device(d).memory().free for d in used}
    start = time.perf_counter()
    with models.load(path, used, kind, n_ctx, expected_tokens=expect) as model, ThreadPoolExecutor(len(used)) as pool:
        busy = [share.device for share in plan.devices if share.layers]
        found: dict[str, Any] = {"load_s": time.perf_counter() - start, "split": plan.split if busy[1:] else "one"}
        texts = len(used) if plan.split == "data" else 1

        def together(run: Callable[[], Any]) -> None:
            list(pool.map(lambda _: run(), range(texts)))

        def decode() -> None:
            model.clear_cache()  # attention would read the KV slots of kept sequences
            together(lambda: list(model.generate_tokens([1], args.decode, stop_at_end=False, reuse=False)))

        def read(n: int, times: int) -> None:
            together(lambda: [model.forward([1] * n, last=True) for _ in range(times)])

        for case in cases:
            with Clocks(ggml.device(d).pci_id for d in used) as clocks:
                if case == "decode":
                    found[case] = texts * args.decode / best(decode, args.rounds)
                else:
                    n = int(case.split()[1])
                    times = max(args.prompts) // n  # one after another, as long as the longest prompt together
                    found[case] = texts * times * n / best(partial(read, n, times), args.rounds)
            found[f"{case} clocks"] = str(clocks)
        taken = {d: before[d] - ggml.device(d).memory().free for d in used}
    shares = {share.device: share.total for share in plan.devices}
    found["planned"] = [shares.get(d, 0) for d in used]
    found["taken"] = [taken[d] for d in used]
    return found


def theirs(path: Path, devices: Sequence[str], split: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of llama.cpp; with ``data`` of a process on each GPU."""
    kind = devices[0].rstrip("0123456789")
    numbers = [d.removeprefix(kind) for d in devices]
    visible = {"CUDA": "CUDA_VISIBLE_DEVICES"}.get(kind, "GGML_VK_VISIBLE_DEVICES")
    groups = {"one": [numbers[:1]], "data": [[n] for n in numbers]}.get(split, [numbers])
    mode = split if split in ("layer", "tensor") else "none"
    prompts = ",".join(map(str, args.prompts))
    command = [args.peer, str(Path(__file__).with_name("llama_bench.py")), str(path), "--split", mode]
    command += ["--prompts", prompts, "--decode", str(args.decode)]
    going = [
        subprocess.Popen(
            command,
            env=os.environ | {visible: ",".join(group)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for group in groups
    ]
    each = []
    for process in going:
        out, errors = process.communicate()
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            return {"error": f"ended with {process.returncode}: {last:.200}"}
        each.append(json.loads(out.splitlines()[-1]))
    return {key: sum(found[key] for found in each) for key in each[0] if key != "load_s"}


def line(who: str, split: str, found: dict[str, Any], one: dict[str, Any] | None) -> str:
    if "error" in found:
        return f"{who:10} {split:9} {found['error']}"
    text = f"{who:10} {split:9}"
    for key in [key for key in found if isinstance(found[key], float) and key != "load_s"]:
        by = f" by {found[f'{key} by']}" if f"{key} by" in found else ""
        ratio = f" ({found[key] / one[key]:4.2f}x)" if one and key in one else ""
        clocks = found.get(f"{key} clocks", "")
        shown = key == "decode" or "LOW" in clocks  # prompts keep GPUs busy
        text += f"  {key} {found[key]:8.1f}{ratio}{by}{f' [{clocks}]' if clocks and shown else ''}"
    if "taken" in found:
        text += "  GiB " + ", ".join(
            f"{a / 2**30:.2f}/{b / 2**30:.2f}" for a, b in zip(found["planned"], found["taken"], strict=True)
        )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", help="GPUs (default: the first two)")
    parser.add_argument("--shapes", default="1B,8B")
    parser.add_argument("--dtypes", default="f16,q4_k")
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--prompts", default="512,4096", help="tokens")
    parser.add_argument("--decode", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ggml_cffi_models"))
    parser.add_argument("--peer", help="an interpreter with llama-cpp-python")
    parser.add_argument(
        "--peer-splits", default="one,layer,data,tensor", help="its layer split keeps batches in flight"
    )
    args = parser.parse_args()
    args.prompts = [int(n) for n in args.prompts.split(",")]
    devices = args.devices or [d.name for d in ggml.devices() if not d.is_cpu][:2]
    if len(devices) < 2 and args.splits != "one":
        parser.error("two GPUs are needed; GGML_VK_VISIBLE_DEVICES=0,0 makes two of one, software devices included")
    args.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"devices": [ggml.device(d).description for d in devices], "command": " ".join(sys.argv)}
    for shape in args.shapes.split(","):
        for dtype in args.dtypes.split(","):
            path = args.folder / f"{shape}-{dtype}.gguf"
            if not path.exists():
                shapes.write(path, shapes.SHAPES[shape], dtype)
            print(f"{shape}, {dtype} ({path.stat().st_size / 1e9:.2f} GB)", flush=True)
            for who, measure in (("ggml_cffi", ours), *((("llama.cpp", theirs),) if args.peer else ())):
                figures: dict[str, Any] = {}
                for split in args.splits.split(","):
                    if who == "llama.cpp" and split not in args.peer_splits.split(","):
                        continue
                    try:
                        figures[split] = measure(path, devices, split, args)
                    except (ValueError, ggml.GgmlError) as error:
                        figures[split] = {"error": str(error)}
                    print(" ", line(who, split, figures[split], figures.get("one")), flush=True)
                result[f"{shape} {dtype} {who}"] = figures
    print(save("parallel", result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
