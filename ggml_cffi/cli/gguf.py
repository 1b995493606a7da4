"""The command ``ggml-cffi gguf``: the metadata and the tensors of GGUF files."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from ggml_cffi.core.text import size, table, to_json
from ggml_cffi.enums import GGUFType
from ggml_cffi.files.gguf import GGUFFile, GGUFValue

_WIDTH = 80  # columns of a value in the table


def register(commands: Any) -> None:
    """Add the command to the parser's commands."""
    files = commands.add_parser("gguf", help="inspect GGUF files").add_subparsers(required=True, metavar="ACTION")
    command = files.add_parser("show", help="print metadata and tensors")
    command.add_argument("file", help="a GGUF file, its URL, or hf://ORG/REPO:TYPE; the first file of a split model")
    command.add_argument("--metadata", action="store_true", help="only the metadata")
    command.add_argument("--tensors", action="store_true", help="only the tensors")
    command.add_argument("--json", action="store_true", help="print JSON, with values at full length")
    command.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    both = args.metadata == args.tensors
    path = args.file
    if path.startswith("hf://"):
        from ggml_cffi.models.hub import header_path  # slow to import

        path = header_path(path)
    with GGUFFile(path, header_only=True) as file:
        if args.json:
            print(to_json(_as_dict(file, both or args.metadata, both or args.tensors), indent=2))
            return 0
        parts = [_summary(file)]
        if both or args.metadata:
            parts.append(_metadata_table(file))
        if both or args.tensors:
            parts.append(_tensor_table(file))
    print("\n\n".join(parts))
    return 0


def _as_dict(file: GGUFFile, metadata: bool, tensors: bool) -> dict[str, Any]:
    """Return the content of a file for JSON, with or without its metadata and its tensors."""
    found: dict[str, Any] = {
        "files": list(file.paths),
        "version": file.version,
        "missing_bytes": file.missing_bytes,
    }
    if metadata:
        found["metadata"] = {key: _without_arrays(value) for key, value in file.metadata.items()}
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


def _without_arrays(value: Any) -> Any:
    """Return a value with lists in place of arrays."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [_without_arrays(item) for item in value] if isinstance(value, list) else value


def _summary(file: GGUFFile) -> str:
    n = sum(_element_count(info.shape) for info in file.tensors.values())
    nbytes = sum(info.nbytes for info in file.tensors.values())
    files = f"{len(file.paths)} files, " if len(file.paths) > 1 else ""
    bits = f", {8 * nbytes / n:.2f} bits each" if n else ""
    summary = (
        f"{_printable(file.path)}: GGUF version {file.version}, {files}{size(sum(file.file_bytes))}, "
        f"{len(file.tensors):,} tensors, {n:,} weights{bits}"
    )
    if file.missing_bytes:
        summary += f"\nThe file is incomplete: {size(file.missing_bytes)} of the tensors' data are missing."
    return summary


def _element_count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=object))  # Python integers: a malformed shape may exceed 64 bits


def _metadata_table(file: GGUFFile) -> str:
    rows = [(_printable(key), _type_name(value), _value_text(value)) for key, value in file.fields.items()]
    return table([("key", "type", "value"), *rows])


def _type_name(value: GGUFValue) -> str:
    return f"{value.sub_type.name}[{len(value.value)}]" if value.sub_type is not None else value.type.name


def _value_text(value: GGUFValue) -> str:
    plain = value.plain()
    if value.sub_type is None:
        if isinstance(plain, str):
            return _printable(plain)
        return str(np.float32(plain) if value.type is GGUFType.FLOAT32 else plain)
    start = repr(_without_arrays(plain[: _WIDTH // 2]))  # an element takes two columns at least
    return _shorten(start if len(plain) <= _WIDTH // 2 else f"{start[:-1]}, ...")


def _printable(text: str) -> str:
    """Return ``text`` on one line and without control characters, shortened to the width of the table."""
    return _shorten(text[: 2 * _WIDTH] if text[: 2 * _WIDTH].isprintable() else repr(text[: 2 * _WIDTH]))


def _shorten(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _tensor_table(file: GGUFFile) -> str:
    split = len(file.paths) > 1
    rows = [("tensor", "type", "shape", "bytes", "file" if split else "")]
    for info in file.tensors.values():
        shape = " x ".join(map(str, info.shape)) or "-"
        part = str(info.part + 1) if split else ""
        rows.append((_printable(info.name), info.dtype.name, shape, f"{info.nbytes:,}", part))
    return table(rows, right=(3, 4))
