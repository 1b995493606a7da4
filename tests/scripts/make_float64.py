"""Write ``data/*_float64.json``: greedy continuations by the float64 reference, for the models named as arguments."""

import json
import sys
from pathlib import Path

from ggml_cffi.models import fetch
from tests.support.llama_float64 import Reference

DATA = Path(__file__).resolve().parents[1] / "data"
LENGTH = 24


def main() -> None:
    for name in sys.argv[1:] or ("smollm2", "gemma3"):
        model = Reference(fetch(name))
        cases = []
        for case in json.loads((DATA / f"{name}.json").read_text())["cases"]:
            greedy, margins = model.greedy(case["tokens"], LENGTH)
            cases.append({"prompt": case["prompt"], "tokens": case["tokens"], "greedy": greedy, "margins": margins})
        (DATA / f"{name}_float64.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
