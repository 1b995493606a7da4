"""Write ``data/*_float64.json``: greedy continuations and logits by the float64 reference, for the models named as
arguments.
"""

import json
import sys
from pathlib import Path

from ggml_cffi.models import fetch
from tests.support.llama_float64 import Reference

DATA = Path(__file__).resolve().parents[1] / "data"
LENGTH = 24
#: Tokens of the first case whose logits are written, and elements of the vocabulary, evenly spaced.
N_TOKENS, N_LOGITS = 8, 32


def logits_of(model: Reference, tokens: list[int]) -> dict[str, list]:
    """Return some logits of every token."""
    logits = model.forward(tokens)
    of = [*range(0, logits.shape[1], logits.shape[1] // N_LOGITS)]
    return {"tokens": tokens, "of": of, "values": logits[:, of].round(4).tolist()}


def main() -> None:
    for name in sys.argv[1:] or ("smollm2", "gemma3"):
        model = Reference(fetch(name))
        cases = []
        for case in json.loads((DATA / f"{name}.json").read_text())["cases"]:
            greedy, margins = model.greedy(case["tokens"], LENGTH)
            cases.append({"prompt": case["prompt"], "tokens": case["tokens"], "greedy": greedy, "margins": margins})
        cases[0]["logits"] = logits_of(model, (cases[0]["tokens"] + cases[0]["greedy"])[:N_TOKENS])
        (DATA / f"{name}_float64.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
