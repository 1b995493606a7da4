"""Executors submit the graphs of a program's steps to one or several devices.

Four classes have one interface (``base``): ``Turns`` (one thread), ``Threads`` (a thread for each device), ``Streams``
(devices wait for one another without the host) and ``RecordAhead`` (the next step is recorded while the devices compute
this one, and results are polled in host memory). ``choose`` picks one. Only ``record_ahead`` depends on the inside
of ggml's Vulkan, and only ``captured`` on that of its CUDA.
"""

from ggml_cffi.parallel.executors.base import Executor, Freeze, Step, StepMaker, Steps
from ggml_cffi.parallel.executors.choose import can_poll, choose_executor, choose_step_maker
from ggml_cffi.parallel.executors.polling import WRITTEN_ONCE, PolledResults
from ggml_cffi.parallel.executors.record_ahead import RecordAhead
from ggml_cffi.parallel.executors.streams import Streams
from ggml_cffi.parallel.executors.threads import Threads
from ggml_cffi.parallel.executors.turns import Turns

__all__ = [
    "WRITTEN_ONCE",
    "Executor",
    "Freeze",
    "PolledResults",
    "RecordAhead",
    "Step",
    "StepMaker",
    "Steps",
    "Streams",
    "Threads",
    "Turns",
    "can_poll",
    "choose_executor",
    "choose_step_maker",
]
