"""The command ``ggml-cffi``: its parser, and its exit codes.

An error in the input is reported as one line on standard error, with exit code 2. Ctrl-C ends with exit code 130.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import ggml_cffi
from ggml_cffi.c import library
from ggml_cffi.cli import (
    bench,
    convert,
    devices,
    doctor,
    embed,
    fetch,
    gguf,
    perplexity,
    plan,
    quantize,
    rpc_server,
    run,
    serve,
)
from ggml_cffi.cli._output import notice_line, print_error, replace_unwritable
from ggml_cffi.core.progress import display_notices

_COMMANDS = (devices, doctor, fetch, run, serve, bench, perplexity, convert, embed, gguf, quantize, plan, rpc_server)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    arguments
        The words of the command line; default those of this process.
    """
    parser = make_parser()
    replace_unwritable()
    args = parser.parse_args(arguments)
    try:
        with display_notices(notice_line) if sys.stderr.isatty() else nullcontext():
            code: int = args.run(args)
            return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the program that read the output has ended, which is not an error
        return 0
    except (ggml_cffi.GgmlError, ValueError, TypeError, OSError, KeyError, ImportError) as error:
        print_error(error)
        return 2


class _Version(argparse.Action):
    """Option that prints the versions; only then is the library loaded."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            found = library.description()
        except ggml_cffi.GgmlError as error:
            found = f"no usable ggml: {error}"
        print(f"ggml-cffi {ggml_cffi.__version__} ({found})")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a parser of its own for each command."""
    parser = argparse.ArgumentParser(prog="ggml-cffi", description="ggml on every GPU of the machine.")
    parser.add_argument("--version", action=_Version, help="print the versions of this package and of ggml, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.register(commands)
    return parser
