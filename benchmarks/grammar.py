"""Cost of grammars: as a share of decode beside the same model without one, and of one token of a large vocabulary.

The first part decodes with and without a grammar in turns, so that other work on the machine affects both alike. The
second part takes a vocabulary of 128,256 tokens, made of SmolLM2's tokens and pairs of them, and a wait of 3.3 ms in
place of the device: one token of an 8B model on a fast GPU. It measures the time that a grammar adds to a token, the
computation of the tokens that may follow included where the wait does not cover it, and that computation alone.

    python -m benchmarks.grammar [--model FILE] [--devices CPU] [--rounds 5] [--tokens 100] [--step-ms 3.3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import save
from ggml_cffi import models
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models import Grammar, Sampler, Tokenizer
from ggml_cffi.models.generation.grammar_state import GrammarState

N_VOCAB = 128_256
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "colors": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 4, "maxItems": 8},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 40}},
            "required": ["city"],
        },
    },
    "required": ["name", "age", "colors", "address"],
    "additionalProperties": False,
}
#: Grammars whose answers are as long as a measurement needs, from the easiest to the hardest.
GRAMMARS: dict[str, Callable[[], Grammar]] = {
    "JSON schema, many answers": lambda: Grammar.json_schema({"type": "array", "items": PERSON, "minItems": 90}),
    "JSON objects": lambda: Grammar.json_schema({"type": "array", "items": {"type": "object"}, "minItems": 90}),
    "any text": lambda: Grammar.regex("(?s).{4000,}"),
    "GBNF, arithmetic": lambda: Grammar.gbnf(
        'root ::= sum{900}\nsum ::= term (" + " term)* " = " [0-9]+ "\\n"\nterm ::= [0-9]+ | "(" term " * " term ")"'
    ),
}


class LargeVocabulary:
    """A tokenizer with more tokens: pairs of the tokens of another one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        words = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
        known, rng = set(words), np.random.default_rng(0)
        while len(words) < N_VOCAB:
            a, b = rng.integers(300, len(tokenizer), 2)
            pair = words[a] + words[b]
            if pair not in known and len(pair) < 16:
                known.add(pair)
                words.append(pair)
        self._words, self._tokenizer = words, tokenizer
        self.end_tokens, self.bos = tokenizer.end_tokens, tokenizer.bos

    def __len__(self) -> int:
        return len(self._words)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        small = token < len(self._tokenizer)
        return self._tokenizer.token_bytes(token, special=special) if small else self._words[token]

    def encode(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer.encode(text, **options)


def share_of_decode(path: str, devices: list[str], rounds: int, n: int) -> dict[str, Any]:
    """Return milliseconds of a token without and with each grammar, in turns, and the median ratio of each round."""
    seconds: dict[str, list[float]] = {"none": []} | {name: [] for name in GRAMMARS}
    with models.load(path, devices, n_ctx=max(512, 2 * n)) as model:
        prompt = model.tokenize([{"role": "user", "content": "Describe some people as JSON."}])
        grammars: dict[str, Grammar | None] = {"none": None} | {name: make() for name, make in GRAMMARS.items()}
        for i in range(rounds + 1):  # the first is warm-up
            for name, grammar in grammars.items():
                stream = model.generate_tokens(prompt, n, stop_at_end=False, grammar=grammar, temperature=0.8, seed=i)
                next(stream)  # the prompt
                start = time.perf_counter()
                count = sum(1 for _ in stream)
                if i and count:
                    seconds[name].append((time.perf_counter() - start) / count)
    found = {}
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["none"], strict=True)]
        found[name] = {"ms": 1e3 * statistics.median(taken), "ratio": statistics.median(ratios)}
        print(f"{name:28} {found[name]['ms']:8.2f} ms per token, {found[name]['ratio']:6.3f} times as long")
    return found


def cost_of_one_token(path: str, n: int, step: float) -> dict[str, Any]:
    """Return medians of the microseconds that a grammar adds to a token, and of the tokens that may follow alone."""
    with GGUFFile(path) as file:
        vocabulary: Any = LargeVocabulary(Tokenizer(file))
    rng = np.random.default_rng(0)
    logits = [(3 * rng.standard_normal(N_VOCAB)).astype(np.float32) for _ in range(16)]
    start = time.perf_counter()
    GrammarState(Grammar.regex("a"), vocabulary)
    found: dict[str, Any] = {"vocabulary_s": time.perf_counter() - start}
    print(f"\n{N_VOCAB} tokens, prepared once in {found['vocabulary_s']:.2f} s; per token, microseconds:")
    print(f"{'':28} {'added':>8} {'of step':>8} {'alone':>8} {'95 %':>8}")

    def loop(sampler: Sampler) -> list[float]:
        """Return the seconds of the sampler for each token, with a wait in place of the device."""
        taken = []
        for i in range(n):
            if sampler.complete:
                break
            begin = time.perf_counter()
            sampler.prepare()
            prepared = time.perf_counter()
            time.sleep(step)
            computed = time.perf_counter()
            sampler(logits[i % len(logits)])
            taken.append(prepared - begin + time.perf_counter() - computed)
        return taken

    for name, make in GRAMMARS.items():
        grammar = make()
        plain = loop(Sampler(temperature=0.8, seed=0))
        bound = loop(Sampler(tokenizer=vocabulary, grammar=grammar, temperature=0.8, seed=0))
        added = statistics.median(bound) - statistics.median(plain)
        alone, sampler = [], Sampler(tokenizer=vocabulary, grammar=grammar, temperature=0.8, seed=0)
        matcher = GrammarState(grammar, vocabulary)
        for i in range(len(bound)):
            start = time.perf_counter()
            matcher.limit(logits[i % len(logits)])
            alone.append(time.perf_counter() - start)
            matcher.advance(sampler(logits[i % len(logits)]))
        found[name] = {
            "n": len(bound),
            "added_us": 1e6 * added,
            "share": added / step,
            "alone_us": 1e6 * statistics.median(alone),
            "slow_us": 1e6 * statistics.quantiles(alone, n=20)[-1],
        }
        values = found[name]
        print(
            f"{name:28} {values['added_us']:8.0f} {values['share']:8.1%} {values['alone_us']:8.0f} "
            f"{values['slow_us']:8.0f}"
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file (default: the demonstration model)")
    parser.add_argument("--devices", default="CPU", help="devices, separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of one measurement")
    parser.add_argument("--step-ms", type=float, default=3.3, help="milliseconds of one token on the device")
    args = parser.parse_args()
    demonstration = str(models.fetch("smollm2"))
    result = {
        "decode": share_of_decode(args.model or demonstration, args.devices.split(","), args.rounds, args.tokens),
        "token": cost_of_one_token(demonstration, args.tokens, args.step_ms / 1e3),
    }
    print(f"\n{save('grammar', result)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
