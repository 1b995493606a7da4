"""The command ``ggml-cffi serve``: models behind HTTP, with OpenAI's interface."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ggml_cffi.cli._model_args import add_model_arguments, load_options
from ggml_cffi.core.numbers import as_integer
from ggml_cffi.errors import missing_extra

if TYPE_CHECKING:
    from ggml_cffi.server import ModelSpec

#: Seconds that streams have to end after Ctrl-C.
_GRACE = 5
#: Open files that the server may have; each connection is one.
_OPEN_FILES = 65536


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    command = commands.add_parser("serve", help="serve models over HTTP, with OpenAI's interface")
    add_model_arguments(command, several_models=True)
    command.add_argument("--ctx", type=int, help="largest number of tokens in a sequence (default: up to 4096)")
    command.add_argument("--kv-slots", type=int, help="tokens in the KV cache of a model (default: one context)")
    command.add_argument(
        "--parallel", type=int, default=16, help="answers of a model in generation at once (default: %(default)s)"
    )
    command.add_argument("--memory", metavar="SIZE", help="bytes of all loaded models (default: what the devices have)")
    command.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        help="load each model in a process of its own, and each replica of data (default: replicas on several GPUs)",
    )
    command.add_argument("--preload", action="store_true", help="load the first model now, not when it is asked for")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="0 for a free one (default: %(default)s)")
    command.add_argument(
        "--api-key", action="append", help="key that requests need; may be repeated (default: $GGML_CFFI_API_KEY)"
    )
    command.add_argument(
        "--cors-origin", action="append", default=[], help="origin of pages that may use the server; may be repeated"
    )
    command.add_argument(
        "--max-waiting", type=int, default=256, help="requests of a model that wait (default: %(default)s)"
    )
    command.add_argument("--max-prompt", type=int, help="tokens of a prompt (default: the context)")
    command.add_argument("--max-body", default="8M", metavar="SIZE", help="bytes of a request (default: %(default)s)")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from ggml_cffi import server
        from ggml_cffi.server.errors import LoadingError
    except ModuleNotFoundError as error:
        raise missing_extra("the command serve", str(error.name), "serve") from None
    port = as_integer("--port", args.port, 0, 65535)
    keys = args.api_key or [key for key in [os.environ.get("GGML_CFFI_API_KEY")] if key]
    _warn(args.host, keys)
    _allow_connections()
    catalog = server.Catalog(
        model_specs(args),
        memory=args.memory,
        parallel=args.parallel,
        max_waiting=args.max_waiting,
        isolate=args.isolate,
    )

    class Server(uvicorn.Server):
        """A server that ends the streams before it waits for the connections."""

        async def startup(self, sockets: Any = None) -> None:
            if args.preload:
                try:
                    async with catalog.use(catalog.names[0]):
                        pass
                except LoadingError as error:  # nobody but the caller of the command reads this one
                    raise (error.__cause__ or error) from None
            await super().startup(sockets)

        async def shutdown(self, sockets: Any = None) -> None:
            catalog.stop()
            await super().shutdown(sockets)

    app = server.create_app(
        catalog, api_keys=keys, cors_origins=args.cors_origin, max_prompt=args.max_prompt, max_body=args.max_body
    )
    config = uvicorn.Config(app, args.host, port, ws="none", timeout_graceful_shutdown=_GRACE)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises the signal again at its end
    with catalog, suppress(KeyboardInterrupt):
        Server(config).run()
    return 0


def _allow_connections() -> None:
    """Raise the limit of open files, which is often 1024: connections beyond it would wait, and fill the log."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit, and a container may forbid it
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def model_specs(args: argparse.Namespace) -> dict[str, ModelSpec]:
    """Return the models of the command line by name: ``NAME=FILE``, or a file that gives its name.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If two models have the same name, or one has none.
    """
    from ggml_cffi.server import ModelSpec
    from ggml_cffi.server.catalog import default_name

    options = load_options(args, args.devices, args.ctx)
    if args.kv_slots is not None:
        options["kv_slots"] = args.kv_slots
    found: dict[str, ModelSpec] = {}
    for text in args.model:
        alias, given, path = text.partition("=")
        if not given or os.path.exists(text):
            alias, path = default_name(text), text
        if not alias:
            raise ValueError(f"the model {text!r} has no name: write NAME=FILE")
        if alias in found:
            raise ValueError(f"two models have the name {alias!r}: give them others as NAME=FILE")
        if "://" not in path and not os.path.exists(path):
            raise FileNotFoundError(f"there is no file {path!r}")
        found[alias] = ModelSpec(path, options)
    return found


def _warn(host: str, keys: list[str]) -> None:
    """Say so if others on the network can use the server."""
    if _is_loopback(host):
        return
    print(
        f"WARNING: the server listens on {host}, so that other machines can use it, without encryption"
        + (". Requests need a key." if keys else " AND WITHOUT A KEY: anybody may use it. Give --api-key."),
        file=sys.stderr,
        flush=True,
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
