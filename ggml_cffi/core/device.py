"""Devices: the CPU and GPUs of this machine, and the devices of remote servers.

>>> import ggml_cffi
>>> for device in ggml_cffi.devices():
...     print(device.name, device.description, device.memory().free)  # doctest: +SKIP
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.device_choice import default_gpus, find, other_views, pci_address, views_by_backend
from ggml_cffi.core.locks import DeviceLock, Lock, RemoteLock
from ggml_cffi.enums import BackendDevType
from ggml_cffi.errors import GgmlError

DeviceType = BackendDevType

#: ggml's registry and its Vulkan device table have no locks of their own.
registry_lock = threading.RLock()

_transfer_locks: dict[Any, Lock] = {}


class _Remote(NamedTuple):
    name: str
    description: str
    lock: RemoteLock


_remote: dict[Any, _Remote] = {}  # by C pointer; entries of a lost server stay, as its devices do in C


def device_lock(pointer: Any) -> Lock:
    """Return the lock of the device at a C pointer.

    Backends of one GPU share a staging buffer for transfers, which ggml does not guard. Remote devices of one server
    share its lock, which raises if the server is lost. Two plug-ins that reach one card share nothing: each of the two
    devices has its own lock, and the driver orders their work.
    """
    lock = _transfer_locks.get(pointer)
    if lock is None:
        with registry_lock:
            lock = _transfer_locks.setdefault(pointer, DeviceLock())
    return lock


_pci_ids: dict[Any, str | None] = {}  # by C pointer

_ORDER = {DeviceType.GPU: 0, DeviceType.IGPU: 1, DeviceType.META: 2, DeviceType.ACCEL: 3, DeviceType.CPU: 4}


class Memory(NamedTuple):
    """Memory of a device, in bytes."""

    free: int
    total: int


@dataclass(frozen=True)
class Capabilities:
    """Abilities of a device besides computing. C: ``ggml_backend_dev_caps``."""

    asynchronous: bool
    """True if it computes asynchronously, while the caller continues."""
    host_buffer: bool
    """True if it has pinned host memory, which transfers faster."""
    buffer_from_host_ptr: bool
    """True if it can use memory that the host allocated."""
    events: bool
    """True if it has events: its backends can wait for one another without the host."""
    mmap_support: bool
    """True if it can load weights from a file mapping."""


class Device:
    """One device of ggml's registry. Devices are never freed; two objects for one device are equal."""

    __slots__ = ("name", "ptr")

    def __init__(self, pointer: Any) -> None:
        self.ptr = pointer
        """The C pointer (``ggml_backend_dev_t``)."""
        remote = _remote.get(pointer)
        self.name: str = remote.name if remote else c.ffi.string(c.ggml_backend_dev_name(pointer)).decode()
        """ggml's name, such as ``"Vulkan0"`` or ``"CPU"``; a remote device's is ``"rpc://host:port"``."""

    @property
    def description(self) -> str:
        """The hardware's name, which is unknown for a remote device. C: ``ggml_backend_dev_description``."""
        if self.is_remote:
            return _remote[self.ptr].description
        text: bytes = c.ffi.string(c.ggml_backend_dev_description(self.ptr))
        return text.decode("utf-8", "replace").strip()

    @property
    def type(self) -> DeviceType:
        """The device type. Every remote device counts as a GPU. C: ``ggml_backend_dev_type``."""
        return DeviceType(c.ggml_backend_dev_type(self.ptr))

    @property
    def backend_name(self) -> str:
        """Name of the part of ggml that drives it, such as ``"Vulkan"``. C: ``ggml_backend_reg_name``."""
        if self.is_remote:
            return "RPC"
        name: bytes = c.ffi.string(c.ggml_backend_reg_name(c.ggml_backend_dev_backend_reg(self.ptr)))
        return name.decode()

    @property
    def is_cpu(self) -> bool:
        """True for the CPU."""
        return self.type is DeviceType.CPU

    @property
    def is_gpu(self) -> bool:
        """True for a GPU, integrated or not. Helpers of the CPU (``ACCEL``), such as BLAS, are none."""
        return self.type in (DeviceType.GPU, DeviceType.IGPU)

    @property
    def is_remote(self) -> bool:
        """True for a device of a server; see :mod:`ggml_cffi.rpc`."""
        return self.ptr in _remote

    def memory(self) -> Memory:
        """Return the free and total memory now, in bytes. Two logical devices of one GPU both report the whole GPU.

        C: ``ggml_backend_dev_memory``.
        """
        free, total = c.ffi.new("size_t *"), c.ffi.new("size_t *")
        with self.guard():
            c.ggml_backend_dev_memory(self.ptr, free, total)
        return Memory(min(free[0], total[0]), total[0])  # some drivers report more free than there is

    @property
    def pci_id(self) -> str | None:
        """PCI address such as ``"0000:c1:00.0"``, None without one."""
        if self.ptr not in _pci_ids:  # C asks the driver for the memory too, each time
            text = self._props().device_id
            _pci_ids[self.ptr] = c.ffi.string(text).decode() if text else None
        return _pci_ids[self.ptr]

    @property
    def capabilities(self) -> Capabilities:
        """Abilities besides computing."""
        props = self._props()  # owns the memory of caps
        caps = props.caps
        names = ("async", "host_buffer", "buffer_from_host_ptr", "events", "mmap_support")
        return Capabilities(*(bool(getattr(caps, name)) for name in names))

    def _props(self) -> c.CData:
        props = c.ffi.new("struct ggml_backend_dev_props *")
        with self.guard():
            c.ggml_backend_dev_get_props(self.ptr, props)
        return props

    def guard(self) -> AbstractContextManager[Any]:
        """Return the lock to hold around driver calls: the registry's, or for a remote device its server's."""
        return _remote[self.ptr].lock if self.is_remote else registry_lock

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and bool(self.ptr == other.ptr)

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __repr__(self) -> str:
        return f"<Device {self.name}: {self.description}>"


