"""Load of the server: many clients at once, beside llama.cpp on the same machine.

    python -m benchmarks.serve [--model FILE] [--clients 64] [--seconds 300] [--warm 0] [--parallel 16]
                               [--peer PYTHON] [--peer-url URL] [--devices CPU] [--split layer] [--isolate]
                               [--threads 2] [--deterministic] [--compare N]

Each client sends one request after the other: a prompt of 20 to 500 tokens, and an answer of 16 to 64 tokens, greedy.
The table has the time to first token and the tokens per second. These count what arrives while all clients are at work:
as the last answers end, ever more slots are empty, of two GPUs twice as many as of one. Above the table are the memory
of the server in the course of the run, the answers that were lost, and those that differ from the same prompt's answer
alone. For these it has the largest gap: how much more likely the first other token was alone, as a difference of log
probabilities. Rounding gives small gaps. A mixed-up answer would have a large one.

``--peer`` names a Python with llama-cpp-python: the same prompts then go through llama.cpp's C API in one process, with
as many sequences in a batch, without HTTP. ``--peer-url`` is the address of another server, such as llama.cpp's, which
the caller has started with the same model and the same number of slots.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

PROMPT_TOKENS, ANSWER_TOKENS = (20, 500), (16, 64)
N_PROMPTS = 512
N_SAMPLES = 10
TEXT = Path(__file__).parent.parent / "tests" / "data" / "prose.txt"


@dataclass
class Work:
    """A prompt, and the tokens of its answer."""

    ids: list[int]
    n: int


@dataclass
class Result:
    """The measurement of one side."""

    first: list[float] = field(default_factory=list)
    """Seconds to the first token of each answer."""
    tokens: int = 0
    """Generated tokens that arrived in the time."""
    prompt_tokens: int = 0
    """Tokens of the prompts whose first token arrived in the time."""
    answers: dict[int, set[tuple[str, ...]]] = field(default_factory=dict)
    """Different answers to each prompt, as texts of tokens."""
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self, name: str) -> list[str]:
        """Return the row of the table."""
        first = sorted(self.first)
        late = first[int(len(first) * 0.95)] if first else 0.0
        return [
            name,
            f"{len(first)}",
            f"{self.tokens / self.seconds:.1f}",
            f"{(self.tokens + self.prompt_tokens) / self.seconds:.1f}",
            f"{statistics.median(first) if first else 0:.2f}",
            f"{late:.2f}",
        ]


def workload(model: str) -> list[Work]:
    """Return the prompts, the same in each run."""
    from ggml_cffi.files import GGUFFile
    from ggml_cffi.models import Tokenizer

    with GGUFFile(model) as file:
        ids = Tokenizer(file).encode(TEXT.read_text(encoding="utf-8"))
    ids = (ids * (1 + 4096 // len(ids)))[: max(len(ids), 4096)]
    rng = np.random.default_rng(1)
    found = []
    for _ in range(N_PROMPTS):
        n, start = int(rng.integers(*PROMPT_TOKENS)), int(rng.integers(0, len(ids) - PROMPT_TOKENS[1]))
        found.append(Work(ids[start : start + n], int(rng.integers(*ANSWER_TOKENS))))
    return found


# ---------------------------------------------------------------------- clients


@dataclass
class Answer:
    """The answer to one request."""

    first: float = 0.0
    """Seconds to the first token."""
    n: int = 0
    tokens: list[str] = field(default_factory=list)
    top: list[dict[str, float]] = field(default_factory=list)
    """Log probabilities of the most likely tokens at each place."""


async def ask(url: str, work: Work, n_top: int = 0, count: Callable[[int, int], None] | None = None) -> Answer:
    """Send one request, and tell ``count`` of each event the prompt's tokens, if it is the first, and those generated.

    The client is a socket: a library's would take as much processor time as the server.
    """
    place = urlsplit(url)
    body = {
        "prompt": work.ids,
        "max_tokens": work.n,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": n_top,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        start, answer = time.perf_counter(), Answer()
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError((status + await reader.read()).decode())
        ended = False
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise ValueError(event["error"]["message"])
            n_prompt = 0 if answer.first else len(work.ids)
            answer.first = answer.first or time.perf_counter() - start
            before = answer.n
            for choice in event["choices"]:
                logprobs = choice.get("logprobs") or {}
                answer.tokens += logprobs.get("tokens", [])
                answer.top += logprobs.get("top_logprobs", [])
                answer.n += choice.get("finish_reason") is None
            if event.get("usage"):
                answer.n = event["usage"]["completion_tokens"]
            if count is not None:
                count(n_prompt, answer.n - before)
        if not ended:
            raise ValueError("the stream ended early")
        return answer
    finally:
        writer.close()


async def load(result: Result, url: str, works: list[Work], clients: int, seconds: float, *, warm: float = 0.0) -> None:
    """Send requests from many clients for ``warm`` seconds, measure for as many as asked, and wait for the answers."""
    waiting = iter(range(10**9))
    start, result.seconds = time.perf_counter() + warm, seconds

    def count(n_prompt: int, n: int) -> None:
        if 0 <= time.perf_counter() - start < seconds:
            result.tokens += n
            result.prompt_tokens += n_prompt

    async def client() -> None:
        while (begun := time.perf_counter() - start) < seconds:
            i = next(waiting) % len(works)
            try:
                answer = await ask(url, works[i], count=count)
            except (ValueError, OSError) as error:
                result.lost.append(str(error))
                continue
            result.answers.setdefault(i, set()).add(tuple(answer.tokens))
            if begun >= 0:
                result.first.append(answer.first)

    await asyncio.gather(*(client() for _ in range(clients)))


async def compare(url: str, works: list[Work], result: Result, n: int) -> str:
    """Ask for up to ``n`` of the prompts alone, and report the answers that differ."""
    compared = sorted(result.answers)[:n]
    gaps = []
    for i in compared:
        alone = await ask(url, works[i], n_top=5)
        gaps += [gap(alone, tokens) for tokens in result.answers[i] if tokens != tuple(alone.tokens)]
    report = f"answers that differ from those alone: {len(gaps)}, of {len(compared)} prompts"
    return report + (f"; gaps: median {statistics.median(gaps):.3f}, largest {max(gaps):.3f}" if gaps else "")


def gap(alone: Answer, tokens: tuple[str, ...]) -> float:
    """Return how much less likely the first other token was, infinity if it was not among the most likely ones."""
    for own, other, top in zip(alone.tokens, tokens, alone.top, strict=False):
        if own != other:
            return max(top.values()) - top.get(other, -float("inf"))
    return float("inf")


# ---------------------------------------------------------------------- the server


def memory_of(pid: int) -> tuple[int, int, int]:
    """Return resident MiB, threads and open files of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", text, re.M)}
    return found["VmRSS"] >> 10, found["Threads"], len(os.listdir(f"/proc/{pid}/fd"))


