"""Choice among devices: cards that several backends show, the GPUs of the default, and the device of a name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from ggml_cffi.enums import BackendDevType

#: Ranks of backends for a card that several of them show, by ggml's names. Those that are not here come before Vulkan.
_RANKS = {"cuda": 0, "vulkan": 2, "opencl": 3, "webgpu": 3, "virtgpu": 3}
_OTHERS = 1

_GPUS = (BackendDevType.GPU, BackendDevType.IGPU)

# The domain may be missing. CUDA and Vulkan write it with four digits.
_PCI_ID = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-7])", re.I)
_SHORTEST_PART = 2  # characters of a product name


class Choosable(Protocol):
    """The properties of a :class:`~ggml_cffi.Device` that a choice depends on."""

    @property
    def name(self) -> str:
        """ggml's name."""

    @property
    def description(self) -> str:
        """The hardware's name."""

    @property
    def type(self) -> BackendDevType:
        """The device type."""

    @property
    def backend_name(self) -> str:
        """Name of the part of ggml that drives it."""

    @property
    def pci_id(self) -> str | None:
        """PCI address, None without one."""

    @property
    def is_remote(self) -> bool:
        """True for a device of a server."""


D = TypeVar("D", bound=Choosable)


def pci_address(text: str) -> str | None:
    """Return a PCI id in the form ``"0000:41:00.0"``, None if ``text`` is none.

    >>> pci_address("C1:00.0")
    '0000:c1:00.0'
    """
    found = _PCI_ID.fullmatch(text)
    if found is None:
        return None
    domain, bus, device, function = (int(part or "0", 16) for part in found.groups())
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def other_views(found: Sequence[D]) -> dict[D, D]:
    """Return the devices whose card a better backend shows too, each with the device to use in its place.

    Two devices of one backend are two devices, whatever their PCI ids: a backend may list a card several times on
    request. Remote devices, and devices without a PCI id, are no views of a card here.
    """
    local = [d for d in found if d.type in _GPUS and not d.is_remote]
    if len({d.backend_name for d in local}) < 2:
        return {}
    views: dict[D, D] = {}
    best: dict[str, D] = {}
    for d in sorted(local, key=lambda d: _RANKS.get(d.backend_name.lower(), _OTHERS)):
        address = pci_address(d.pci_id or "")
        if address and best.setdefault(address, d).backend_name != d.backend_name:
            views[d] = best[address]
    return views


def views_by_backend(cards: Sequence[D], views: Mapping[D, D]) -> list[list[D]]:
    """Return some cards as the devices of each other backend that shows all of them.

    Parameters
    ----------
    cards
        Devices of the best backend of each card.
    views
        The result of :func:`other_views`.
    """
    found: dict[str, dict[D, D]] = {}
    for view, card in views.items():
        found.setdefault(view.backend_name, {}).setdefault(card, view)
    return [[own[d] for d in cards] for own in found.values() if cards and all(d in own for d in cards)]


def default_gpus(found: Sequence[D]) -> list[D]:
    """Return the GPUs, and integrated GPUs only if there are no others: their memory is the host's."""
    return [d for d in found if d.type is BackendDevType.GPU] or [d for d in found if d.type is BackendDevType.IGPU]


def find(text: str, found: Sequence[D], by_name: Sequence[D] = ()) -> D | None:
    """Return the device that ``text`` names, None if there is none.

    Parameters
    ----------
    text
        A name of ggml's in any case, a remote device's with ``rpc://`` or without; a PCI id, with its domain or
        without; or a part of the hardware's name, of two characters or more.
    found
        The devices.
    by_name
        Further devices, which only their names find.

    Raises
    ------
    ValueError
        If a PCI id or a part of a name fits several devices. The message lists them.
    """
    low = text.lower()
    for d in (*found, *by_name):
        if d.name.lower() in (low, f"rpc://{low}"):
            return d
    if address := pci_address(text):
        fitting = [d for d in found if not d.is_remote and pci_address(d.pci_id or "") == address]
    elif len(low) >= _SHORTEST_PART:
        fitting = [d for d in found if low in d.description.lower()]
    else:
        return None
    if len(fitting) > 1:
        names = ", ".join(f"{d.name} ({d.description}{f', {d.pci_id}' if d.pci_id else ''})" for d in fitting)
        raise ValueError(f"{text!r} fits several devices: {names}; use one of these names")
    return fitting[0] if fitting else None
