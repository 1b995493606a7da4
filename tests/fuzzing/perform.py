"""Performance of one call: build it, compute it if accepted, and compare it with the reference."""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import Op, Tensor, Type, c
from ggml_cffi.core import dtypes
from tests import cases
from tests.cases import attention, rope
from tests.fuzzing.calls import FAILED, UNUSABLE, Call, T, cases_of, fails, first, options_of, parameters
from tests.fuzzing.child import Outcome

ALLOWED = (ValueError, TypeError, IndexError, ggml.GgmlError)
#: Limit of the elements of a computed result; larger graphs are built only.
_SMALL = 1 << 16
_PACKAGE = str(Path(ggml.__file__).parent)
_VIEWS = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE, Op.NONE})
# Messages of cffi for a value that reaches the C call, which a check should have refused.
_LEAK = re.compile(r"ctype|cdata|initializer for|integer .* does not fit|float\(\) argument.*cffi")
_REFERENCE_SECONDS = 3
_ASSUMES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "cross_entropy_loss_back": lambda values: np.allclose(values["labels"].sum(-1), 1),
}
# Quantization to these types builds a table for seconds, so their operands stay zero.
_SLOW = frozenset({t for t in Type if t.name.startswith(("IQ1", "IQ2", "IQ3"))})


class SlowError(Exception):
    """Signal that the reference takes too long for a fuzzer."""


def _alarm(*_: Any) -> None:
    raise SlowError


