"""A rank: one device's position in a tensor-parallel group, and the operations available there."""

from __future__ import annotations

from dataclasses import dataclass

from ggml_cffi import c, ops
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type

#: Largest partial sum, in bytes, that a device computes directly in shared memory, where all devices read it. For a
#: larger one, the device keeps its own sum and shares a copy.
DIRECT = 64 << 10


@dataclass(frozen=True)
class AllGather:
    """A result of which each device has a part; see :meth:`Rank.all_gather`."""

    part: Tensor
    axis: int


@dataclass
class AllReduce:
    """A sum over devices: each device shares its ``partial`` and reads the others'."""

    partial: Tensor
    slots: list[Tensor]
    """The partial sum of each device, in memory that all devices share."""
    keeps_partial: bool
    """True if the device keeps its own partial sum and shares a copy."""


class Rank:
    """One device among several that run the same function, each on its part of the weights.

    A rank can be used as an index: ``weights[rank]``.
    """

    def __init__(self, index: int, n: int, half_above: int | None = None, context: Context | None = None) -> None:
        self.index = index
        """Number of the device, from 0."""
        self.n = n
        """Number of devices."""
        self.context = context or Context()
        """Context of the traced tensors."""
        self.all_reduces: list[AllReduce] = []
        """The sums over devices, in order."""
        self.reads_peers = False
        """True if the device reads partial sums in the memory of the others, in which it then shares large ones too."""
        self._half_above = half_above

    def __index__(self) -> int:
        return self.index

    def all_reduce(self, partial: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the sum of all devices' tensors, the same on every device.

        Parameters
        ----------
        partial
            This device's part, contiguous F32. The other devices' parts have the same shape.
        residual
            Tensor that is added once, F32 of the same shape, with equal values on every device. The first device adds
            it to its part, because GPUs add the result of a matrix-vector product without a step of its own.

        Raises
        ------
        ValueError
            If the part is not contiguous F32 with elements, or belongs to another rank, or the residual has another
            shape.

        Notes
        -----
        The nodes after a sum wait for all devices, so a program has one step more than it has sums.
        """
        if not isinstance(partial, Tensor):
            raise TypeError(f"all_reduce takes a tensor, not {type(partial).__name__}")
        if partial.dtype is not Type.F32 or not partial.is_contiguous or not partial.size:
            raise ValueError(f"all_reduce takes contiguous F32 with elements (use cont or cast), not {partial!r}")
        if residual is not None and not isinstance(residual, Tensor):
            raise TypeError(f"all_reduce takes a tensor as residual, not {type(residual).__name__}")
        if residual is not None and (residual.dtype is not Type.F32 or residual.shape != partial.shape):
            raise ValueError(f"all_reduce takes a residual of F32 and the shape of the part, not {residual!r}")
        if self.n == 1:
            return partial if residual is None else ops.add(residual, partial)
        half = self._half_above is not None and partial.nbytes > self._half_above
        if residual is not None and not half and self.index == 0:
            partial = ops.add(residual, partial)
        keeps = half or (partial.nbytes > DIRECT and not self.reads_peers)
        slots = [self.context.new_tensor(Type.F16 if half else Type.F32, partial.shape) for _ in range(self.n)]
        for r, slot in enumerate(slots):
            slot.name = f"sum {len(self.all_reduces)} of {r}"
        self.all_reduces.append(AllReduce(partial, slots, keeps))
        parts = [*slots[: self.index], partial, *slots[self.index + 1 :]] if keeps else list(slots)
        if half:  # ggml adds F16 to F32, not F32 to F16
            parts.insert(0, parts.pop(self.index))
        # Without F16, all devices add in the same order, so that their results are bitwise equal.
        total = parts[0]
        for part in parts[1:]:
            # ops.add refuses F16 and F32, because the CPU cannot add them. GPUs can.
            total = self.context.build(c.ggml_add, partial.ndim, total.ptr, part.ptr) if half else ops.add(total, part)
        # A partial sum of F16 has no room for the residual's digits.
        return ops.add(residual, total) if half and residual is not None else total

    def all_gather(self, part: Tensor, axis: int = -1) -> AllGather:
        """Return a result of the function: the parts of all devices, joined along ``axis``.

        Raises
        ------
        ValueError
            If there is no such axis.
        """
        if not isinstance(part, Tensor):
            raise TypeError(f"all_gather takes a tensor, not {type(part).__name__}")
        if not -part.ndim <= axis < part.ndim:
            raise ValueError(f"{part!r} has no axis {axis}")
        return AllGather(part, axis)
