"""Writes ``data/smollm2_float64.json``: greedy continuations by the float64 reference."""

import json
from pathlib import Path

import numpy as np
from llama_float64 import Reference

from ggml_cffi.models import fetch

DATA = Path(__file__).parent / "data"


def main() -> None:
    model = Reference(fetch("smollm2"))
    cases = []
    for case in json.loads((DATA / "smollm2.json").read_text())["cases"]:
        tokens, greedy, margins = case["tokens"], [], []
        for _ in range(24):
            logits = model.forward([*tokens, *greedy])[-1]
            best = np.argsort(logits)[::-1][:2]
            greedy.append(int(best[0]))
            margins.append(round(float(logits[best[0]] - logits[best[1]]), 4))
        cases.append({"prompt": case["prompt"], "tokens": tokens, "greedy": greedy, "margins": margins})
    (DATA / "smollm2_float64.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
