"""Dry runs: tensors with a device but without memory, to measure the memory that a graph would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ggml_cffi import c
from ggml_cffi.core.buffer import Buffer, BufferType
from ggml_cffi.core.context import Context, pack
from ggml_cffi.core.device import Device
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import BackendBufferUsage as Usage

_NOWHERE = c.ffi.cast("void *", 1 << 12)  # any address except null, since nothing reads or writes there


class DryRunContext(Context):
    """A context whose tensors get no memory, but belong to the device on which :meth:`alloc` puts them.

    That is enough for :meth:`Scheduler.reserve_size`, but the tensors cannot be computed.
    """

    __slots__ = ("_places", "taken")
    readable = False

    def __init__(self, *, precision: str = "default", devices: Iterable[Device] | None = None) -> None:
        super().__init__(precision=precision, devices=devices)
        self._places: dict[tuple[BufferType, Usage], Buffer] = {}
        self.taken: Counter[BufferType] = Counter()
        """Bytes of the buffers that a real context would have made, by buffer type."""

    def _alloc(self, kind: BufferType, tensors: Iterable[Tensor] | None, usage: Usage) -> list[Buffer]:
        chosen = self._unallocated() if tensors is None else list(tensors)
        self.taken[kind] += sum(size for _, size in pack(chosen, kind))
        if (kind, usage) not in self._places:
            self._places[kind, usage] = Buffer.empty(kind, usage=usage)
            self.adopt(self._places[kind, usage])
        for tensor in chosen:
            self.put(tensor, self._places[kind, usage], 0)
        return [self._places[kind, usage]]

    def put(self, tensor: Tensor, buffer: Buffer, address: Any, *, owner: Context | None = None) -> None:
        """Assign ``tensor`` to ``buffer``, with a placeholder for its address."""
        self._check_allocatable(tensor)
        tensor.ptr.buffer, tensor.ptr.data = buffer.ptr, _NOWHERE
