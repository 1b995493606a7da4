"""The commands ``ggml-cffi gguf`` and ``ggml-cffi quantize``."""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np

from ggml_cffi.cli._output import mib, progress_bar
from ggml_cffi.core.text import table
from ggml_cffi.enums import GGUFType
from ggml_cffi.files.gguf.reader import GGUFFile, GGUFValue

_WIDTH = 80  # of a value in the table
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def register(commands: Any) -> None:
    """Add the commands to those of the parser."""
    files = commands.add_parser("gguf", help="look into GGUF files").add_subparsers(required=True, metavar="WHAT")
    command = files.add_parser("show", help="print metadata and tensors")
    command.add_argument("file", help="a GGUF file; of a split model the first")
    command.add_argument("--metadata", action="store_true", help="only the metadata")
    command.add_argument("--tensors", action="store_true", help="only the tensors")
    command.add_argument("--json", action="store_true", help="as JSON, with values at full length")
    command.set_defaults(run=_show)

    command = commands.add_parser("quantize", help="write a model with its weights in another type")
    command.add_argument("source", metavar="IN", help="a GGUF file; of a split model the first")
    command.add_argument("target", metavar="OUT", help="the file to write")
    command.add_argument("--type", required=True, dest="dtype", help="such as q4_k, q8_0, iq4_xs, bf16")
    command.add_argument("--only", action="append", metavar="PATTERN", help='only such tensors, e.g. "blk.*.ffn_*"')
    command.add_argument("--keep", action="append", metavar="PATTERN", help="leave such tensors as they are")
    command.add_argument("--imatrix", metavar="FILE", help="how much each column matters, from llama-imatrix")
    command.add_argument("--max-size", type=_size, metavar="SIZE", help="of a file, e.g. 2G: what is more is split")
    command.add_argument("--threads", type=int, help="threads to use (default: all)")
    command.add_argument("--force", action="store_true", help="replace OUT if it exists")
    command.set_defaults(run=_quantize)


def _size(text: str) -> int:
    number = text.lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if not number[-1:].isdigit() else ""
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 500M or 2G") from None


# ---------------------------------------------------------------------- show


def _show(args: argparse.Namespace) -> int:
    both = args.metadata == args.tensors
    with GGUFFile(args.file) as file:
        if args.json:
            import json

            print(json.dumps(_described(file, both or args.metadata, both or args.tensors), indent=2))
            return 0
        parts = [_summary(file)]
        if both or args.metadata:
            parts.append(_metadata_table(file))
        if both or args.tensors:
            parts.append(_tensor_table(file))
    print("\n\n".join(parts))
    return 0


def _described(file: GGUFFile, metadata: bool, tensors: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"files": list(file.paths), "version": file.version}
    if metadata:
        found["metadata"] = {key: _plain(value) for key, value in file.metadata.items()}
    if tensors:
        found["tensors"] = [
            {
                "name": info.name,
                "type": info.dtype.name,
                "shape": info.shape,
                "bytes": info.nbytes,
                "file": info.part,
                "offset": info.offset,
            }
            for info in file.tensors.values()
        ]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _summary(file: GGUFFile) -> str:
    n = sum(_elements(info.shape) for info in file.tensors.values())
    nbytes = sum(info.nbytes for info in file.tensors.values())
    size = sum(os.path.getsize(path) for path in file.paths)
    files = f"{len(file.paths)} files, " if len(file.paths) > 1 else ""
    bits = f", {8 * nbytes / n:.2f} bits each" if n else ""
    return (
        f"{_text(file.path)}: GGUF version {file.version}, {files}{mib(size)}, {len(file.tensors):,} tensors, "
        f"{n:,} weights{bits}"
    )


def _elements(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=object))


def _metadata_table(file: GGUFFile) -> str:
    return table([("key", "type", "value"), *((_text(k), _kind(v), _shown(v)) for k, v in file.fields.items())])


def _kind(value: GGUFValue) -> str:
    return f"{value.sub_type.name}[{len(value.value)}]" if value.sub_type is not None else value.type.name


def _shown(value: GGUFValue) -> str:
    plain = value.plain()
    if value.sub_type is None:
        if isinstance(plain, str):
            return _text(plain)
        return str(np.float32(plain) if value.type is GGUFType.FLOAT32 else plain)
    start = repr(_plain(plain[: _WIDTH // 2]))  # which is as much as there is room for, and more
    return _cut(start if len(plain) <= _WIDTH // 2 else f"{start[:-1]}, ...")


def _text(text: str) -> str:
    """``text`` on one line, without what a terminal would obey."""
    return _cut(text[: 2 * _WIDTH] if text[: 2 * _WIDTH].isprintable() else repr(text[: 2 * _WIDTH]))


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _tensor_table(file: GGUFFile) -> str:
    split = len(file.paths) > 1
    rows = [("tensor", "type", "shape", "bytes", "file" if split else "")]
    for info in file.tensors.values():
        shape = " x ".join(map(str, info.shape)) or "-"
        part = str(info.part + 1) if split else ""
        rows.append((_text(info.name), info.dtype.name, shape, f"{info.nbytes:,}", part))
    return table(rows, right=(3, 4))


# ---------------------------------------------------------------------- quantize


def _quantize(args: argparse.Namespace) -> int:
    from ggml_cffi.files.quantize_file import quantize_file, read_imatrix

    imatrix = read_imatrix(args.imatrix) if args.imatrix is not None else None
    with progress_bar("quantizing") as progress:
        try:
            paths = quantize_file(
                args.source,
                args.target,
                args.dtype,
                only=args.only,
                keep=args.keep,
                imatrix=imatrix,
                max_bytes=args.max_size,
                overwrite=args.force,
                threads=args.threads,
                progress=progress,
            )
        except FileExistsError as error:
            raise FileExistsError(f"{error}; --force replaces it") from None
    for path in paths:
        print(f"{path}: {mib(os.path.getsize(path))}")
    return 0
