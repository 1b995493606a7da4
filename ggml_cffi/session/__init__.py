"""Sessions: devices opened once, functions traced once per signature, arrays in and arrays out.

``session`` has :class:`Session`, which holds the devices and the weights. ``compiled`` has the functions that a session
compiles, ``trace`` their traced programs, and ``plan`` the memory that a session would take. ``factory`` opens the
result of a user's ``make`` function, for worker processes and replicas.
"""

from ggml_cffi.session.compiled import CompiledFunction
from ggml_cffi.session.factory import open_product
from ggml_cffi.session.plan import SessionDevicePlan, SessionPlan, plan
from ggml_cffi.session.session import Session
from ggml_cffi.session.trace import Trace, TracedProgram

__all__ = [
    "CompiledFunction",
    "Session",
    "SessionDevicePlan",
    "SessionPlan",
    "Trace",
    "TracedProgram",
    "open_product",
    "plan",
]
