"""ggml on every GPU of the machine, from Python.

Numpy in, every GPU of the machine busy, numpy out. The layers, from the bottom: :mod:`ggml_cffi.c` (the C API),
objects (:class:`Device`, :class:`Backend`, :class:`Buffer`, :class:`Context`, :class:`Tensor`, :class:`Graph`,
:class:`Scheduler`), operations (:mod:`ggml_cffi.ops`) and models (:mod:`ggml_cffi.models`).
"""

from typing import TYPE_CHECKING

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer, BufferType
from ggml_cffi.core.context import Context
from ggml_cffi.core.device import (
    Capabilities,
    Device,
    DeviceType,
    Memory,
    device,
    devices,
    find_remote_with,
    load_backends,
)
from ggml_cffi.core.lazy_names import lazy_names
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.core.transfer import HostBlock, pinned, transfer
from ggml_cffi.enums import BackendBufferUsage as Usage
from ggml_cffi.enums import GGUFType, Op, OpPool, Prec, ScaleFlag, ScaleMode, SortOrder, TriType, Type
from ggml_cffi.errors import (
    AbortedError,
    BackendCrashedError,
    BackendTimeoutError,
    ClosedError,
    FormatError,
    GgmlError,
    LibraryMismatchError,
    LibraryNotFoundError,
    OutOfMemoryError,
    RemoteError,
    UnsupportedOpError,
)
from ggml_cffi.ops import *  # noqa: F403
from ggml_cffi.ops import __all__ as _ops
from ggml_cffi.scheduler.graph import Graph
from ggml_cffi.scheduler.scheduler import Scheduler
from ggml_cffi.scheduler.splits import Split
from ggml_cffi.session import CompiledFunction, Session, SessionDevicePlan, SessionPlan, TracedProgram, plan

if TYPE_CHECKING:
    from ggml_cffi.c import GGML_VERSION as GGML_VERSION  # not in __all__, since it loads the library
    from ggml_cffi.files import (
        GGUFFile,
        GGUFTensor,
        GGUFValue,
        LazyTensor,
        RawTensor,
        SafetensorsFile,
        StoredTensor,
        choose_types,
        dequantize,
        from_safetensors,
        quantize,
        quantize_file,
        read_imatrix,
        write_gguf,
    )
    from ggml_cffi.train.gradients import gradients
    from ggml_cffi.train.optimizers import SGD, AdamW, Optimizer

__version__ = "0.1.0"

__getattr__ = lazy_names(
    __name__,
    {
        "ggml_cffi.files": """GGUFFile GGUFTensor GGUFValue LazyTensor RawTensor SafetensorsFile StoredTensor
            choose_types dequantize from_safetensors quantize quantize_file read_imatrix write_gguf""",
        "ggml_cffi.train": "SGD AdamW Optimizer gradients",
        "ggml_cffi.c": "GGML_VERSION",
    },
)


def _find_remote(name: str) -> Device:
    from ggml_cffi import rpc  # slow to import, and most programs have no remote devices

    return rpc.device(name)


find_remote_with(_find_remote)

F32, F16, BF16, F64 = Type.F32, Type.F16, Type.BF16, Type.F64
I8, I16, I32, I64 = Type.I8, Type.I16, Type.I32, Type.I64
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 = Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0
Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "I8",
    "I16",
    "I32",
    "I64",
    "Q2_K",
    "Q3_K",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "AbortedError",
    "AdamW",
    "Backend",
    "BackendCrashedError",
    "BackendTimeoutError",
    "Buffer",
    "BufferType",
    "Capabilities",
    "ClosedError",
    "CompiledFunction",
    "Context",
    "Device",
    "SessionDevicePlan",
    "DeviceType",
    "FormatError",
    "GGUFFile",
    "GGUFTensor",
    "GGUFType",
    "GGUFValue",
    "GgmlError",
    "Graph",
    "HostBlock",
    "LazyTensor",
    "LibraryMismatchError",
    "LibraryNotFoundError",
    "Memory",
    "Op",
    "OpPool",
    "Optimizer",
    "OutOfMemoryError",
    "Prec",
    "TracedProgram",
    "RawTensor",
    "RemoteError",
    "SGD",
    "SafetensorsFile",
    "ScaleMode",
    "ScaleFlag",
    "Scheduler",
    "Session",
    "SessionPlan",
    "SortOrder",
    "Split",
    "StoredTensor",
    "Tensor",
    "TriType",
    "Type",
    "UnsupportedOpError",
    "Usage",
    "choose_types",
    "dequantize",
    "device",
    "devices",
    "from_safetensors",
    "gradients",
    "load_backends",
    "pinned",
    "plan",
    "quantize",
    "quantize_file",
    "read_imatrix",
    "transfer",
    "write_gguf",
    *_ops,
]
