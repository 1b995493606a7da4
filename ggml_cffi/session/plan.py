"""What a session would take, and where, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ggml_cffi.core import text as _text
from ggml_cffi.core.device import Device
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.files.sources import StoredTensor
from ggml_cffi.session.session import Compiled, Session


@dataclass(frozen=True)
class DeviceNeed:
    """What one device would hold, in bytes."""

    device: str
    weight_bytes: int
    """Of the session's own tensors."""
    compute_bytes: int
    """Of inputs and intermediate results."""
    free: int
    """What the device says that it has free."""

    @property
    def total(self) -> int:
        """All that would be on the device."""
        return self.weight_bytes + self.compute_bytes

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.total <= self.free


@dataclass(frozen=True)
class SessionPlan:
    """What each device would hold. Printed, a table. Made by :func:`plan`."""

    needs: tuple[DeviceNeed, ...]
    """The devices in order, the CPU last."""

    @property
    def fits(self) -> bool:
        """Whether every device has room."""
        return all(need.fits for need in self.needs)

    def table(self) -> str:
        """The devices, with bytes of each kind."""
        rows = [("device", "weights", "compute", "total", "free", "fits")]
        for need in self.needs:
            sizes = [_text.size(n) for n in (need.weight_bytes, need.compute_bytes, need.total, need.free)]
            fits = "yes" if need.fits else f"no: {_text.size(need.total - need.free)} too few"
            rows.append((need.device, *sizes, fits))  # type: ignore[arg-type]
        return _text.table(rows, right=range(1, 5))

    def __str__(self) -> str:
        return self.table()


def plan(
    make: Callable[[Session], Compiled], *args: Any, devices: Iterable[Device | str] | None = None, **kwargs: Any
) -> SessionPlan:
    """What a session with its weights, and a run of its function, would take on each device. Nothing is allocated.

    Parameters
    ----------
    make
        Called with a session, for which it makes weights and compiles a function, which it returns. What the session
        is given is not copied anywhere: of files only the headers are read.
    args, kwargs
        What the function would be called with.
    devices
        As for :class:`Session`.

    Raises
    ------
    TypeError
        If ``make`` returns something else.
    Exception
        What ``make`` and the function raise.

    Examples
    --------
    >>> def make(session):
    ...     w = session.weight(np.zeros((1024, 1024), np.float32))
    ...     return session.compile(lambda x: x @ w.T)
    >>> cpu = plan(make, np.zeros((2, 1024), np.float32), devices=["CPU"]).needs[-1]
    >>> cpu.weight_bytes
    4194304
    """
    with _Planned(devices) as session:
        made = make(session)
        if not isinstance(made, Compiled) or made.session is not session:
            raise TypeError(f"make returned {made!r}: a function that the session has compiled is needed")
        sizes = made.reserve_size(*args, **kwargs)
        return SessionPlan(
            tuple(
                DeviceNeed(b.name, session.taken(b.buffer_type), sizes[b.device], b.device.memory().free)
                for b in session.backends
            )
        )


class _Planned(Session):
    """A session whose tensors have a place, and no memory."""

    def __init__(self, devices: Iterable[Device | str] | None) -> None:
        super().__init__(devices)
        self._weights.close()
        self._weights = self._sketch = DryRunContext()

    def taken(self, kind: Any) -> int:
        """Bytes of the session's own tensors in some kind of memory."""
        return self._sketch.taken[kind]

    def _fill(self, t: Tensor, source: StoredTensor | npt.NDArray[Any]) -> None:
        """Nothing: there is no memory."""
