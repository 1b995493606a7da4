"""Sessions: devices opened once, Python functions traced once per signature, arrays in and arrays out."""

from ggml_cffi.session.plan import DeviceNeed, SessionPlan, plan
from ggml_cffi.session.session import Compiled, Program, Session

__all__ = ["Compiled", "DeviceNeed", "Program", "Session", "SessionPlan", "plan"]
