"""Choice of the executor and of its steps, the only code here that depends on the kind of device or processor."""

from __future__ import annotations

from collections.abc import Sequence

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.device import Device
from ggml_cffi.core.threads import default_threads
from ggml_cffi.core.unified import has_unified_addresses
from ggml_cffi.parallel.executors.base import Executor, StepMaker
from ggml_cffi.parallel.executors.captured import CapturedStepMaker
from ggml_cffi.parallel.executors.record_ahead import RecordAhead, VulkanStepMaker, can_record_ahead, is_vulkan
from ggml_cffi.parallel.executors.streams import Streams
from ggml_cffi.parallel.executors.threads import Threads
from ggml_cffi.parallel.executors.turns import Turns

_PROCESSORS_PER_THREAD = 2  # for each device; from this number on, a thread for each device is faster


def choose_executor(backends: Sequence[Backend], *, threads: bool | None = None) -> Executor:
    """Return the executor for the devices of some backends.

    Parameters
    ----------
    threads
        True for a thread for each of several devices, False for one thread that serves them in turns. By default the
        devices wait for one another without the host if they can. Else the executor records ahead if the devices
        support it, and otherwise uses threads if the processor has enough cores.
    """
    n = len(backends)
    if threads is None and n > 1 and all(_can_wait(b.device) for b in backends):
        return Streams(backends)
    ahead = (threads is None or n == 1) and all(can_record_ahead(b.device) for b in backends)
    if threads is None:
        threads = default_threads() >= _PROCESSORS_PER_THREAD * n + 1
    threads = threads and n > 1
    if ahead:
        return RecordAhead(backends, Threads(backends) if threads else None)
    return Threads(backends) if threads else Turns(backends)


def choose_step_maker(devices: Sequence[Device], *, ahead: bool) -> StepMaker:
    """Return the maker of steps for one of ``devices``, which compute a program together.

    Parameters
    ----------
    ahead
        True to make steps that can be recorded ahead, for an executor that does so.
    """
    if all(is_vulkan(device) for device in devices):
        return VulkanStepMaker(shared=len(devices) > 1, ahead=ahead)
    if all(has_unified_addresses(device) for device in devices):
        return CapturedStepMaker()
    return StepMaker()


def _can_wait(device: Device) -> bool:
    """Return whether the stream of a device waits for events of others that write where it reads."""
    return has_unified_addresses(device) and device.capabilities.events


def can_poll(device: Device) -> bool:
    """Return whether results of a device can be polled in host memory: kernels write each number once."""
    return is_vulkan(device)
