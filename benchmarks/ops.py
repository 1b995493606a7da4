"""Time to build 10,000 nodes: the raw C layer, the checked operations, and ggml-python's raw calls (ctypes).

python -m benchmarks.ops [--nodes 10000] [--rounds 15]

ggml-python is measured if it is installed (``pip install ggml-python``), with its own library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from benchmarks import save

Round = Callable[[int], float]
OPS = ("add", "mul_mat", "relu")


def checked(op: str) -> Round:
    """Return a round of the checked operation, on a context that grows."""
    import ggml_cffi

    function = getattr(ggml_cffi, op)

    def one(nodes: int) -> float:
        with ggml_cffi.Context() as ctx:
            a, b = ctx.new_tensor("f32", (64, 64)), ctx.new_tensor("f32", (64, 64))
            start = time.perf_counter()
            for _ in range(nodes):
                a = function(a, b) if op != "relu" else function(a)
            return time.perf_counter() - start

    return one


def raw(ggml: ModuleType, op: str, params: Callable[[int], Any]) -> Round:
    """Return a round of the raw C function, on a memory pool that is large enough."""
    function = getattr(ggml, f"ggml_{op}")

    def one(nodes: int) -> float:
        ctx = ggml.ggml_init(params((nodes + 2) * ggml.ggml_tensor_overhead()))
        a, b = ggml.ggml_new_tensor_2d(ctx, 0, 64, 64), ggml.ggml_new_tensor_2d(ctx, 0, 64, 64)
        start = time.perf_counter()
        for _ in range(nodes):
            a = function(ctx, a, b) if op != "relu" else function(ctx, a)
        seconds = time.perf_counter() - start
        ggml.ggml_free(ctx)
        return seconds

    return one


def contenders(op: str) -> dict[str, Round]:
    """Return the rounds to measure, by name."""
    from ggml_cffi import c

    found = {
        "raw": raw(c, op, lambda size: {"mem_size": size, "mem_buffer": c.NULL, "no_alloc": True}),
        "checked": checked(op),
    }
    with suppress(ImportError):
        import ggml

        def params(size: int) -> Any:
            return ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=True)

        found["ggml-python"] = raw(ggml, op, params)
    return found


def main() -> int:
    """Measure in turns, and print the best round of each, since other work on the machine only adds time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    for op in OPS:
        found = contenders(op)
        rounds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(args.rounds):
            for name, one in found.items():
                rounds[name].append(one(args.nodes) / args.nodes * 1e9)
        result[op] = {name: min(times) for name, times in rounds.items()}
    names = result[OPS[0]]
    result["a third of each"] = {name: sum(result[op][name] for op in OPS) / len(OPS) for name in names}
    for op, found_ns in result.items():
        shown = "  ".join(f"{name} {ns:6.0f} ns" for name, ns in found_ns.items())
        peer = found_ns.get("ggml-python")
        ratio = (
            f"  of ggml-python: raw {found_ns['raw'] / peer:.2f}, checked {found_ns['checked'] / peer:.2f}"
            if peer
            else ""
        )
        print(f"{op:16} {shown}{ratio or '  (ggml-python is not installed)'}")
    print(save("ops", {"nanoseconds": result}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
