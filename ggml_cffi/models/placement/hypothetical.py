"""Hypothetical devices, for plans for another machine: a name and a number of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ggml_cffi.core import text
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device, DeviceLike, DeviceType, Memory
from ggml_cffi.core.device import device as find_device

#: A size with a unit, after a name or without one. A remote device, ``host:port``, has no unit.
_HYPOTHETICAL = re.compile(r"(?:(?P<name>[^:]+):)?(?P<size>[\d.+-]+[A-Za-z]+)")


class HypotheticalDevice(Device):
    """A device of a machine that is not this one. Its tensors are described in terms of the CPU's memory.

    It supports every operation and every type, and reads host memory.

    Parameters
    ----------
    name
        Its name in the plan. With the description of a device that was calibrated, plans estimate its speed.
    free
        Bytes of memory, all of them free.
    is_cpu
        True for the CPU.
    """

    __slots__ = ("_free", "_type")

    def __init__(self, name: str, free: int, *, is_cpu: bool = False) -> None:
        super().__init__(find_device("CPU").ptr)
        self.name = name
        self._free, self._type = free, DeviceType.CPU if is_cpu else DeviceType.GPU

    @property
    def description(self) -> str:
        """The name."""
        return self.name

    @property
    def type(self) -> DeviceType:
        """``CPU`` or ``GPU``."""
        return self._type

    def memory(self) -> Memory:
        """Return the given memory."""
        return Memory(self._free, self._free)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def is_hypothetical(backend: Backend) -> bool:
    """Return whether a backend is for a hypothetical device."""
    return isinstance(backend.device, HypotheticalDevice)


def parse_devices(chosen: Sequence[DeviceLike] | None) -> list[HypotheticalDevice]:
    """Return the hypothetical devices that ``chosen`` describes; none if it names devices of this machine.

    A device is a size, such as ``"24G"`` (GiB), or a name and a size, such as ``"CPU:64G"``. Without the CPU, the plan
    is for this machine's memory.

    Raises
    ------
    ValueError
        If a size has no known unit, the CPU is not last, or devices of this machine are among them.
    """
    if chosen is None:
        return []
    matches = [_HYPOTHETICAL.fullmatch(which.strip()) if isinstance(which, str) else None for which in chosen]
    if not any(matches):
        return []
    found: list[HypotheticalDevice] = []
    for which, match in zip(chosen, matches, strict=True):
        if match is None:
            raise ValueError(
                f"{getattr(which, 'name', which)!r} is no hypothetical device: a plan is for this machine's devices or "
                "for hypothetical ones such as '24G' or 'CPU:64G', not for both"
            )
        is_cpu = (match["name"] or "").upper() == "CPU"
        try:
            free = text.parse_size(match["size"])
        except ValueError as error:
            raise ValueError(f"device {which!r}: {error}") from None
        found.append(HypotheticalDevice(match["name"] or f"GPU{len(found)}", free, is_cpu=is_cpu))
    if any(device.is_cpu for device in found[:-1]):
        raise ValueError("the CPU comes last: it does the work that the devices before it cannot compute or hold")
    if not found[-1].is_cpu:
        found.append(HypotheticalDevice("CPU", find_device("CPU").memory().free, is_cpu=True))
    return found


def open_hypothetical(devices: Sequence[HypotheticalDevice]) -> list[Backend]:
    """Return backends that can measure, but not compute. No driver is opened."""
    return [Backend(device, n_threads=1 if device.is_cpu else None) for device in devices]


def refuse_hypothetical(chosen: Sequence[DeviceLike] | None) -> None:
    """Raise ValueError if devices to load a model onto are hypothetical."""
    if found := parse_devices(chosen):
        names = ", ".join(map(repr, chosen or found))
        raise ValueError(f"devices {names} are for plans only: name devices of this machine, or use models.plan")


@contextmanager
def stand_ins(backends: Sequence[Backend], *more: HypotheticalDevice) -> Iterator[list[Backend]]:
    """Yield hypothetical backends like ``backends``, with ``more`` before the CPU, the last, for plans."""
    devices = [HypotheticalDevice(b.name, b.device.memory().free, is_cpu=b.device.is_cpu) for b in backends]
    opened = open_hypothetical([*devices[:-1], *more, devices[-1]])
    try:
        yield opened
    finally:
        for backend in opened:
            backend.close()