class Calls:
    """Worker that performs calls, with the same schedulers for all."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        warnings.simplefilter("ignore")
        np.seterr(all="ignore")
        signal.signal(signal.SIGALRM, _alarm)
        self.on_cpu = devices == ("CPU",)
        # Most calls use one thread, which is faster on a busy machine.
        self.schedulers = [
            ggml.Scheduler([ggml.Backend("CPU", n_threads=n)] if self.on_cpu else devices)
            for n in ((1, 3) if self.on_cpu else (1,))
        ]
        self.second = ggml.Scheduler([ggml.Backend("CPU", n_threads=1)])

    def __call__(self, call: Call) -> Outcome:
        if call.op == "_die":  # for a test of the fuzzer
            os.kill(os.getpid(), signal.SIGSEGV)
        with ExitStack() as stack:
            try:
                return _Attempt(self, call, stack).run()
            finally:
                for scheduler in (*self.schedulers, self.second):
                    scheduler.reset()
                    scheduler.unplace()


class _Attempt:
    def __init__(self, bench: Calls, call: Call, stack: ExitStack) -> None:
        self.bench, self.call, self.stack = bench, call, stack
        self.stage = "operands"
        self.older = self._context()
        self.ctx = self._context()
        seed = zlib.crc32(str(call).encode())
        self.rng = np.random.default_rng(seed)
        self.scheduler = bench.schedulers[-1 if seed % 4 == 0 else 0]
        self.bases: dict[str, tuple[T, Tensor]] = {}
        self.tensors: list[Tensor] = []
        self.gone: list[ggml.Context] = []
        self.loose = ""

    def _context(self) -> ggml.Context:
        return self.stack.enter_context(ggml.Context())

    def run(self) -> Outcome:
        outcome = self._outcome()
        return replace(outcome, loose=self.loose) if self.loose else outcome

    def _outcome(self) -> Outcome:
        try:
            return self._run()
        except ALLOWED as error:
            if _LEAK.search(str(error)) and not isinstance(error, ggml.GgmlError):
                return self._wrong(error)
            kind = {"operands": "skipped", "call": "refused"}.get(self.stage, "accepted")
            return Outcome(kind, self.stage, type(error).__name__, str(error)[:300])
        except Exception as error:
            if str(error) == FAILED:
                return Outcome("accepted", self.stage, "the function's own exception")
            return self._wrong(error)

    def _wrong(self, error: Exception) -> Outcome:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [f for f in frames if f.filename.startswith(_PACKAGE)]
        if (
            not inside and self.stage == "call"
        ):  # Python's own TypeError for a signature has no frame inside the package
            inside = frames
        if "'NoneType' object has no attribute" in str(error) and any(v is None for v in self.call.arguments.values()):
            return Outcome("wrong exception", self.stage, "AttributeError: None is taken for a tensor", str(error))
        where = f"{Path(inside[-1].filename).name}:{inside[-1].name}" if inside else "the harness"
        text = re.sub(r"\d+", "N", str(error))[:80]
        shown = "".join(traceback.format_exception(error))[-2000:]
        return Outcome("wrong exception", self.stage, f"{type(error).__name__} in {where}: {text}", shown)

    def _run(self) -> Outcome:
        given = {name: self.make(name, value) for name, value in self.call.arguments.items()}
        given |= self._where(given)
        for context in self.gone:
            context.close()
        function = getattr(ggml, self.call.op)
        self.stage = "call"
        made = function(**given)
        results = [t for t in (made if isinstance(made, tuple | list) else [made]) if isinstance(t, Tensor)]
        if not results:
            return Outcome("accepted", "call", "no tensor")
        self.loose = _loose(self.call)
        self.stage = "graph"
        for t in results:
            if t.nbytes > 2**62 or min(t.ne) < 0 or prod(t.ne) > 2**62:
                return Outcome("disagreement", "call", "an impossible result", f"{t!r} {t.ne}")
        if self._too_large(results):
            return Outcome("accepted", "call", "large")
        return self._compute(made if isinstance(made, Tensor) else None, results)

    def _where(self, given: dict[str, Any]) -> dict[str, Any]:
        match self.call.ctx:
            case "ours":
                return {"ctx": self.ctx}
            case "other":
                return {"ctx": self._context()}
            case "closed":
                self.gone.append(self._context())
                return {"ctx": self.gone[-1]}
            case "wrong":
                return {"ctx": "ctx"}
        return {} if any(isinstance(v, Tensor) for v in given.values()) else {"ctx": self.ctx}

    # ------------------------------------------------------------------ operands

    def make(self, name: str, value: Any) -> Any:
        if isinstance(value, list | tuple) and any(isinstance(v, T) for v in value):
            return [self.make(f"{name}.{i}", v) for i, v in enumerate(value)]
        if not isinstance(value, T):
            return value
        if value.state == "same" and self.tensors:
            return self.tensors[0]
        if value.state == "numpy":
            return np.zeros(value.shape if prod(value.shape) < _SMALL else 1, np.float32)
        ctx = self.ctx
        if value.state in ("foreign", "closed", "older"):
            ctx = self.older if value.state == "older" else self._context()
        if value.state == "closed":
            self.gone.append(ctx)
        tensor, base = _laid_out(value, ctx)
        self.bases[name] = (value, base)
        tensor = self._in_state(value.state, ctx, tensor, base)
        self.tensors.append(tensor)
        return tensor

    def _in_state(self, state: str, ctx: ggml.Context, tensor: Tensor, base: Tensor) -> Tensor:
        small = base.nbytes <= 4 * _SMALL
        if state == "allocated" and small:
            ctx.alloc("CPU" if self.bench.on_cpu else self.scheduler.backends[0].device, [base])
        elif state == "released" and small:
            ctx.alloc("CPU", [base])[0].close()
        elif state == "computed":
            return ggml.cont(tensor)
        elif state == "view":
            if tensor.is_contiguous:
                return ggml.view(ggml.reshape(tensor, tensor.shape), tensor.shape)
            return ggml.permute(tensor, range(tensor.ndim))
        elif state in ("held", "done") and small:
            tensor = ggml.cont(tensor)
            self.bench.second.alloc(self.stack.enter_context(ggml.Graph(tensor)))
            self.bench.second.compute()
            if state == "done":
                self.bench.second.reset()
        return tensor

    def _too_large(self, results: list[Tensor]) -> bool:
        every = [*results, *(base for _, base in self.bases.values()), *self.tensors]
        return sum(t.size for t in every) > 3 * _SMALL or any(t.nbytes > 8 * _SMALL for t in every)

    # ------------------------------------------------------------------ computing

    def _compute(self, result: Tensor | None, results: list[Tensor]) -> Outcome:
        scheduler = self.scheduler
        graph = self.stack.enter_context(ggml.Graph(*results))
        self.stage = "alloc"
        try:
            scheduler.alloc(graph)
        except ggml.UnsupportedOpError:  # a node in place must be on the device of its operand
            for node in graph.nodes:
                if node in results or not node.ptr.view_src:
                    scheduler.place(node, scheduler.backends[-1])
            scheduler.alloc(graph)
        self.stage = "store"
        values = self._store()
        before = self._untouched(graph)
        self.stage = "compute"
        scheduler.compute(graph)
        self.stage = "read"
        got = [t.numpy() for t in results]
        for name, raw in before.items():
            if _raw(self.bases[name][1]) != raw:
                return Outcome("overwritten input", "compute", name)
        for t, array in zip(results, got, strict=True):
            if array.shape != t.shape:
                return Outcome("disagreement", "read", "numpy() has another shape than the tensor", f"{t!r}")
        self.stage = "compare"
        reason = self._incomparable(values)
        if result is None or reason:
            return Outcome("computed", "compare", reason or "several results")
        return self._compare(result, got[0], values)

    def _store(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, (spec, base) in self.bases.items():
            if not base.is_allocated or spec.state in UNUSABLE:
                continue
            if spec.dtype in _SLOW:
                continue
            try:
                drawn = spec.spec.draw(self.rng)
            except (ValueError, TypeError):  # the type needs an importance matrix
                continue
            _store(spec, base, drawn)
            if not dtypes.has_numpy(spec.dtype) and spec.layout == "contiguous":
                drawn = base.numpy().astype(np.float64)  # quantization of quantized values may change them again
            values[name] = drawn
        return values

    def _untouched(self, graph: ggml.Graph) -> dict[str, bytes]:
        """Return the bytes of the inputs to which no node writes."""
        if not self.bench.on_cpu:
            return {}
        written = [n.ptr.view_src for n in graph.nodes if n.ptr.view_src and n.op not in _VIEWS]
        return {
            name: _raw(base)
            for name, (_, base) in self.bases.items()
            if base.is_allocated and (base.ptr.view_src or base.ptr) not in written
        }

    def _incomparable(self, values: dict[str, Any]) -> str:
        call = self.call
        op = call.op if call.op in cases.REFERENCE else call.op.removesuffix("_inplace")
        if op not in cases.REFERENCE:
            return "no reference"
        if set(call.operands()) - set(values):
            return "values of an operand cannot be written"
        known = inspect.signature(cases.REFERENCE[op]).parameters
        if set(call.arguments) - set(known):
            return "the reference has no such parameter"
        if call.op == "view" and any(t.layout != "contiguous" for t in call.operands().values()):
            return "the reference of view knows no gaps"
        if call.op == "view" and any(dtypes.is_quantized(t.dtype) for t in call.operands().values()):
            return "the reference of view knows no blocks"
        if call.op.endswith("_inplace") and any(t.layout == "overlapping" for t in call.operands().values()):
            return "it writes over itself"
        if call.op.startswith(("arg", "top_k")) and any(np.unique(v).size < v.size for v in values.values()):
            return "equal values come in no order"
        if call.op in _ASSUMES and not _ASSUMES[call.op](values):
            return "the operands are none that it is for"
        if any(t.state == "done" for t in call.operands().values()):
            return "an operand was computed elsewhere"
        for name, value in call.arguments.items():
            if value is first or value is fails:
                return "a function that the reference does not know"
            if isinstance(value, float | int) and not abs(value) <= (
                1e3 if float in options_of(parameters(call.op)[name][0]) else 2**31
            ):
                return "an extreme parameter"
            if name == "freq_base" and isinstance(value, float | int) and value < 100:
                return "an extreme parameter"  # angles grow with the axis, beyond the resolution of F32
        return ""

    def _compare(self, result: Tensor, got: Any, values: dict[str, Any]) -> Outcome:
        call = self.call
        plain = {n: v.spec if isinstance(v, T) else _member(call.op, n, v) for n, v in call.arguments.items()}
        if call.op == "view":  # the reference counts bytes as of F32
            size = dtypes.type_size(call.operands()["a"].dtype)
            plain |= {"offset": plain.get("offset", 0) * 4 // size}
            if plain.get("strides") is not None:
                plain["strides"] = [4 * n // size for n in plain["strides"]]
        case = cases.Case(call.op, plain)
        known = [one.tolerance for one in cases_of(call.op) if one.tolerance is not None]
        if dtypes.is_quantized(result.dtype):
            known.append(0.3)
        # Of a few values all may be outliers.
        allowed = max([case.allowed(result.dtype), *known]) * (4 if got.size < 16 else 2)
        allowed = max(allowed * _cancelling(call.op, values), _resolution(call.op, values, plain))
        signal.alarm(_REFERENCE_SECONDS)
        try:
            outcomes = []
            for given in _ranks(call, values):
                outcomes.append(self._matches(case, given, got, allowed, result.dtype))
                if not outcomes[-1].is_defect:
                    return outcomes[-1]
            return next((o for o in outcomes if o.what.startswith("other")), outcomes[0])
        except SlowError:
            return Outcome("computed", "compare", "the reference is slow")
        finally:
            signal.alarm(0)

    def _matches(self, case: cases.Case, values: dict[str, Any], got: Any, allowed: float, kind: Type) -> Outcome:
        try:
            want = case.want(values)
        except SlowError:
            raise
        except Exception as error:
            shown = "".join(traceback.format_exception(error))[-1500:]
            if not got.size:
                return Outcome("computed", "compare", "no elements")
            return Outcome("disagreement", "compare", f"the reference raises {type(error).__name__}", shown)
        if _stripped(got.shape) != _stripped(want.shape):
            return Outcome("disagreement", "compare", "another shape", f"{got.shape}, the reference {want.shape}")
        want = want.reshape(got.shape)
        if dtypes.is_quantized(kind) and want.size:  # the blocks hold the nearest values
            want = ggml.dequantize(ggml.quantize(want, kind), kind, want.shape)
        if case.op in cases.UNORDERED:
            got, want = np.sort(got, -1), np.sort(want, -1)
        what, detail = difference(got, want, allowed)
        return Outcome("disagreement", "compare", what, detail) if what else Outcome("compared")


def _resolution(op: str, values: dict[str, Any], arguments: dict[str, Any]) -> float:
    """Return the error that single precision or a stored type causes by itself."""
    if "positions" in values:
        return rope.resolution(values, arguments)
    if op == "flash_attn_ext" and dtypes.is_quantized(arguments["k"].dtype):
        return attention.resolution(values, arguments)
    if op == "solve_tri":  # the error of rounding the matrix once
        return float(np.linalg.cond(np.tril(values["a"])).max(initial=0)) * 2**-23
    if op == "interpolate":  # places between elements are single-precision numbers
        return max(values["a"].shape, default=0) * 2**-22
    return 0.0


def _cancelling(op: str, values: dict[str, Any]) -> float:
    """Return the ratio of the terms of a product's sums to the sums, beyond the usual: rounding errors grow with it."""
    if op != "linear" or not values["x"].size:
        return 1.0
    x, w = values["x"], values["weight"]
    terms, sums = np.abs(x) @ np.abs(w).swapaxes(-1, -2), x @ w.swapaxes(-1, -2) + values.get("bias", 0.0)
    usual = math.sqrt(x.shape[-1])
    return max(float(np.linalg.norm(terms) / max(np.linalg.norm(sums), 1e-30)) / usual, 1.0)


