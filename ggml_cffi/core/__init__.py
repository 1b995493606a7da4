"""Objects that own C memory, and transfers of data between them.

This package exports devices, backends, buffers, contexts, tensors and transfers between devices. Further modules hold
element types, shapes, locks, threads, and text for terminals. :mod:`ggml_cffi` exports the function ``device``, since
here it would hide the module of that name.
"""

from ggml_cffi.core.backend import Backend, open_backend, open_backends
from ggml_cffi.core.buffer import Buffer, BufferType
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import Capabilities, Device, DeviceType, Memory, devices, gpus
from ggml_cffi.core.dry_run import DryRunContext
from ggml_cffi.core.handle import Closing, Handle, Owner, live
from ggml_cffi.core.lru import LRU
from ggml_cffi.core.tensor import Head, Tensor
from ggml_cffi.core.threads import check_threads, default_threads
from ggml_cffi.core.transfer import HostBlock, pinned

__all__ = [
    "LRU",
    "Backend",
    "Buffer",
    "BufferType",
    "Capabilities",
    "Closing",
    "Context",
    "Device",
    "DeviceType",
    "DryRunContext",
    "Handle",
    "Head",
    "HostBlock",
    "Memory",
    "Owner",
    "Tensor",
    "check_threads",
    "default_threads",
    "devices",
    "gpus",
    "live",
    "open_backend",
    "open_backends",
    "pinned",
]
