"""The command ``ggml-cffi run``: one answer, or a conversation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._model_args import add_model_arguments, open_model
from ggml_cffi.cli._output import placement_table, print_error, speed_line, writes_unicode
from ggml_cffi.core.text import to_json
from ggml_cffi.errors import ClosedError, GgmlError

if TYPE_CHECKING:
    from ggml_cffi.models import Completion, Model, Stream

_HELP = "/new begins a new conversation, /exit or Ctrl-D ends; Ctrl-C stops an answer"
_ANSWER_SHARE = 1 / 4  # share of the context that a conversation must leave to the answer


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("run", help="answer a prompt, or chat")
    add_model_arguments(command)
    command.add_argument("-p", "--prompt", help="text to answer or continue (default: a conversation)")
    command.add_argument(
        "-n", "--max-tokens", type=int, help="largest number of tokens to generate (default: until the model ends)"
    )
    command.add_argument("--raw", action="store_true", help="continue the text, without the model's chat template")
    command.add_argument("--system", help="a system message for the chat template")
    command.add_argument("--ctx", type=int, help="largest number of tokens in a sequence (default: up to 4096)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default)")
    command.add_argument("--top-k", type=int, default=40, help="only the k most likely tokens (default: %(default)s)")
    command.add_argument(
        "--top-p", type=float, default=0.95, help="only the most likely tokens up to this total probability"
    )
    command.add_argument(
        "--min-p", type=float, default=0.0, help="only tokens with this share of the first token's probability"
    )
    command.add_argument(
        "--repeat-penalty", type=float, default=1.0, help="above 1 to avoid repetitions (default: %(default)s)"
    )
    command.add_argument("--stop", action="append", help="stop before this text; may be repeated")
    command.add_argument("--seed", type=int, help="seed for repeatable sampling")
    command.add_argument("--json", action="store_true", help="print the answer and its timings as JSON")
    command.add_argument("-v", "--verbose", action="store_true", help="print the placement and the speed")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.prompt is None and (args.raw or args.json):
        raise ValueError("--raw and --json need a prompt: give one with -p")
    with open_model(args, args.devices, args.ctx) as model:
        if args.verbose:
            print(placement_table(model), file=sys.stderr)
        if args.prompt is None:
            return _converse(model, args)
        prompt: Any = args.prompt
        if not args.raw and model.chat_template is not None:
            prompt = [*_system_messages(args), {"role": "user", "content": args.prompt}]
        stream = _generate(model, prompt, args)
        if args.json:
            print(to_json(_as_dict(stream.completion()), ascii_only=not writes_unicode()))
        else:
            _print_stream(stream)
        _print_speed(model, args)
    return 0


def _generate(model: Model, prompt: Any, args: argparse.Namespace) -> Stream[str]:
    from ggml_cffi.models import SamplingParams  # slow to import

    sampling = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        seed=args.seed,
    )
    return model.generate(prompt, args.max_tokens, sampling=sampling, stop=args.stop)


def _system_messages(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _print_stream(chunks: Iterator[str]) -> None:
    """Print text as it is generated."""
    try:
        for chunk in chunks:
            print(chunk, end="", flush=True)
    finally:
        print()


def _as_dict(completion: Completion) -> dict[str, Any]:
    t = completion.timings
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": t.prompt_tokens,
        "reused_tokens": t.reused_tokens,
        "decoded_tokens": t.decoded_tokens,
        "prompt_tokens_per_second": round(t.prompt_rate, 2),
        "decoded_tokens_per_second": round(t.decode_rate, 2),
    }


def _print_speed(model: Model, args: argparse.Namespace) -> None:
    if args.verbose:
        print(speed_line(model), file=sys.stderr)


# ---------------------------------------------------------------------- conversations


def _converse(model: Model, args: argparse.Namespace) -> int:
    """Read questions from standard input and print answers, until the input ends."""
    model.apply_chat_template([{"role": "user", "content": ""}])  # raises if the model has no template
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - editing and history for input()
        print(_HELP, file=sys.stderr)
    messages = _system_messages(args)
    while (question := _read_question(terminal)) is not None:
        if question in ("/exit", "/quit"):
            break
        if question == "/new":
            messages = _system_messages(args)
            continue
        if not question.strip():
            continue
        try:
            asked = shorten_conversation(model, [*messages, {"role": "user", "content": question}])
            answer = _answer(model, asked, args)
        except ClosedError:
            raise
        except (GgmlError, ValueError) as error:  # this question failed; the next one may not
            print_error(error)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
        _print_speed(model, args)
    return 0


def _read_question(terminal: bool) -> str | None:
    """Return the next question, None at the end of the input. Ctrl-C discards the line."""
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
    """Print and return the answer. Ctrl-C stops it; the conversation keeps the text so far."""
    text = ""
    try:
        for chunk in _generate(model, messages, args):
            print(chunk, end="", flush=True)
            text += chunk
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    return text


def shorten_conversation(model: Model, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the conversation without its oldest questions and answers, so that the answer has enough context left."""
    kept = list(messages)
    first = 1 if kept and kept[0]["role"] == "system" else 0
    limit = model.n_ctx * (1 - _ANSWER_SHARE)
    while len(kept) > first + 1 and len(model.tokenize(kept)) > limit:
        del kept[first : first + 2]
    if len(kept) < len(messages):
        print("[the conversation is longer than the context: its oldest messages are dropped]", file=sys.stderr)
    return kept
