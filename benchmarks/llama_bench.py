"""One measurement of llama.cpp through the C API that llama-cpp-python wraps, in the way of llama-bench.

    python benchmarks/llama_bench.py MODEL.gguf [--prompts 512,4096] [--decode 128] [--split layer]
    python benchmarks/llama_bench.py MODEL.gguf --gpu-layers 0 --threads 2 [--flash off]

GGML_VK_VISIBLE_DEVICES selects the GPUs. Prints JSON: the best of three runs, or of the runs within a second;
with ``--median`` their median, for a machine where other programs run. Short prompts run one after another until they
have as many tokens as the longest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial


def typical(run: Callable[[], None], choose: Callable[[list[float]], float], rounds: int = 3) -> float:
    run()
    seconds: list[float] = []
    while len(seconds) < rounds or sum(seconds) < 1.0:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return choose(seconds)


def main() -> int:
    import llama_cpp as lib

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", default="512", help="tokens of each prompt")
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--split", choices=("none", "layer", "row", "tensor"), default="layer")
    parser.add_argument("--gpu-layers", type=int, default=999)
    parser.add_argument("--threads", type=int, default=0, help="threads of the CPU (default: llama.cpp's)")
    parser.add_argument("--flash", choices=("on", "off"), default="on", help="attention in one operation")
    parser.add_argument("--median", action="store_true", help="the median of the runs in place of the best")
    args = parser.parse_args()
    choose = statistics.median if args.median else min
    prompts = [int(n) for n in args.prompts.split(",")]
    longest = max([*prompts, args.decode, 512])
    lib.llama_backend_init()
    start = time.perf_counter()
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = args.gpu_layers
    model_params.split_mode = ("none", "layer", "row", "tensor").index(args.split)
    model = lib.llama_model_load_from_file(args.model.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = longest + 256
    params.n_batch = longest
    params.n_ubatch = 512
    params.flash_attn_type = int(args.flash == "on")
    if args.threads:
        params.n_threads = params.n_threads_batch = args.threads
    ctx = lib.llama_init_from_model(model, params)
    load = time.perf_counter() - start
    memory = lib.llama_get_memory(ctx)
    prompt, one = (lib.llama_token * longest)(*[100] * longest), (lib.llama_token * 1)(100)

    def compute(tokens: object, n: int) -> None:
        if lib.llama_decode(ctx, lib.llama_batch_get_one(tokens, n)):
            raise RuntimeError("llama_decode failed")
        lib.llama_synchronize(ctx)

    def read(n: int) -> None:
        for _ in range(max(prompts) // n):
            lib.llama_memory_clear(memory, True)
            compute(prompt, n)

    def decode() -> None:
        lib.llama_memory_clear(memory, True)
        for _ in range(args.decode):
            compute(one, 1)

    found = {"load_s": load}
    for n in prompts:
        found[f"prompt {n}"] = max(prompts) // n * n / typical(partial(read, n), choose)
    found["decode"] = args.decode / typical(decode, choose)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
