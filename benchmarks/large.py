"""A model that is larger than the memory of one GPU, on two.

    python -m benchmarks.large [--gib 84] [--split pipeline] [--folder /tmp] [DEVICE DEVICE]

The layers have the shape of 70B, in Q8_0, and their number gives the size. Their weights are zeros, which the file does
not store (it is sparse). So a layer adds nothing, and the expected logits follow from the embeddings alone. The GPUs
still hold and compute each layer. One GPU alone must refuse the model. ``--gib 0.01 --shape tiny`` is for software
devices.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import ggml_cffi as ggml
from benchmarks import save, shapes
from ggml_cffi import models
from ggml_cffi.files.gguf.layout import PlannedTensor, header_bytes
from ggml_cffi.files.sources import RawTensor

_ALIGN = 32


def write(path: Path, what: shapes.Shape) -> None:
    """Write a file that stores only embeddings, head and norms."""
    rng = np.random.default_rng(0)
    plans = []
    for name, shape in shapes.tensors(what).items():
        if len(shape) == 1:
            plans.append(PlannedTensor(name, ggml.F32, shape, np.ones(shape, np.float32)))
        elif name.startswith("blk."):
            plans.append(PlannedTensor(name, ggml.Q8_0, shape, np.empty(0)))
        else:
            values = ggml.quantize(rng.standard_normal(shape, dtype=np.float32) / 64, ggml.Q8_0)
            raw = RawTensor(np.frombuffer(values, np.uint8), ggml.Q8_0, shape)
            plans.append(PlannedTensor(name, ggml.Q8_0, shape, raw))
    head = header_bytes(shapes.metadata(what), plans, _ALIGN)
    with path.open("wb") as file:
        file.write(head)
        at = len(head)
        for plan in plans:
            if not isinstance(plan.source, np.ndarray) or plan.source.size:
                file.seek(at)
                for piece in plan.pieces(None, 0):
                    file.write(piece.data)
            at += plan.nbytes + -plan.nbytes % _ALIGN
        file.truncate(at)


def expected(path: Path, ids: list[int]) -> np.ndarray:
    """Compute the logits after layers that add nothing."""
    with ggml.GGUFFile(path) as file:
        table, head = file["token_embd.weight"], file["output.weight"]
        x = np.asarray(table.numpy(), np.float64)[ids]
        x /= np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x @ np.asarray(head.numpy(), np.float64).T


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", nargs="*", help="two GPUs (default: the first two)")
    parser.add_argument("--gib", type=float, default=84.0)
    parser.add_argument("--shape", default="70B", choices=shapes.SHAPES)
    parser.add_argument("--split", default="pipeline")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    args = parser.parse_args()
    devices = args.devices or [d.name for d in ggml.devices() if not d.is_cpu][:2]
    if len(devices) != 2:
        parser.error("two GPUs are needed; GGML_VK_VISIBLE_DEVICES=0,0 makes two of one, software devices included")
    shape = shapes.SHAPES[args.shape]
    layer = sum(prod(s) for name, s in shapes.tensors(replace(shape, n_layers=1)).items() if name.startswith("blk."))
    shape = replace(shape, n_layers=max(round(args.gib * 2**30 / (layer * 34 / 32)), 2))
    path = args.folder / f"large-{args.shape}-{args.gib:g}.gguf"
    write(path, shape)
    result: dict[str, Any] = {"devices": [ggml.device(d).description for d in devices], "layers": shape.n_layers}
    result["bytes"] = path.stat().st_size
    print(f"{shape.n_layers} layers, {result['bytes'] / 2**30:.1f} GiB")
    one = models.plan(path, devices[:1], n_ctx=2048, balance=[1])
    print(f"on one GPU: {'fits' if one.fits else 'does not fit'}")
    result["fits one"] = one.fits
    plan = models.plan(path, devices, args.split, n_ctx=2048)
    print(plan)
    start = time.perf_counter()
    with models.load(path, devices, args.split, n_ctx=2048) as model:
        result["load_s"] = time.perf_counter() - start
        ids = np.random.default_rng(1).integers(0, shape.n_vocab, 600).tolist()
        got, want = model.forward(ids), expected(path, ids)
        result["error"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        made = list(model.generate_tokens(ids, 33, stop_at_end=False))
        result["decode"] = model.timings.decode_rate
        result["greedy"] = made[0] == int(want[-1].argmax())
        start = time.perf_counter()
        model.forward(ids[:1] * 2000, last=True)
        result["prompt 2000"] = 2000 / (time.perf_counter() - start)
        result["computed on"] = sorted({backend.name for _, backend in model.assignment()})
    for key, value in result.items():
        print(f"{key:12} {value}")
    print(save("large", result))
    return 0 if result["error"] < 1e-2 and not one.fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