async def watch(pid: int, result: Result, seconds: float) -> None:
    """Print the memory of a process several times."""
    for _ in range(N_SAMPLES):
        await asyncio.sleep(seconds * 0.99 / N_SAMPLES)
        resident, threads, files = memory_of(pid)
        print(
            f"{len(result.first):6} answers: {resident} MiB resident, {threads} threads, {files} open files", flush=True
        )


def measure_server(args: argparse.Namespace, works: list[Work]) -> Result:
    """Start the server, and measure it."""
    n_ctx = PROMPT_TOKENS[1] + ANSWER_TOKENS[1] + 8
    command = [sys.executable, "-m", "ggml_cffi", "serve", f"model={args.model}", "--port", "0", "--preload"]
    replicas = len(args.devices.split(",")) if args.devices and args.split == "data" else 1
    slots = -(-args.parallel // replicas) * n_ctx  # each replica has a KV cache of its own
    command += ["--ctx", str(n_ctx), "--kv-slots", str(slots), "--parallel", str(args.parallel)]
    command += ["--split", args.split, "--max-waiting", str(2 * args.clients)]
    command += ["--devices", args.devices] if args.devices else []
    command += ["--threads", str(args.threads)] if args.threads else []
    command += [] if args.isolate is None else ["--isolate" if args.isolate else "--no-isolate"]
    command += ["--deterministic"] if args.deterministic else []
    result, lines = Result(), list[str]()
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        url = ""
        while not url:
            lines.append(process.stderr.readline())
            if not lines[-1]:
                raise RuntimeError(f"the server did not start:\n{''.join(lines)}")
            url = "".join(re.findall(r"http://[\d.]+:\d+", lines[-1]))
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()  # a full pipe would stop the server

        async def run() -> None:
            await asyncio.gather(*(ask(url, work) for work in works[-2:]))
            await asyncio.gather(
                load(result, url, works, args.clients, args.seconds, warm=args.warm),
                watch(process.pid, result, args.warm + args.seconds),
            )
            print(await compare(url, works, result, args.compare))

        try:
            asyncio.run(run())
        finally:
            process.send_signal(signal.SIGINT)
            reader.join()
    print(f"lost answers: {len(result.lost)} {sorted(set(result.lost))[:3]}; exit code {process.returncode}")
    print("".join(line for line in lines if not line.startswith("INFO"))[-4000:], end="")
    return result


# ---------------------------------------------------------------------- llama.cpp's C API in one process


@dataclass
class _Sequence:
    work: Work
    asked: float
    done: int = 0  # prompt tokens in the cache
    generated: int = 0
    token: int = -1


def c_api(model: str, works: list[Work], clients: int, seconds: float, parallel: int, threads: int) -> Result:
    """Measure llama.cpp: continuous batching over its C API, greedy, with the same prompts in the same order."""
    import llama_cpp as lib

    lib.llama_backend_init()
    m = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    n_ctx = PROMPT_TOKENS[1] + ANSWER_TOKENS[1] + 8
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = parallel * n_ctx, 512, 512, parallel
    params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
    ctx = lib.llama_init_from_model(m, params)
    cache, n_vocab = lib.llama_get_memory(ctx), lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(m))
    batch = lib.llama_batch_init(params.n_batch, 0, 1)
    result, numbers = Result(), iter(range(10**9))
    start = time.perf_counter()
    waiting = deque(_Sequence(works[next(numbers) % len(works)], start) for _ in range(clients))
    active: dict[int, _Sequence] = {}
    while active or waiting:
        for slot in range(parallel):
            if slot not in active and waiting:
                active[slot] = waiting.popleft()
        outputs: list[tuple[int, _Sequence]] = []
        batch.n_tokens = 0

        def add(token: int, position: int, slot: int, output: bool) -> None:
            i = batch.n_tokens
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, output
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
            batch.n_tokens += 1

        for slot, s in active.items():
            if s.generated:
                outputs.append((batch.n_tokens, s))
                add(s.token, len(s.work.ids) + s.generated - 1, slot, True)
        for slot, s in active.items():
            ids = s.work.ids
            n = min(len(ids) - s.done, params.n_batch - batch.n_tokens)
            if s.generated or n <= 0:
                continue
            for position in range(s.done, s.done + n):
                last = position == len(ids) - 1
                if last:
                    outputs.append((batch.n_tokens, s))
                add(ids[position], position, slot, last)
            s.done += n
        assert lib.llama_decode(ctx, batch) == 0
        now = time.perf_counter()
        if now - start < seconds:
            result.tokens += len(outputs)
            result.prompt_tokens += sum(len(s.work.ids) for _, s in outputs if not s.generated)
        for i, s in outputs:
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), (n_vocab,))
            s.token = int(logits.argmax())
            if not s.generated:
                result.first.append(now - s.asked)
            s.generated += 1
        for slot, s in list(active.items()):
            if s.generated == s.work.n:
                lib.llama_memory_seq_rm(cache, slot, -1, -1)
                del active[slot]
                if now - start < seconds:
                    waiting.append(_Sequence(works[next(numbers) % len(works)], now))
    result.seconds = seconds
    return result


