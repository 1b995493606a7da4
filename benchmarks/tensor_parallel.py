"""Layers sharded over two GPUs, beside one GPU with all of them: decode, prefill, and the time of each part.

    python -m benchmarks.tensor_parallel [--small] [--shapes 8B,70B] [--dtype q8_0] [DEVICE DEVICE ...]

The weights are random, made on the fly: ``8B`` is a whole model of that shape (7.7 GB in Q8_0), ``70B`` eight of 80
layers. ``--small`` is for software devices, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save
from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.files.gguf import TensorInfo
from ggml_cffi.models.architectures.decoder import Rope
from ggml_cffi.models.architectures.llama import Llama
from ggml_cffi.models.runners import Batch, PipelineRunner, StageSpec
from ggml_cffi.parallel import ParallelProgram, Rank, TensorParallel, rank
from ggml_cffi.parallel.executors import Threads

# layers, embedding, feed-forward, heads, KV heads, vocabulary
SHAPES = {
    "8B": (32, 4096, 14336, 32, 8, 32000),
    "70B": (8, 8192, 28672, 64, 8, 1024),
    "small": (2, 256, 512, 4, 2, 256),
}
HEAD_SIZES = {"8B": 128, "70B": 128, "small": 64}


class Shape(Llama):
    """A llama model of given sizes, with random weights in place of a file."""

    def __init__(self, name: str, dtype: ggml.Type) -> None:
        self.n_layers, self.n_embd, self.n_ff, self.n_heads, self.n_kv_heads, self.n_vocab = SHAPES[name]
        self.head_size = self.v_size = HEAD_SIZES[name]
        self.kv_sizes = (self.n_kv_heads * self.head_size, self.n_kv_heads * self.v_size)
        self.eps, self.scale, self.n_ctx_train = 1e-5, self.head_size**-0.5, 8192
        self.rope = Rope(self.rope_mode, self.head_size, 500000.0)
        self.dtype = dtype
        self.file: Any = SimpleNamespace(tensors={"output.weight": None}, path=name, raw=self.raw)
        self.shapes = dict(self.expected_tensors())

    def tensor_info(self, name: str) -> TensorInfo:
        shape = self.shapes[name] if hasattr(self, "shapes") else (1, 1)
        dtype = self.dtype if len(shape) == 2 else ggml.F32
        return TensorInfo(name, dtype, shape, offset=1, nbytes=prod(shape[:-1]) * dtypes.row_size(dtype, shape[-1]))

    def raw(self, name: str) -> np.ndarray:
        """Bytes of a weight: random, ones for norms."""
        shape = self.shapes[name]
        return _random(self.dtype, shape) if len(shape) == 2 else np.ones(shape, np.float32).view(np.uint8)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights that a token is multiplied with."""
        rows = (s for name, s in self.shapes.items() if len(s) == 2 and name != "token_embd.weight")
        return sum(s[0] * dtypes.row_size(self.dtype, s[1]) for s in rows)


@cache
def _random(dtype: ggml.Type, shape: tuple[int, ...]) -> np.ndarray:
    tile = np.random.default_rng(0).standard_normal((64, shape[-1]), np.float32) / np.sqrt(shape[-1])
    return np.resize(
        dtypes.to_bytes(tile, dtype).reshape(-1).view(np.uint8), prod(shape[:-1]) * dtypes.row_size(dtype, shape[-1])
    )


def step(model: PipelineRunner, ids: np.ndarray, at: int) -> np.ndarray:
    """Return the logits of the last of ``ids``, which are at positions from ``at`` on."""
    n = len(ids)
    positions = np.arange(at, at + n)
    mask = np.where(np.arange(model.n_kv(at + n)) <= positions[:, None], np.float16(0), np.float16(-np.inf))
    return model.run(Batch(ids, positions.astype(np.int32), positions, mask, np.array([n - 1], np.int32)))


def best(run: Callable[[], Any], rounds: int) -> float:
    """Return the microseconds of the quickest of some rounds, after two that do not count."""
    run(), run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return 1e6 * min(found)


#: Executors, by the parameter ``threads``.
MODES: tuple[tuple[str, bool | None], ...] = (("default", None), ("in turns", False), ("threads", True))


@contextmanager
def variant(model: PipelineRunner, direct: int, half_above: int | None) -> Iterator[None]:
    """Exchange partial sums in another way."""
    (stage,) = model.stages
    before = rank.DIRECT
    rank.DIRECT, stage.group.half_above = direct, half_above
    stage.clear()
    try:
        yield
    finally:
        rank.DIRECT, stage.group.half_above = before, None
        stage.clear()


@contextmanager
def opened(shape: Shape, devices: list[str], threads: bool | None) -> Iterator[PipelineRunner]:
    """Open a model whose devices share every layer."""
    with ExitStack() as stack:
        backends = [stack.enter_context(ggml.Backend(device)) for device in devices]
        stages = [StageSpec(range(shape.n_layers), tuple(range(len(devices))))]
        yield stack.enter_context(PipelineRunner(shape, backends, 1024, stages=stages, threads=threads))


