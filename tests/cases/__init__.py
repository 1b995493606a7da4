"""Cases: operations with their operands, and float64 references in numpy.

Each module here belongs to the module of the same name in ``ggml_cffi/ops/`` and has

* a float64 reference for each operation, a function of the same name and parameters, marked ``@reference``: it gets an
  array for each tensor;
* ``CASES``, which the tests run on every device, and from which the fuzzer starts;
* ``WRONG``, calls that must be refused, by a part of the message.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import ggml_cffi as ggml
from ggml_cffi import Prec, Type
from ggml_cffi.core import dtypes
from ggml_cffi.core.cuda import has_cuda_kernels

Array = npt.NDArray[Any]
Layout = Literal["contiguous", "gaps", "permuted", "transposed"] | tuple[int, ...]

#: Allowed relative error by the type of the operands and of the result. Backends compute in F32, or in F16 if an
#: operand is F16, and round activations to 8 bits if the weights are quantized.
TOLERANCE = {Type.F32: 1e-5, Type.F16: 2e-3, Type.BF16: 1e-2}
_QUANTIZED = 1e-2

#: Quantized types whose blocks have an offset, and operations that multiply by weights.
_WITH_OFFSETS = {Type.Q4_1, Type.Q5_1, Type.Q2_K, Type.Q4_K, Type.Q5_K}
_PRODUCTS = {"linear", "mul_mat", "mul_mat_id"}

REFERENCE: dict[str, Callable[..., Array]] = {}

#: Operations with rows in no order.
UNORDERED = {"top_k"}


def reference(function: Callable[..., Array]) -> Callable[..., Array]:
    """Register the float64 reference of the operation that ``function`` is named after."""
    REFERENCE[function.__name__] = function
    return function


@dataclass(frozen=True)
class In:
    """Operand of a case.

    ``layout`` is the layout in memory: ``"gaps"`` has unused elements (NaN) after each row, ``"permuted"`` has the two
    axes before the last swapped, ``"transposed"`` the last two; a tuple lists the axes in the order of memory.
    ``values`` are an interval for random numbers, the upper bound of random integers, or the values themselves. By
    default numbers are normally distributed, and integers are 0 or 1.
    """

    shape: tuple[int, ...]
    dtype: Type = Type.F32
    layout: Layout = "contiguous"
    values: tuple[float, float] | int | Array | None = field(default=None, compare=False)

    def draw(self, rng: np.random.Generator) -> Array:
        """Draw values, rounded to the type, in float64 (or int64)."""
        if isinstance(self.values, np.ndarray):
            drawn: Array = self.values
        elif self.dtype in dtypes.INTEGERS:
            drawn = rng.integers(0, 2 if self.values is None else max(int(self.values), 1), self.shape)  # type: ignore[arg-type]
        elif self.values is None:
            drawn = rng.standard_normal(self.shape)
        else:
            drawn = rng.uniform(*self.values, self.shape)  # type: ignore[misc]
        if self.dtype in dtypes.INTEGERS:
            return drawn.astype(np.int64)
        if dtypes.has_numpy(self.dtype):
            return drawn.astype(dtypes.numpy_dtype(self.dtype)).astype(np.float64)
        rounded = ggml.dequantize(ggml.quantize(drawn.astype(np.float32), self.dtype), self.dtype, drawn.shape)
        return np.asarray(rounded, np.float64)

    def tensor(self, ctx: ggml.Context) -> tuple[ggml.Tensor, ggml.Tensor]:
        """Return the operand, and the input tensor behind it."""
        shape = list(self.shape)
        if self.layout == "gaps":
            shape[-1] += dtypes.block_size(self.dtype)
            base = ctx.new_tensor(self.dtype, shape)
            return ggml.view(base, self.shape, strides=base.nb[: base.ndim][::-1]), base
        if self.layout == "contiguous":
            base = ctx.new_tensor(self.dtype, shape)
            return base, base
        axes = self._axes()
        base = ctx.new_tensor(self.dtype, [shape[axis] for axis in axes])
        return ggml.permute(base, [axes.index(axis) for axis in range(len(axes))]), base

    def _axes(self) -> list[int]:
        """Return the axes in the order of memory."""
        axes = list(range(len(self.shape)))
        if isinstance(self.layout, tuple):
            return list(self.layout)
        i = -1 if self.layout == "transposed" else -2
        axes[i], axes[i - 1] = axes[i - 1], axes[i]
        return axes

    def store(self, base: ggml.Tensor, values: Array) -> None:
        """Write ``values`` to the memory that the operand shows."""
        if self.layout == "gaps":
            filler = 0.0 if self.dtype in dtypes.INTEGERS or not dtypes.has_numpy(self.dtype) else np.nan
            stored = np.full(base.shape, filler, np.float64)
            stored[..., : self.shape[-1]] = values
            values = stored
        elif self.layout != "contiguous":
            values = np.transpose(values, self._axes())
        base.set(values.astype(np.int64) if self.dtype in dtypes.INTEGERS else values)

    def __str__(self) -> str:
        return f"{self.dtype.name}{list(self.shape)}" + ("" if self.layout == "contiguous" else f":{self.layout}")


@dataclass(frozen=True)
class Case:
    """One call: its arguments by name, with an :class:`In` for each tensor."""

    op: str
    arguments: Mapping[str, Any]
    tolerance: float | None = None

    def operands(self) -> dict[str, In]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, In)}

    def allowed(self, result: Type, devices: Sequence[str] = ()) -> float:
        """Return the allowed relative error: the largest of the types involved, or of the rounding of ``devices``."""
        rounding = self._cuda_rounding() if any(has_cuda_kernels(ggml.device(name)) for name in devices) else 0.0
        return max(self._by_types(result), rounding)

    def _cuda_rounding(self) -> float:
        """Return the relative error that CUDA's kernels document, beyond that of other backends.

        - cuBLAS rounds F32 operands to TF32, with 10 bits after the first, unless the accuracy of F32 is requested.
        - Weights multiply activations of 8 bits. Offsets of blocks multiply the sums of activations before that
          rounding. The two parts of a product then differ in their rounding, which does not cancel.
        - ggml compiles them with ``-use_fast_math``: the error of sines and cosines grows with the angle.
        """
        if self.op == "out_prod":
            return 0.0 if self.arguments.get("prec") is Prec.F32 else 2.0**-10
        if self.op in _PRODUCTS and any(spec.dtype in _WITH_OFFSETS for spec in self.operands().values()):
            return 5e-2
        return 5e-4 if self.op.startswith("rope") else 0.0

    def _by_types(self, result: Type) -> float:
        if self.tolerance is not None:
            return self.tolerance
        types = {result, *(spec.dtype for spec in self.operands().values())} - dtypes.INTEGERS
        return max((TOLERANCE.get(t, _QUANTIZED) for t in types), default=0.0)

    def want(self, values: Mapping[str, Array]) -> Array:
        """Compute the reference for operands with these values."""
        function = REFERENCE.get(self.op) or REFERENCE[self.op.removesuffix("_inplace")]
        return np.asarray(function(**{**self.arguments, **values}))

    def build(self, ctx: ggml.Context) -> tuple[ggml.Tensor, dict[str, ggml.Tensor]]:
        """Return the result, and the input tensors behind the operands.

        An operation in place gets a copy of its first operand, so that the input stays.
        """
        tensors, inputs = {}, {}
        for i, (name, spec) in enumerate(self.operands().items()):
            tensors[name], inputs[name] = spec.tensor(ctx)
            if i == 0 and self.op.endswith("_inplace"):
                tensors[name] = ggml.cont(tensors[name])
        extra = {} if tensors else {"ctx": ctx}
        return getattr(ggml, self.op)(**{**self.arguments, **tensors, **extra}), inputs

    def run(self, devices: tuple[str, ...], rng: np.random.Generator) -> tuple[Array, Array, float]:
        """Return the result on ``devices``, the reference, and the allowed relative error."""
        values = {name: spec.draw(rng) for name, spec in self.operands().items()}
        with ggml.Context() as ctx, ggml.Scheduler(devices) as scheduler:
            result, inputs = self.build(ctx)
            with ggml.Graph(result) as graph:
                try:
                    scheduler.alloc(graph)
                except ggml.UnsupportedOpError:  # a node in place must be on the device of its operand
                    if result.ptr.view_src in {base.ptr for base in inputs.values()}:
                        return self.run(("CPU",), rng)  # the operand is an input, which is on a GPU
                    for node in graph.nodes:
                        if node == result or not node.ptr.view_src:
                            scheduler.place(node, scheduler.backends[-1])
                    scheduler.alloc(graph)
                for name, base in inputs.items():
                    self.operands()[name].store(base, values[name])
                scheduler.compute(graph)
                got, want = result.numpy(), self.want(values)
                assert got.shape == result.shape
                if self.op in UNORDERED:
                    got, want = np.sort(got, -1), np.sort(want, -1)
                return got, want, self.allowed(result.dtype, devices)

    def __str__(self) -> str:
        shown = []
        for name, value in self.arguments.items():
            value = getattr(value, "name", getattr(value, "__name__", value))  # without addresses, which differ
            shown.append(f"{name}={value}" if value is not None else "")
        return f"{self.op}({','.join(s for s in shown if s)})".replace(" ", "")


def case(op: str, tolerance: float | None = None, /, **arguments: Any) -> Case:
    """Return a case of ``op``. Operands are :class:`In`; other arguments are passed on."""
    return Case(op, arguments, tolerance)


def _collect() -> tuple[list[Case], dict[str, Callable[..., Any]]]:
    cases: list[Case] = []
    wrong: dict[str, Callable[..., Any]] = {}
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        wrong |= getattr(module, "WRONG", {})
        for one in module.CASES:
            cases.append(one)
            twin = f"{one.op}_inplace"
            first = next(iter(one.operands().values()), None)
            if twin not in ggml.ops.__all__ or first is None or first.layout != "contiguous":
                continue
            if first.dtype not in dtypes.INTEGERS:  # integers may be row numbers, which cannot be written in place
                cases.append(replace(one, op=twin))
    return cases, wrong


CASES, WRONG = _collect()