def measure_peer(args: argparse.Namespace, works: list[Work]) -> Result:
    """Run :func:`c_api` in the other Python."""
    code = (
        "import json, sys; from benchmarks.serve import Work, c_api; a = json.load(sys.stdin); "
        "a['works'] = [Work(*w) for w in a['works']]; r = c_api(**a); "
        "print(json.dumps({'first': r.first, 'tokens': r.tokens, 'prompt_tokens': r.prompt_tokens, "
        "'seconds': r.seconds}))"
    )
    given: dict[str, Any] = {name: getattr(args, name) for name in ("model", "clients", "seconds", "parallel")}
    given |= {"threads": args.threads, "works": [(work.ids, work.n) for work in works]}
    done = subprocess.run([args.peer, "-c", code], input=json.dumps(given), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, and print the table."""
    from ggml_cffi import models
    from ggml_cffi.core.text import table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file (default: SmolLM2)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--warm", type=float, default=0.0, help="seconds under load before the measurement")
    parser.add_argument("--parallel", type=int, default=16, help="answers in generation at once")
    parser.add_argument("--devices")
    parser.add_argument("--split", default="layer")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction)
    parser.add_argument("--deterministic", action="store_true", help="one answer at a time on each device")
    parser.add_argument("--compare", type=int, default=N_PROMPTS, help="prompts to compare with their answers alone")
    parser.add_argument("--peer", help="a Python that has llama_cpp")
    parser.add_argument("--peer-url", help="address of another server")
    args = parser.parse_args()
    args.model = args.model or str(models.fetch("smollm2"))
    works = workload(args.model)
    rows = [["side", "answers", "generated/s", "with prompts/s", "first token s", "95 % s"]]
    rows.append(measure_server(args, works).row("ggml-cffi serve"))
    if args.peer:
        rows.append(measure_peer(args, works).row("llama.cpp, C API"))
    if args.peer_url:
        found = Result()
        asyncio.run(load(found, args.peer_url, works, args.clients, args.seconds))
        rows.append(found.row(args.peer_url))
        print(f"lost answers of {args.peer_url}: {len(found.lost)}")
    print(table(rows, right=range(1, len(rows[0]))))


if __name__ == "__main__":
    main()
