"""Plans of sessions: the bytes that a session would take on each device, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ggml_cffi.core import text as _text
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import DevicesLike
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.files.sources import StoredTensor
from ggml_cffi.session.compiled import CompiledFunction
from ggml_cffi.session.session import Session


@dataclass(frozen=True)
class SessionDevicePlan:
    """Bytes that a session would take on one device."""

    device: str
    weight_bytes: int
    """Bytes of the session's own tensors: weights, caches and states."""
    compute_bytes: int
    """Bytes of inputs and intermediate tensors."""
    free: int
    """Bytes that are free now, as the device reports."""

    @property
    def total(self) -> int:
        """All bytes that the session would take on the device."""
        return self.weight_bytes + self.compute_bytes

    @property
    def fits(self) -> bool:
        """True if the device has enough free memory."""
        return self.total <= self.free


@dataclass(frozen=True)
class SessionPlan:
    """Bytes that a session would take on each device, as :func:`plan` returns them. ``str(plan)`` is a table."""

    devices: tuple[SessionDevicePlan, ...]
    """The devices in order, the CPU last."""

    @property
    def fits(self) -> bool:
        """True if every device has enough free memory."""
        return all(device.fits for device in self.devices)

    def table(self) -> str:
        """Return a table of the devices and their bytes."""
        rows = [("device", "weights", "compute", "total", "free", "fits")]
        for d in self.devices:
            sizes = [_text.size(n) for n in (d.weight_bytes, d.compute_bytes, d.total, d.free)]
            fits = "yes" if d.fits else f"no: {_text.size(d.total - d.free)} too few"
            rows.append((d.device, *sizes, fits))  # type: ignore[arg-type]
        return _text.table(rows, right=range(1, 5))

    def __str__(self) -> str:
        return self.table()


def plan(
    make: Callable[[Session], CompiledFunction[Any]],
    *args: Any,
    devices: DevicesLike | None = None,
    precision: str = "default",
    **kwargs: Any,
) -> SessionPlan:
    """Return the bytes that a session with its weights, and a run of its function, would take on each device.

    Nothing is allocated.

    Parameters
    ----------
    make
        A function that takes a session, creates the weights there, and returns a function that the session has
        compiled. No values are copied. Only the headers of files are read.
    args, kwargs
        The arguments that the function would be called with.
    devices, precision
        As for :class:`Session`.

    Raises
    ------
    TypeError
        If ``make`` does not return a function that its session has compiled.
    Exception
        Any exception of ``make`` and of the function.

    Examples
    --------
    >>> def make(session):
    ...     w = session.weight(np.zeros((1024, 1024), np.float32))
    ...     return session.compile(lambda x: x @ w.T)
    >>> cpu = plan(make, np.zeros((2, 1024), np.float32), devices=["CPU"]).devices[-1]
    >>> cpu.weight_bytes
    4194304
    """
    with _DryRunSession(devices, precision) as session:
        function = make(session)
        if not isinstance(function, CompiledFunction) or function.session is not session:
            raise TypeError(
                f"make returned {function!r}: it must return a function that the session has compiled (session.compile)"
            )
        sizes = function.reserve_size(*args, **kwargs)
        return SessionPlan(
            tuple(
                SessionDevicePlan(b.name, session.weight_bytes(b.buffer_type), sizes[b.device], b.device.memory().free)
                for b in session.backends
            )
        )


class _DryRunSession(Session):
    """A session whose tensors have a device but no memory."""

    def __init__(self, devices: DevicesLike | None, precision: str) -> None:
        super().__init__(devices, precision=precision)
        self._dry_run = DryRunContext(precision=precision, devices=[b.device for b in self.backends])
        self._contexts.add(self._dry_run)

    def _new_context(self) -> Context:
        return self._dry_run

    def weight_bytes(self, buffer_type: Any) -> int:
        """Return the bytes of the session's own tensors in buffers of this type."""
        return self._dry_run.taken[buffer_type]

    def _upload(self, t: Tensor, source: StoredTensor | npt.NDArray[Any]) -> None:
        """Do nothing: a dry run has no memory."""
