"""Layers shared by two GPUs, beside one GPU with all of them: tokens one by one, prompts, and where the time goes.

    python -m benchmarks.tensor_parallel [--small] [--shapes 8B,70B] [--dtype q8_0] [DEVICE DEVICE ...]

The weights are random, made on the fly: ``8B`` is a whole model of that shape (7.7 GB in Q8_0), ``70B`` eight of 80
layers. ``--small`` is for software devices, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save
from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.models.architectures.decoder import Rope
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.runners.base import Batch
from ggml_cffi.models.runners.tensor import TensorRunner
from ggml_cffi.parallel import ParallelProgram, Rank, TensorParallel, rank

# layers, embedding, feed-forward, heads, KV heads, vocabulary
SHAPES = {
    "8B": (32, 4096, 14336, 32, 8, 32000),
    "70B": (8, 8192, 28672, 64, 8, 1024),
    "small": (2, 256, 512, 4, 2, 256),
}
HEAD_SIZES = {"8B": 128, "70B": 128, "small": 64}


class Shape(Llama):
    """A llama model of given sizes that has no file."""

    def __init__(self, name: str, dtype: ggml.Type) -> None:
        self.n_layers, self.n_embd, self.n_ff, self.n_heads, self.n_kv_heads, self.n_vocab = SHAPES[name]
        self.head_size = self.v_size = HEAD_SIZES[name]
        self.kv_sizes = (self.n_kv_heads * self.head_size, self.n_kv_heads * self.v_size)
        self.eps, self.scale, self.n_ctx_train = 1e-5, self.head_size**-0.5, 8192
        self.rope = Rope(self.rope_mode, self.head_size, 500000.0)
        self.dtype = dtype
        self.file: Any = SimpleNamespace(tensors={"output.weight": None}, path=name)
        self.shapes = dict(self.expected_tensors())

    def info(self, name: str) -> Any:
        return SimpleNamespace(dtype=self.dtype)

    def weights(self) -> dict[str, Any]:
        """Random weights by name."""
        return {
            name: Random(self.dtype, shape) if len(shape) == 2 else np.ones(shape, np.float32)
            for name, shape in self.shapes.items()
        }

    @property
    def layer_bytes(self) -> int:
        """Bytes of what a token is multiplied with."""
        rows = (s for name, s in self.shapes.items() if len(s) == 2 and name != "token_embd.weight")
        return sum(s[0] * dtypes.row_size(self.dtype, s[1]) for s in rows)


class Random(ggml.GGUFTensor):
    """A weight as if from a file, with random values."""

    def __init__(self, dtype: ggml.Type, shape: tuple[int, ...]) -> None:
        super().__init__(SimpleNamespace(), SimpleNamespace(dtype=dtype, shape=shape, name="random"))  # type: ignore[arg-type]

    def raw(self) -> np.ndarray:
        return _random(self.dtype, self.shape)


@cache
def _random(dtype: ggml.Type, shape: tuple[int, ...]) -> np.ndarray:
    tile = np.random.default_rng(0).standard_normal((64, shape[-1]), np.float32) / np.sqrt(shape[-1])
    return np.resize(
        dtypes.to_bytes(tile, dtype).reshape(-1).view(np.uint8), prod(shape[:-1]) * dtypes.row_size(dtype, shape[-1])
    )


def step(model: TensorRunner, ids: np.ndarray, at: int) -> np.ndarray:
    """Logits of the last of ``ids`` at positions from ``at`` on."""
    n = len(ids)
    positions = np.arange(at, at + n)
    mask = np.where(np.arange(model.n_kv(at + n)) <= positions[:, None], np.float16(0), np.float16(-np.inf))
    return model.run(Batch(ids, positions.astype(np.int32), positions, mask, np.array([n - 1], np.int32)))


def best(run: Callable[[], Any], rounds: int) -> float:
    """Microseconds of the quickest of some rounds, after two that do not count."""
    run(), run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e6 * min(found)


#: How devices are driven: whether each has a thread.
MODES = (("in turns", False), ("threads", True))


@contextmanager
def mode(owner: TensorRunner | TensorParallel, on: bool) -> Iterator[None]:
    """Devices driven in another way."""
    driver = (owner.group if isinstance(owner, TensorRunner) else owner).driver
    before, driver.threads = driver.threads, on
    try:
        yield
    finally:
        driver.threads = before


@contextmanager
def variant(model: TensorRunner, direct: int, half_above: int | None) -> Iterator[None]:
    """Partial sums that go another way."""
    before = rank.DIRECT
    rank.DIRECT, model.group.half_above = direct, half_above
    model.stage.clear()
    try:
        yield
    finally:
        rank.DIRECT, model.group.half_above = before, None
        model.stage.clear()


def breakdown(model: TensorRunner, program: ParallelProgram, rounds: int) -> dict[str, float]:
    """Microseconds of one run, by part."""
    driver, plans = model.group.executor, program.steps
    n, steps = len(plans), len(plans[0])
    compute, synchronize = c.ggml_backend_graph_compute_async, c.ggml_backend_synchronize
    found: dict[str, float] = {"steps": steps}

    def in_steps(r: int) -> None:
        for step in plans[r]:
            for graph in step.graphs:
                compute(driver.backends[r].ptr, graph)
            synchronize(driver.backends[r].ptr)

    for r in range(n):
        found[f"device {r} alone, waiting at each step"] = best(lambda r=r: in_steps(r), rounds)
    for name, on in MODES if n > 1 else MODES[:1]:
        with mode(model, on):
            found[f"all, {name}"] = best(lambda: driver.run(plans), rounds)
            found[f"all, {name}, per step"] = found[f"all, {name}"] / steps
            if on:
                for phase, us in phases(model, program, rounds).items():
                    found[f"all, {name}, per step: {phase}"] = us
    if program.arrivals is not None:
        found["all, watching"] = best(lambda: driver.run(plans, None, program.arrivals), rounds)
        found["all, watching, per step"] = found["all, watching"] / steps
    return found


def phases(model: TensorRunner, program: ParallelProgram, rounds: int) -> dict[str, float]:
    """Microseconds of a step, by what the thread of the first device does; means of all steps."""
    driver, plans = model.group.executor, program.steps
    compute, synchronize, wait = c.ggml_backend_graph_compute_async, c.ggml_backend_synchronize, driver._barrier.wait
    now = time.perf_counter
    spent = np.zeros((len(plans), 3))

    def follow(r: int, pointer: Any, own: Any, steps: int) -> int:
        for k, step in enumerate(own):
            t0 = now()
            for graph in step.graphs:
                compute(pointer, graph)
            t1 = now()
            synchronize(pointer)
            t2 = now()
            if k < steps - 1:
                wait(r, k)
            spent[r] += t1 - t0, t2 - t1, now() - t2
        return 0

    before, driver._follow = driver._follow, follow  # type: ignore[method-assign]
    try:
        for i in range(rounds + 2):
            if i == 2:
                spent[:] = 0
            driver.run(plans)
    finally:
        driver._follow = before  # type: ignore[method-assign]
    names = ("handing out", "waiting for the device", "waiting for the others")
    return dict(zip(names, (1e6 * spent[0] / rounds / len(plans[0])).tolist(), strict=True))


def nothing(devices: list[str], rounds: int) -> dict[str, float]:
    """Microseconds of a step that computes next to nothing: what a sum costs."""
    found = {}
    with TensorParallel(devices) as group:

        def run(rank: Rank, x: ggml.Tensor) -> ggml.Tensor:
            for _ in range(64):
                x = rank.all_reduce(ggml.scale(x, 0.5))
            return x

        f = group.compile(run)
        for size in (4096, 512 * 4096):
            x = np.ones((size // 4096, 4096), np.float32)
            program = f.trace(x)
            for name, on in MODES:
                with mode(group, on):
                    us = best(lambda p=program: group.executor.run(p.steps), rounds if size == 4096 else 3)
                    found[f"sum of {4 * size / 1024:,.0f} KiB, {name}"] = us / 65
            if program.arrivals is not None:
                us = best(lambda p=program: group.executor.run(p.steps, None, p.arrivals), rounds)
                found[f"sum of {4 * size / 1024:,.0f} KiB, watching"] = us / 65
    return found


def speeds(model: TensorRunner, prompt: np.ndarray, rounds: int, suffix: str = "") -> dict[str, float]:
    """Tokens a second, one by one and as a prompt."""
    token, n = prompt[:1], len(prompt)
    us = best(lambda: step(model, token, n), rounds)
    found = {f"decode us/token{suffix}": us, f"decode tokens/s{suffix}": 1e6 / us}
    us = best(lambda: step(model, prompt, 0), max(rounds // 8, 2))
    return found | {f"prompt tokens/s{suffix}": 1e6 * n / us}


def measure(shape: Shape, devices: list[str], args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one model on some devices, and its logits after a prompt and a token."""
    start = time.perf_counter()
    found: dict[str, Any] = {"devices": devices}
    with TensorRunner(shape, devices, 1024, weights=shape.weights()) as model:
        found["load_s"] = time.perf_counter() - start
        prompt = np.random.default_rng(1).integers(0, shape.n_vocab, args.prompt).astype(np.int32)
        start = time.perf_counter()
        step(model, prompt, 0)
        logits = step(model, prompt[:1], args.prompt)
        found["first_s"] = time.perf_counter() - start
        if len(devices) == 1:
            found |= speeds(model, prompt, args.rounds)
        else:
            for name, on in MODES:
                with mode(model, on):
                    found |= speeds(model, prompt, args.rounds, f", {name}")
            for name, direct, half in (
                ("all copied", 0, None),
                ("none copied", 1 << 30, None),
                ("halves", 1 << 16, 1 << 16),
            ):
                with variant(model, direct, half):
                    found |= speeds(model, prompt, args.rounds // 2, f", {name}")
            step(model, prompt[:1], args.prompt), step(model, prompt, 0)
        decoded, prompted = sorted(model.programs, key=lambda p: p.inputs[0][0].size)
        found["nodes"] = [sum(len(g) for g in plan.graphs) for plan in decoded.plans]
        step(model, prompt[:1], args.prompt)  # for its inputs: programs read them at the same place
        found["decode, us"] = breakdown(model, decoded, args.rounds)
        step(model, prompt, 0)
        found["prompt, us"] = breakdown(model, prompted, max(args.rounds // 8, 2))
    return found, logits


def show(result: dict[str, Any], indent: str = "    ") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "    ")
        else:
            print(f"{indent}{name:44}" + (f"{value:14,.2f}" if isinstance(value, float) else f" {value}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", help="GPUs (default: the first two)")
    parser.add_argument("--shapes", default="8B,70B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="q8_0")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="a tiny model, few rounds")
    args = parser.parse_args()
    if args.small:
        args.shapes, args.prompt, args.rounds = "small", 16, 3
    devices = args.devices or [d.name for d in ggml.devices() if not d.is_cpu][:2]
    if not devices:
        parser.error("there is no GPU; GGML_VK_VISIBLE_DEVICES=0,0 makes two of one, software devices included")
    result: dict[str, Any] = {"devices": [f"{d}: {ggml.device(d).description}" for d in devices]}
    if len(devices) > 1:
        result["nothing"] = nothing(devices, args.rounds)
        print("  steps that compute next to nothing (us)")
        show(result["nothing"])
    for name in args.shapes.split(","):
        shape = Shape(name, dtypes.as_type(args.dtype))
        print(f"{name}, {args.dtype}: {shape.n_layers} layers, {shape.layer_bytes / 1e9:.2f} GB a token")
        one, expected = measure(shape, devices[:1], args)
        print("  one GPU")
        show(one)
        result[name] = {"one": one}
        if len(devices) == 1:
            continue
        several, got = measure(shape, devices, args)
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        print(f"  {len(devices)} GPUs (logits differ by {error:.2e} of their norm)")
        show(several)
        ratios = {key: value / one[key.split(",")[0]] for key, value in several.items() if "tokens/s" in key}
        print("  of one GPU's speed")
        show(ratios)
        result[name] |= {"several": several, "ratios": ratios, "error": error}
    print(save("tensor_parallel", result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