def breakdown(model: PipelineRunner, program: ParallelProgram, rounds: int) -> dict[str, float]:
    """Return the microseconds of one run, by part."""
    executor, steps = model.stages[0].group.executor, program.steps
    n, n_steps = len(steps), len(steps[0])
    compute, synchronize = c.ggml_backend_graph_compute_async, c.ggml_backend_synchronize
    found: dict[str, float] = {"steps": n_steps}

    def in_steps(r: int) -> None:
        for step in steps[r]:
            for graph in step.graphs:
                compute(executor.backends[r].ptr, graph)
            synchronize(executor.backends[r].ptr)

    for r in range(n):
        found[f"device {r} alone, waiting at each step"] = best(lambda r=r: in_steps(r), rounds)
    found["all"] = best(lambda: executor.run(steps, None, program.polled_sums), rounds)
    found["all, per step"] = found["all"] / n_steps
    if isinstance(executor, Threads):
        for phase, us in phases(executor, program, rounds).items():
            found[f"all, per step: {phase}"] = us
    return found


def phases(executor: Threads, program: ParallelProgram, rounds: int) -> dict[str, float]:
    """Return the microseconds of a step, by what the thread of the first device does; means of all steps."""
    steps = program.steps
    compute, synchronize, wait = c.ggml_backend_graph_compute_async, c.ggml_backend_synchronize, executor._barrier.wait
    now = time.perf_counter
    spent = np.zeros((len(steps), 3))

    def run_device(r: int, pointer: Any, own: Any, n: int) -> int:
        for k, step in enumerate(own):
            t0 = now()
            for graph in step.graphs:
                compute(pointer, graph)
            t1 = now()
            synchronize(pointer)
            t2 = now()
            if k < n - 1:
                wait(r, k)
            spent[r] += t1 - t0, t2 - t1, now() - t2
        return 0

    before, executor._run_device = executor._run_device, run_device  # type: ignore[method-assign]
    try:
        for i in range(rounds + 2):
            if i == 2:
                spent[:] = 0
            executor.run(steps)
    finally:
        executor._run_device = before  # type: ignore[method-assign]
    names = ("submitting", "waiting for the device", "waiting for the others")
    return dict(zip(names, (1e6 * spent[0] / rounds / len(steps[0])).tolist(), strict=True))


def all_reduces(devices: list[str], rounds: int) -> dict[str, float]:
    """Return the microseconds of a step that computes next to nothing: the cost of an all-reduce."""
    found = {}
    for name, threads in MODES:
        with TensorParallel(devices, threads=threads) as group:

            def run(rank: Rank, x: ggml.Tensor) -> ggml.Tensor:
                for _ in range(64):
                    x = rank.all_reduce(ggml.scale(x, 0.5))
                return x

            f = group.compile(run)
            for size in (4096, 512 * 4096):
                x = np.ones((size // 4096, 4096), np.float32)
                f(x)  # the first run waits after each graph
                program = f.trace(x)
                us = best(
                    lambda p=program, e=group.executor: e.run(p.steps, None, p.polled_sums),  # type: ignore[misc]
                    rounds if size == 4096 else 3,
                )
                found[f"sum of {4 * size / 1024:,.0f} KiB, {name}"] = us / 65
    return found


def speeds(model: PipelineRunner, prompt: np.ndarray, rounds: int, suffix: str = "") -> dict[str, float]:
    """Return tokens/s, one by one and as a prompt."""
    token, n = prompt[:1], len(prompt)
    us = best(lambda: step(model, token, n), rounds)
    found = {f"decode us/token{suffix}": us, f"decode tokens/s{suffix}": 1e6 / us}
    us = best(lambda: step(model, prompt, 0), max(rounds // 8, 2))
    return found | {f"prompt tokens/s{suffix}": 1e6 * n / us}


def measure(shape: Shape, devices: list[str], args: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Return the figures of one model on some devices, and its logits after a prompt and a token."""
    found: dict[str, Any] = {"devices": devices}
    prompt = np.random.default_rng(1).integers(0, shape.n_vocab, args.prompt).astype(np.int32)
    for name, threads in MODES if len(devices) > 1 else MODES[:1]:
        suffix = f", {name}" if len(devices) > 1 else ""
        start = time.perf_counter()
        with opened(shape, devices, threads) as model:
            found[f"load_s{suffix}"] = time.perf_counter() - start
            start = time.perf_counter()
            step(model, prompt, 0)
            logits = step(model, prompt[:1], args.prompt).copy()
            found[f"first_s{suffix}"] = time.perf_counter() - start
            found |= speeds(model, prompt, args.rounds, suffix)
            if len(devices) > 1 and threads is None:
                found |= variants(model, prompt, args)
            step(model, prompt[:1], args.prompt), step(model, prompt, 0)
            decoded, prompted = sorted(model.stages[0].programs, key=lambda p: p.inputs[0][0].size)
            found[f"nodes{suffix}"] = [sum(len(g) for g in graphs.graphs) for graphs in decoded.step_graphs]
            step(model, prompt[:1], args.prompt)  # for its inputs: programs read them at the same place
            found[f"decode, us{suffix}"] = breakdown(model, decoded, args.rounds)
            step(model, prompt, 0)
            found[f"prompt, us{suffix}"] = breakdown(model, prompted, max(args.rounds // 8, 2))
    return found, logits


def variants(model: PipelineRunner, prompt: np.ndarray, args: argparse.Namespace) -> dict[str, float]:
    """Return the speeds with other ways to exchange partial sums."""
    found: dict[str, float] = {}
    for name, direct, half in (("all copied", 0, None), ("none copied", 1 << 30, None), ("halves", 1 << 16, 1 << 16)):
        with variant(model, direct, half):
            found |= speeds(model, prompt, args.rounds // 2, f", {name}")
    return found


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
        result["all-reduces"] = all_reduces(devices, args.rounds)
        print("  all-reduces (us)")
        show(result["all-reduces"])
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
