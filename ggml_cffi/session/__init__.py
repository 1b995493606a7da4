"""Sessions: devices opened once, Python functions traced once per signature, arrays in and arrays out."""

from ggml_cffi.session.plan import DeviceNeed, SessionPlan, plan
from ggml_cffi.session.session import Compiled, Session, TracedProgram

__all__ = ["Compiled", "DeviceNeed", "Session", "SessionPlan", "TracedProgram", "plan"]