def _member(op: str, name: str, value: Any) -> Any:
    """Return ``value`` as a member of the parameter's enumeration, if it has one."""
    kind = next((o for o in options_of(parameters(op)[name][0]) if isinstance(o, type) and issubclass(o, Enum)), None)
    if kind is None:
        return value
    try:
        return kind(value)
    except ValueError:
        return value


def _ranks(call: Call, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the operands as they are, then with leading axes of size 1 as in the cases, which are the same to ggml."""
    yield values
    seen = set()
    for case in cases_of(call.op):
        ranks = {name: len(spec.shape) for name, spec in case.operands().items() if name in values}
        key = tuple(sorted(ranks.items()))
        if key in seen or any(ranks.get(name, -1) < _rank(v) for name, v in values.items()):
            continue
        seen.add(key)
        yield {name: _to_rank(v, ranks[name]) for name, v in values.items()}


def _rank(values: Any) -> int:
    return len(_stripped(values.shape))


def _to_rank(values: Any, rank: int) -> Any:
    shape = _stripped(values.shape)
    return values.reshape((1,) * (rank - len(shape)) + shape)


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``shape`` without leading axes of size 1."""
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape


def _loose(call: Call) -> str:
    """Return a description of an accepted argument that its annotation does not allow, or of a non-number."""
    found = []
    for name, value in call.arguments.items():
        options = options_of(parameters(call.op)[name][0])
        if Any in options or object in options or isinstance(value, T):
            continue
        if value is None:
            wrong = type(None) not in options
        elif isinstance(value, bool):
            wrong = bool not in options and bool(set(options) & {int, float})
        elif isinstance(value, float):
            wrong = float not in options or not math.isfinite(value)
        else:
            wrong = isinstance(value, str | bytes | complex) and not any(
                o is str or hasattr(o, "__members__") for o in options
            )
        if wrong:
            found.append(f"{call.op}({name}={value!r})")
    return ", ".join(found)


def difference(got: Any, want: Any, allowed: float) -> tuple[str, str]:
    """Return a description of the difference; empty if there is none. Equal infinities, and NaN at the same places, are
    equal.
    """
    if got.dtype.kind in "iu" and not np.array_equal(want, np.round(want)):
        return "", ""  # the function returns fractions
    if got.dtype.kind in "iu":
        same = np.array_equal(got, want)
        return ("", "") if same else ("other integers", f"{got.ravel()[:9]}, the reference {want.ravel()[:9]}")
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    limit = 6e4 if np.abs(got[np.isfinite(got)]).max(initial=0) <= 65504 and np.isinf(got).any() else 3.4e38
    want = np.where(np.abs(want) > limit, np.copysign(np.inf, want), want)
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        bad = np.flatnonzero(~((got == want) | (np.isnan(got) & np.isnan(want)) | (finite & np.isfinite(got))))
        at = bad[:5]
        return "NaN or infinities", f"at {at}: {got.ravel()[at]}, the reference {want.ravel()[at]}"
    got, want = got[finite], want[finite]
    floor = 0.3 if want.size < 16 else 0.03  # small results are rounding errors of larger numbers
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), floor * math.sqrt(want.size), 1e-30)
    if error <= allowed:
        return "", ""
    at = np.argsort(-np.abs(got - want))[:5]
    return "other values", f"error {error:.2g}, allowed {allowed:g}; {got[at]}, the reference {want[at]}"


