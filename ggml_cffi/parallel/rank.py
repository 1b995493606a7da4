"""One device's part of a computation that several share."""

from __future__ import annotations

from dataclasses import dataclass

from ggml_cffi import c, ops
from ggml_cffi.core.context import Context
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type

#: Partial sums up to so many bytes are computed straight into the memory that the devices share, and all of them are
#: read from there. Of larger ones, the device keeps what it computed and shares a copy.
DIRECT = 64 << 10


@dataclass(frozen=True)
class AllGather:
    """A result of which each device has a part; see :meth:`Rank.all_gather`."""

    part: Tensor
    axis: int


@dataclass
class AllReduce:
    """Where the devices wait for one another: each shares its ``partial`` and reads the others'."""

    partial: Tensor
    slots: list[Tensor]
    """In memory that all devices share: the partial sum of each."""
    keeps_partial: bool
    """Whether the device keeps its own."""


class Rank:
    """One device among several that run the same function, each on its part of the weights.

    It can be used as an index: ``weights[rank]``.
    """

    def __init__(self, index: int, n: int, half_above: int | None = None) -> None:
        self.index = index
        """Number of the device, from 0."""
        self.n = n
        """Number of devices."""
        self.context = Context()
        """Holds what is traced."""
        self.all_reduces: list[AllReduce] = []  # over devices, in order
        self._half_above = half_above

    def __index__(self) -> int:
        return self.index

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum over all devices of what each has computed; all have it.

        Parameters
        ----------
        partial
            This device's, contiguous F32. Others' must have the same shape.

        Raises
        ------
        ValueError
            If it is not so, or belongs to another rank.

        Notes
        -----
        What follows waits for all devices: a run has one step more than sums.
        """
        if not isinstance(partial, Tensor):
            raise TypeError(f"all_reduce takes a tensor, not {type(partial).__name__}")
        if partial.dtype is not Type.F32 or not partial.is_contiguous or not partial.size:
            raise ValueError(f"all_reduce takes contiguous F32 with elements (use cont or cast), not {partial!r}")
        if self.n == 1:
            return partial
        half = self._half_above is not None and partial.nbytes > self._half_above
        keeps = half or partial.nbytes > DIRECT
        slots = [self.context.new_tensor(Type.F16 if half else Type.F32, partial.shape) for _ in range(self.n)]
        for r, slot in enumerate(slots):
            slot.name = f"sum {len(self.all_reduces)} of {r}"
        self.all_reduces.append(AllReduce(partial, slots, keeps))
        parts = [*slots[: self.index], partial, *slots[self.index + 1 :]] if keeps else list(slots)
        if half:  # ggml adds halves to singles, not singles to halves
            parts.insert(0, parts.pop(self.index))
        # Else in one order on all devices, so that they have the same to the last bit.
        total = parts[0]
        for part in parts[1:]:
            # A sum with halves is one that the GPUs have and the CPU has not, so that ops.add refuses it.
            total = self.context.build(c.ggml_add, partial.ndim, total.ptr, part.ptr) if half else ops.add(total, part)
        return total

    def all_gather(self, part: Tensor, axis: int = -1) -> AllGather:
        """As a result of the function: the devices' parts one after another along ``axis``.

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
