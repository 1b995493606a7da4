"""Damaged GGUF files: flipped bits, extreme numbers, and parts removed, repeated or cut off."""

from __future__ import annotations

import os
import re
import struct
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.enums import GGUFType
from tests.fuzzing.child import Outcome
from tests.support import gguf_writer, llama_float64

#: ``plain`` has every type of value, ``model`` can be loaded, ``vocabulary`` also has a tokenizer, ``first`` and
#: ``second`` are parts of a model in two files, ``real`` is the header of SmolLM2, with zeros as weights.
BASES = ("plain", "model", "vocabulary", "first", "second", "real")
_PARTS = {"first": "m-00001-of-00002.gguf", "second": "m-00002-of-00002.gguf"}
ALLOWED = (ggml.FormatError, ggml.GgmlError, ValueError, OSError)
_UNDECODABLE = "ggml cannot decode"
_EXTREMES = (0, 1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 64, 127, 128, 255, 256, 65535, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_LARGE = (2**32, 2**40, 2**59, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
_PACKAGE = str(Path(ggml.__file__).parent)


@dataclass(frozen=True)
class Field:
    """Number or text in a header."""

    what: str
    at: int
    size: int


@dataclass(frozen=True)
class Damage:
    """Changes of a file: ``(at, length, bytes)`` replaces ``length`` bytes; the last change may set the file's end."""

    base: str
    edits: tuple[tuple[int, int, bytes], ...]
    cut: int | None = None

    def __str__(self) -> str:
        return f"Damage({self.base!r}, {self.edits!r}, {self.cut})"


# ---------------------------------------------------------------------- the files


@cache
def original(base: str) -> tuple[bytes, int, tuple[Field, ...]]:
    """Return the header with the data if that is short, the size of the file, and the fields of the header."""
    rng = np.random.default_rng(1)
    if base == "real":
        with open(models.fetch("smollm2"), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(4 << 20)
        fields, end = _fields(raw)
        return raw[:end], size, fields
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "original.gguf"
        if base == "plain":
            gguf_writer.write(path, _VALUES, _tensors(rng))
        elif base in _PARTS:
            part = list(_PARTS).index(base)
            tensors = list(_tensors(rng).items())
            values, those = ({}, tensors[4:]) if part else (_VALUES, tensors[:4])
            gguf_writer.write(path, _split(part) | values, dict(those))
        else:
            words = _VOCABULARY if base == "vocabulary" else {}
            llama_float64.random_model(path, rng, tied=base == "vocabulary", **words)
        raw = path.read_bytes()
    return raw, len(raw), _fields(raw)[0]


def _tensors(rng: np.random.Generator) -> dict[str, Any]:
    kinds = (ggml.F32, ggml.F16, ggml.BF16, ggml.Q4_0, ggml.Q8_0, ggml.Q4_K, ggml.I32, ggml.F64)
    tensors = {t.name: (t, rng.integers(0, 9, (2, 3, 256)).astype(np.float64)) for t in kinds}
    tensors["I32"] = (ggml.I32, np.arange(6).reshape(2, 3))
    return tensors | {"scalar": (ggml.F32, np.array(2.5))}


def _split(part: int) -> dict[str, Any]:
    numbers = {"split.no": (GGUFType.UINT16, part), "split.count": (GGUFType.UINT16, len(_PARTS))}
    return numbers | {"split.tensors.count": (GGUFType.INT32, 9)}


_VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "general.alignment": 32,
    **{f"v.{kind.name}": (kind, 1) for kind in GGUFType if kind not in (GGUFType.STRING, GGUFType.ARRAY)},
    **{
        f"a.{kind.name}": (GGUFType.ARRAY, (kind, [1, 0, 1]))
        for kind in GGUFType
        if kind not in (GGUFType.STRING, GGUFType.ARRAY)
    },
    "texts": (GGUFType.ARRAY, (GGUFType.STRING, ["a", "", "größe"])),
    "nested": (GGUFType.ARRAY, (GGUFType.ARRAY, [(GGUFType.UINT8, [1, 2]), (GGUFType.STRING, ["x"])])),
}
_TOKENS = [*[chr(33 + i) for i in range(40)], "Ġ", "ab", "Ġa", "<s>", "</s>", '!"', "#$", "%&", "'(", ")*"]
_VOCABULARY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": _TOKENS,
    "tokenizer.ggml.token_type": [1] * 43 + [3, 3] + [1] * 5,
    "tokenizer.ggml.merges": ['! "', "# $", "% &", "' (", ") *"],
    "tokenizer.ggml.bos_token_id": 43,
    "tokenizer.ggml.eos_token_id": 44,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 2.0,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _fields(raw: bytes) -> tuple[tuple[Field, ...], int]:
    """Return the fields of a valid header with their positions, and the end of the header."""
    found: list[Field] = []
    at = 0

    def take(what: str, size: int) -> int:
        nonlocal at
        found.append(Field(what, at, size))
        at += size
        return int.from_bytes(raw[at - size : at], "little")

    def string(what: str) -> None:
        take("text", take(f"{what} length", 8))

    def value(kind: int) -> None:
        if kind == GGUFType.STRING:
            string("value")
        elif kind == GGUFType.ARRAY:
            inner, n = take("array type", 4), take("array count", 8)
            for _ in range(n):
                value(inner)
        else:
            take("value", _SIZES[kind])

    take("magic", 4)
    take("version", 4)
    n_tensors, n_pairs = take("count", 8), take("count", 8)
    for _ in range(n_pairs):
        string("key")
        value(take("value type", 4))
    for _ in range(n_tensors):
        string("name")
        for _ in range(take("axes", 4)):
            take("size", 8)
        take("type", 4)
        take("offset", 8)
    return tuple(found), at


def damaged(damage: Damage) -> tuple[bytes, int]:
    """Return the bytes of the damaged file, and the size up to which zeros follow."""
    raw, size, _ = original(damage.base)
    grown = bytearray(raw)
    for at, length, new in damage.edits:
        grown[at : at + length] = new
    size += len(grown) - len(raw)
    if damage.cut is not None:
        size = min(damage.cut, size) if damage.cut >= 0 else size - damage.cut
    return bytes(grown[:size]), size


# ---------------------------------------------------------------------- strategies


@st.composite
def damages(draw: Any, bases: tuple[str, ...] = (*BASES[:3] * 2, *BASES[3:])) -> Damage:
    """Draw one to four changes of one of the files."""
    base = draw(st.sampled_from(bases))
    edits = tuple(draw(_edit(base)) for _ in range(draw(st.sampled_from((1, 1, 1, 1, 2, 2, 3, 4)))))
    _, size, fields = original(base)
    end = fields[-1].at + fields[-1].size
    cut = None
    if draw(st.integers(0, 9)) == 9:
        cut = draw(st.one_of(st.integers(0, end), st.integers(0, size), st.integers(-5000, -1)))
        edits = edits if draw(st.booleans()) else ()
    return Damage(base, edits, cut)


@cache
def _numbers(base: str) -> dict[str, list[Field]]:
    """Group fields by type, so that the many tokens of a vocabulary do not dominate."""
    found: dict[str, list[Field]] = {}
    for f in original(base)[2]:
        found.setdefault(f.what, []).append(f)
    return found


@st.composite
def _edit(draw: Any, base: str) -> tuple[int, int, bytes]:
    raw, _, fields = original(base)
    end = fields[-1].at + fields[-1].size
    kind = draw(st.integers(0, 99))
    groups = _numbers(base)
    field = draw(st.sampled_from(groups[draw(st.sampled_from([*sorted(groups), *["value"] * 8]))]))
    if kind < 50 and field.what != "text":
        return field.at, field.size, draw(_number(field.size, raw[field.at : field.at + field.size]))
    if kind < 65:
        at = draw(st.integers(field.at, max(field.at + field.size - 1, field.at)))
        return at, 1, bytes([raw[min(at, len(raw) - 1)] ^ (1 << draw(st.integers(0, 7)))])
    if kind < 75:
        return draw(st.integers(0, end - 1)), 1, bytes([draw(st.sampled_from((0, 1, 127, 128, 255, 32)))])
    if kind < 82:  # repeat a part of the header
        other = draw(st.sampled_from(fields))
        return field.at, 0, raw[other.at : other.at + draw(st.integers(1, 64))]
    if kind < 88:
        return field.at, draw(st.integers(1, 64)), b""
    if kind < 94:  # replace a field by another
        other = draw(st.sampled_from(groups[field.what]))
        return field.at, field.size, raw[other.at : other.at + other.size]
    texts = (b"", b"\xff\xfe", b"\0", b"general.alignment", b"llama.block_count", b"llama", b"x" * 70, b"{{ 1/0 }}")
    if field.what != "text":
        return field.at, 0, draw(st.sampled_from(texts))
    # The length changes with the text, so the file stays well-formed.
    text = draw(st.sampled_from(texts))
    return field.at - 8, field.size + 8, struct.pack("<Q", len(text)) + text


def _number(size: int, old: bytes) -> st.SearchStrategy[bytes]:
    now, top = int.from_bytes(old, "little"), 1 << 8 * size
    near = [(now + step) % top for step in (1, -1, 7, 32)] + [now * 2 % top, now // 2]
    numbers = [n for n in (*_EXTREMES, *_LARGE) if n < top] + [top - 1, top // 2, *near]
    floats = [struct.pack({4: "<f", 8: "<d"}.get(size, "x"), x) for x in _FLOATS] if size in (4, 8) else []
    return st.sampled_from([*[n.to_bytes(size, "little") for n in numbers], *floats])


_FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e-30, 1e30)

# ---------------------------------------------------------------------- in the child


def _write(path: str, raw: bytes, size: int) -> None:
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(size)


class Files:
    """Worker that reads damaged files, and loads those that are models."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        warnings.simplefilter("ignore")
        np.seterr(all="ignore")
        self.devices = list(devices)
        folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
        handle, self.path = tempfile.mkstemp(suffix=".gguf", dir=folder)
        os.unlink(self.path)  # removed at once, since the child may crash
        self.path = f"/proc/{os.getpid()}/fd/{handle}"
        self.folder = folder

    def __call__(self, job: Damage) -> Outcome:
        raw, size = damaged(job)
        if job.base in _PARTS:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                for base, name in _PARTS.items():
                    _write(os.path.join(folder, name), *((raw, size) if base == job.base else original(base)[:2]))
                return self._tried(job, os.path.join(folder, _PARTS["first"]))
        _write(self.path, raw, size)
        return self._tried(job, self.path)

    def _tried(self, job: Damage, path: str) -> Outcome:
        stage = "open"
        try:
            with ggml.GGUFFile(path) as f:
                stage = "read"
                self._read(f)
            if job.base == "plain" or job.base in _PARTS:
                return Outcome("computed", "", "read")
            stage = "load"
            with models.load(self.path, self.devices, n_ctx=None if job.base != "real" else 64, n_threads=1) as model:
                stage = "forward"
                if job.base != "real":
                    model.forward([1, 2, 3])
                stage = "tokenize"
                if job.base != "model":
                    model.tokenize("ab a!")
                    model.apply_chat_template([{"role": "user", "content": "a"}])
            return Outcome("compared", "", "loaded and computed")
        except ALLOWED as error:
            return Outcome("refused", stage, type(error).__name__, str(error)[:200])
        except Exception as error:
            if isinstance(error, TypeError) and _UNDECODABLE in str(error):
                return Outcome("refused", stage, "TypeError", str(error)[:200])
            frames = traceback.extract_tb(error.__traceback__)
            inside = [f for f in frames if f.filename.startswith(_PACKAGE)] or frames
            place = f"{Path(inside[-1].filename).name}:{inside[-1].name}"
            text = re.sub(r"\d+", "N", str(error))[:80]
            shown = "".join(traceback.format_exception(error))[-2000:]
            return Outcome("wrong exception", stage, f"{type(error).__name__} in {place}: {text}", shown)

    def _read(self, f: ggml.GGUFFile) -> None:
        for value in f.metadata.values():
            repr(value)[:50]
        for i, (name, info) in enumerate(f.tensors.items()):
            f.raw(name)
            if i < 12 and info.nbytes < 1 << 20:
                f.array(name)