#: A device: the object, a text that :func:`device` finds, or its position in :func:`devices`.
DeviceLike = Device | str | int
#: One device, or several, the preferred first.
DevicesLike = DeviceLike | Iterable[DeviceLike]


def device_list(devices: DevicesLike) -> list[DeviceLike]:
    """Return one device, or several, as a list. No device is looked for."""
    return [devices] if isinstance(devices, DeviceLike) else list(devices)


def device_name(which: DeviceLike) -> str:
    """Return the name of a device. A name is returned as it is: it may be a device of another process."""
    return which if isinstance(which, str) else device(which).name


def check_process(found: Device) -> None:
    """Raise ``GgmlError`` if ``found`` is lost, or its driver was opened before this process was forked."""
    if found.is_remote:
        _remote[found.ptr].lock.check()
    elif not found.is_cpu and library.inherited():
        raise GgmlError(
            f"{found.name} cannot be used in a forked process whose parent used the driver: "
            'start processes with multiprocessing.get_context("spawn")'
        )


def load_backends(names: Collection[str]) -> None:
    """Load some of ggml's plug-ins, and no others, instead of all of them when devices are first listed.

    Parameters
    ----------
    names
        Names of plug-ins, such as ``["vulkan", "rpc"]``; none for the CPU alone. They replace those of the environment
        variable ``GGML_CFFI_BACKENDS``, which restricts those of child processes too.

    Raises
    ------
    ValueError
        If there is no such plug-in. The message lists those that there are.
    LibraryNotFoundError
        If a plug-in cannot be loaded. The message has the reason.
    GgmlError
        If plug-ins have been loaded already.

    C: ``ggml_backend_load``.
    """
    if isinstance(names, str):
        raise TypeError("names is a sequence: put the one name in a list")
    with registry_lock:
        library.load_plugins(names)


def devices(*, all: bool = False) -> list[Device]:  # noqa: A002 - the function is not used here
    """Return the devices: GPUs in the driver's order, then connected remote devices, the CPU last.

    A card that several backends show is one device, that of the best backend: CUDA, then others such as HIP and SYCL,
    then Vulkan. The first call loads ggml's plug-ins; see :func:`load_backends`. Without one, only the CPU and
    connected remote devices are listed.

    Parameters
    ----------
    all
        True to list such a card once for each backend. Each of these devices can be used by its name.

    Raises
    ------
    ValueError
        If the environment variable ``GGML_CFFI_BACKENDS`` names a plug-in that is not there.
    """
    found, views = _listed()
    return found if all else [d for d in found if d not in views]


def same_cards() -> dict[Device, Device]:
    """Return the devices that only ``devices(all=True)`` lists, each with the device of its card to use instead."""
    return _listed()[1]


def _listed() -> tuple[list[Device], dict[Device, Device]]:
    """Return all devices, and :func:`same_cards`."""
    with registry_lock:
        library.load_plugins()
        found = [Device(c.ggml_backend_dev_get(i)) for i in range(c.ggml_backend_dev_count())]
        found += [Device(pointer) for pointer, remote in _remote.items() if remote.lock.usable]
    found.sort(key=lambda d: _ORDER[d.type])
    return found, other_views(found)