# ---------------------------------------------------------------------- layouts


def _laid_out(t: T, ctx: ggml.Context) -> tuple[Tensor, Tensor]:
    """Return the operand, and the input tensor behind it."""
    unit, n = dtypes.type_size(t.dtype), prod(t.shape)
    block = dtypes.block_size(t.dtype)
    if t.layout == "offset":
        base = ctx.new_tensor(t.dtype, (n + 3 * block,))
        return ggml.view(base, t.shape, offset=2 * unit), base
    if t.layout == "overlapping" and t.shape:
        # Rows overlap by half; the base has the full number of elements.
        row = t.shape[-1] // block
        steps = [max(row // 2, 1) * unit] * (len(t.shape) - 1) + [unit]
        base = ctx.new_tensor(t.dtype, (max(n, block),))
        return ggml.view(base, t.shape, strides=steps), base
    tensor, base = t.spec.tensor(ctx)
    return tensor, base


def _store(t: T, base: Tensor, values: Any) -> None:
    """Write ``values`` to the memory that the operand shows."""
    if t.layout not in ("offset", "overlapping") or (not t.shape and t.layout == "overlapping"):
        t.spec.store(base, values)
        return
    integers = t.dtype in dtypes.INTEGERS
    filler = 0.0 if integers or not dtypes.has_numpy(t.dtype) else np.nan
    stored = np.full(base.shape, filler)
    if t.layout == "offset":
        start = 2 * dtypes.block_size(t.dtype)
        stored[start : start + values.size] = values.ravel()
    else:
        stored[:] = np.resize(values.ravel(), base.shape) if values.size else 0
        block = dtypes.block_size(t.dtype)
        step = max(t.shape[-1] // block // 2, 1) * block
        at = (
            sum(np.indices(t.shape)[:-1]) * step + np.indices(t.shape)[-1]
            if len(t.shape) > 1
            else np.arange(t.shape[0])
        )
        values[...] = stored[at]
    base.set(stored.astype(np.int64) if integers else stored)


def _raw(t: Tensor) -> bytes:
    pointer = t.ptr
    if not pointer.data or not t.nbytes:
        return b""
    return bytes(c.ffi.buffer(c.ffi.cast("char *", pointer.data), t.nbytes))
