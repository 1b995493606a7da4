"""The command ``ggml-cffi run``: one answer, or a conversation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._model_args import add_model, open_model
from ggml_cffi.cli._output import placement, speed

if TYPE_CHECKING:
    from ggml_cffi.models import Model

_HELP = "/new begins a new conversation, /exit or Ctrl-D ends; Ctrl-C stops an answer"
_ROOM = 4  # a conversation that leaves less than this share of the context to the answer loses its beginning


def register(commands: Any) -> None:
    """Add the command to those of the parser."""
    command = commands.add_parser("run", help="answer a prompt with a model, or talk to it")
    add_model(command)
    command.add_argument("-p", "--prompt", help="what to answer or continue (default: a conversation)")
    command.add_argument("-n", "--max-tokens", type=int, help="most tokens to add (default: until the model ends)")
    command.add_argument("--raw", action="store_true", help="continue the text, without the model's chat template")
    command.add_argument("--system", help="a system message for the chat template")
    command.add_argument("--ctx", type=int, help="most tokens of prompt and answer (default: up to 4096)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    command.add_argument("--top-k", type=int, default=40, help="only the k most likely tokens (default: %(default)s)")
    command.add_argument("--top-p", type=float, default=0.95, help="only the most likely tokens of this probability")
    command.add_argument("--min-p", type=float, default=0.0, help="only tokens at least this likely beside the first")
    command.add_argument("--repeat-penalty", type=float, default=1.0, help="above 1: against repetitions")
    command.add_argument("--stop", action="append", help="end before this text; may be repeated")
    command.add_argument("--seed", type=int, help="for repeatable choices")
    command.add_argument("--json", action="store_true", help="print the answer as one JSON object, with its figures")
    command.add_argument("-v", "--verbose", action="store_true", help="say what is where, and how fast it was")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.prompt is None and (args.raw or args.json):
        raise ValueError("--raw and --json need a prompt: give one with -p")
    with open_model(args, args.devices, args.ctx) as model:
        if args.verbose:
            print(placement(model), file=sys.stderr)
        if args.prompt is None:
            return _converse(model, args)
        prompt: Any = args.prompt
        if not args.raw and model.chat_template is not None:
            prompt = [*_system(args), {"role": "user", "content": args.prompt}]
        pieces = _pieces(model, prompt, args)
        if args.json:
            print(json.dumps({"text": "".join(pieces), **_figures(model)}, ensure_ascii=False))
        else:
            _print(pieces)
        _say_speed(model, args)
    return 0


def _pieces(model: Model, prompt: Any, args: argparse.Namespace) -> Iterator[str]:
    return model.generate(
        prompt,
        args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        seed=args.seed,
        stop=args.stop,
    )


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _print(pieces: Iterator[str]) -> str:
    """Print text as it comes; all of it."""
    text = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    finally:
        print()
    return text


def _figures(model: Model) -> dict[str, Any]:
    t = model.timings
    return {
        "prompt_tokens": t.prompt_tokens,
        "reused_tokens": t.reused_tokens,
        "decoded_tokens": t.decoded_tokens,
        "prompt_tokens_per_second": round(t.prompt_rate, 2),
        "decoded_tokens_per_second": round(t.decode_rate, 2),
    }


def _say_speed(model: Model, args: argparse.Namespace) -> None:
    if args.verbose:
        print(speed(model), file=sys.stderr)


# ---------------------------------------------------------------------- conversations


def _converse(model: Model, args: argparse.Namespace) -> int:
    """Questions from standard input, answers to standard output, until the input ends."""
    model.apply_chat_template([{"role": "user", "content": ""}])  # raises where the model has none
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - editing and history for input()
        print(_HELP, file=sys.stderr)
    messages = _system(args)
    while (question := _ask(terminal)) is not None:
        if question in ("/exit", "/quit"):
            break
        if question == "/new":
            messages = _system(args)
            continue
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        messages = _shortened(model, messages)
        answer = _answer(model, messages, args)
        messages.append({"role": "assistant", "content": answer})
        _say_speed(model, args)
    return 0


def _ask(terminal: bool) -> str | None:
    """The next question, None at the end. Ctrl-C drops the line."""
    while True:
        try:
            return input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:
            print()
            if not terminal:
                raise


def _answer(model: Model, messages: list[dict[str, str]], args: argparse.Namespace) -> str:
    """Print the answer; Ctrl-C stops it, and what there is of it stays in the conversation."""
    text = ""
    try:
        for piece in _pieces(model, messages, args):
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    return text


def _shortened(model: Model, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation without its oldest questions and answers, as far as the answer needs the room."""
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    while len(kept) > first + 1 and len(model.tokenize(model.apply_chat_template(kept))) > model.n_ctx * (
        1 - 1 / _ROOM
    ):
        del kept[first : first + 2]
    if len(kept) < len(messages):
        print("[the conversation has outgrown the context: its beginning is forgotten]", file=sys.stderr)
    return kept
