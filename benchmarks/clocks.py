"""Clocks and utilization of NVIDIA GPUs during a measurement, as `nvidia-smi` reports them.

A driver lowers the clock of a GPU that works in short pieces. A rate measured at such a clock says little about the
program.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType

_FIELDS = "pci.bus_id,clocks.sm,clocks.max.sm,utilization.gpu"
_INTERVAL = 100  # milliseconds


@dataclass
class Clock:
    """Samples of one GPU."""

    most: int = 0
    """Largest clock of the processors, MHz."""
    clocks: list[int] = field(default_factory=list)
    """Clocks, MHz."""
    busy: list[int] = field(default_factory=list)
    """Parts of the time in which a kernel ran, percent."""

    @property
    def was_low(self) -> bool:
        """True if the clock was below half of its largest value for half of the samples or more."""
        return 2 * median(self.clocks) < self.most

    def __str__(self) -> str:
        return f"{median(self.clocks):.0f} MHz {median(self.busy):.0f} %{' LOW CLOCK' if self.was_low else ''}"


class Clocks:
    """Samples of some GPUs while a block runs; none without `nvidia-smi`.

    Parameters
    ----------
    pci_ids
        PCI ids of the GPUs, such as ``0000:0a:00.0``; None, for a software device, has no samples.
    """

    def __init__(self, pci_ids: Iterable[str | None]) -> None:
        self._ids = [_short(i) for i in pci_ids if i]
        self.found: dict[str, Clock] = {}
        """The samples of each GPU, by PCI id without the domain."""
        self._process: subprocess.Popen[str] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Clocks:
        if self._ids and shutil.which("nvidia-smi"):
            query = [f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits", f"-lms={_INTERVAL}"]
            self._process = subprocess.Popen(
                ["nvidia-smi", *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                fields = [part.strip() for part in line.split(",")]
                if len(fields) == 4 and all(part.isdigit() for part in fields[1:]) and _short(fields[0]) in self._ids:
                    clock, most, busy = map(int, fields[1:])
                    found = self.found.setdefault(_short(fields[0]), Clock(most))
                    found.clocks.append(clock)
                    found.busy.append(busy)

    def __str__(self) -> str:
        return ", ".join(str(self.found[i]) for i in self._ids if i in self.found)


def _short(pci_id: str) -> str:
    """Return a PCI id without its domain, which programs write with four or eight digits, and without a suffix."""
    return pci_id.split("-")[0].lower().split(":", 1)[1]
