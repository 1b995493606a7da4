"""A model that answers a prompt, with its layers split over every GPU and the CPU as a fallback.

    python examples/demo.py [MAX_TOKENS]

On a machine without a GPU, the demo uses two logical devices of the software Vulkan driver.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import ggml_cffi
from ggml_cffi import cli, models

PROMPT = "What is the capital of France, and what is it known for?"


def gpus() -> int:
    """Count the GPUs in another process, since the driver reads its environment only once."""
    command = [sys.executable, "-m", "ggml_cffi", "devices", "--json"]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return sum(device["type"] != "CPU" for device in listed)


def main(max_tokens: int = 48) -> None:
    """Load the model, answer, and print the placement and the speed."""
    if "GGML_VK_VISIBLE_DEVICES" not in os.environ and gpus() == 0:
        os.environ["GGML_VK_VISIBLE_DEVICES"] = "0,0"
        software = any(not d.is_cpu for d in ggml_cffi.devices())
        print(
            "No GPU here: using two logical devices of the software Vulkan driver (slow: it compiles for a minute)."
            if software
            else "No GPU and no software Vulkan device here: the CPU computes everything."
        )
    print("\nDevices")
    cli.main(["devices"])

    path = models.fetch("smollm2")
    with models.load(path, n_ctx=512) as model:
        print(f"\n{path.name}: placement")
        print(model.plan.table())
        print(f"\n> {PROMPT}\n")
        for text in model.generate([{"role": "user", "content": PROMPT}], max_tokens=max_tokens):
            print(text, end="", flush=True)
        computed = Counter(backend.name for _, backend in model.assignment())
        t = model.timings
        print(f"\n\nprompt: {t.prompt_tokens} tokens, {t.prompt_rate:.1f} tokens/s; ", end="")
        print(f"decode: {t.decoded_tokens} tokens, {t.decode_rate:.1f} tokens/s")
        print("The last token was computed on " + ", ".join(f"{name} ({n} nodes)" for name, n in computed.items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