def gpus() -> list[Device]:
    """Return every GPU in the order of :func:`devices`: the default wherever no devices are named.

    Remote devices that were connected are among them. Integrated GPUs are returned if there are no others, since their
    memory is the host's. The CPU and its helpers (``ACCEL``, such as BLAS) are not: a helper takes part if it is named.
    """
    return default_gpus(devices())


def other_backends(chosen: Sequence[DeviceLike] | None) -> list[list[Device]]:
    """Return the same GPUs as devices of each other backend that shows all of them, such as Vulkan's beside CUDA's.

    Parameters
    ----------
    chosen
        Devices as a caller gives them, the CPU last or not at all; None for :func:`gpus`. A position, a PCI id and a
        part of the hardware's name mean a card. A name of ggml's and a :class:`Device` mean a backend too, so that
        there are no others.
    """
    every, views = _listed()
    names = {d.name.lower() for d in every if not d.is_cpu}
    if chosen is not None and any(not isinstance(d, str | int) or str(d).lower() in names for d in chosen):
        return []
    found = gpus() if chosen is None else [device(which) for which in chosen]
    cpu = [d for d in found[-1:] if d.is_cpu]
    return [own + cpu for own in views_by_backend(found[: len(found) - len(cpu)], views)]


def add_remote(pointer: Any, name: str, description: str, lock: RemoteLock) -> None:
    """Add a device of a server to :func:`devices`, which lists it until the server is lost or disconnected."""
    with registry_lock:
        _remote[pointer] = _Remote(name, description, lock)
        _transfer_locks[pointer] = lock


def find_remote_with(find: Callable[[str], Device]) -> None:
    """Register the function that finds a remote device by its name, which has a colon (``rpc://host:port``)."""
    global _find_remote
    _find_remote = find


def _no_remote(name: str) -> Device:
    raise ValueError(f"there is no device {name!r}: import ggml_cffi, which registers remote devices")


_find_remote = _no_remote


def devices_of(lock: RemoteLock) -> list[Device]:
    """Return the devices of one server, in its order."""
    with registry_lock:
        return [Device(pointer) for pointer, remote in _remote.items() if remote.lock is lock]


# Devices in the names of other libraries: kinds of hardware or of drivers, alone or with a number.
_FOREIGN = re.compile(
    r"(auto|cpu|cuda|directml|gpu|hip|ipu|meta|metal|mps|npu|opencl|rocm|sycl|tpu|vulkan|xla|xpu)(:\d{1,3})?", re.I
)


def is_remote_name(name: str) -> bool:
    """Return whether ``name`` is a remote device's (``host:port``), not a PCI id or another library's (``cuda:0``)."""
    return ":" in name and not _FOREIGN.fullmatch(name) and pci_address(name) is None


def device(which: DeviceLike) -> Device:
    """Return the device of a name, a PCI id, a part of its hardware's name, or a position. Case does not matter.

    Parameters
    ----------
    which
        One of these:

        - ggml's name, such as ``"Vulkan0"``, of any device of ``devices(all=True)``;
        - a PCI id, ``"0000:41:00.0"`` or ``"41:00.0"``;
        - a part of the hardware's name, such as ``"4090"``, if it fits one device only;
        - a position in :func:`devices`, as a number or as text;
        - ``"rpc://host:port"`` (or ``"host:port"``), the first device of a server there, and ``"rpc://host:port/1"``
          its second. The server is connected if it is not yet; see :func:`ggml_cffi.rpc.connect`;
        - a :class:`Device`, which is returned.

    Raises
    ------
    ValueError
        If there is no such device, or several fit. The message lists the devices of this machine, or those that fit.
    RemoteError
        If there is no server, or it cannot be used.
    """
    if isinstance(which, Device):
        return which
    if isinstance(which, str) and is_remote_name(which):
        return _find_remote(which)
    # Finding the CPU must not load a GPU driver.
    if isinstance(which, str) and which.upper() == "CPU":
        with registry_lock:
            return Device(c.ggml_backend_dev_by_type(DeviceType.CPU))
    if not isinstance(which, str | int):
        raise TypeError(f"a device is given by its name, position or Device object, not {which!r}")
    every, views = _listed()
    known = [d for d in every if d not in views]
    position = int(which) if isinstance(which, int) or which.isdecimal() else -1
    if 0 <= position < len(known):
        return known[position]
    foreign = isinstance(which, str) and _FOREIGN.fullmatch(which)
    if isinstance(which, str) and not foreign and (found := find(which, known, list(views))):
        return found
    names = ", ".join(f"{d.name} ({d.description})" for d in every)
    hint = ": use these names, or name no device for every GPU" if foreign else ""
    raise ValueError(f"there is no device {which!r}; this machine has {names}{hint}; {library.ADVICE}")
