"""Devices of other machines, through ggml's own RPC backend.

A server (``ggml-cffi rpc-server`` there, or :class:`Server`) offers its devices; :func:`connect`, or simply their name
wherever a device is named, makes them devices here, beside the local ones:

>>> import ggml_cffi as ggml
>>> with ggml.Session(["Vulkan0", "rpc://192.168.0.7:50052"]) as s:  # doctest: +SKIP
...     w = s.weight(W, on="rpc://192.168.0.7:50052")

The protocol has no authentication and no encryption, and a server trusts what it is sent: only for networks that are
trusted as a whole. A server serves one client at a time.

ggml's client ends the process when a server is lost, or is none. Here that is an exception: before C hears of a server
it was greeted from Python, and C never talks to it but through a relay that stays (``proxy.py``). A worker process for
everything remote would have been the other way; then remote devices could not share a scheduler with local ones. The
relay costs a small process for each server and some 60 microseconds for each question; data is moved by the kernel
(``splice``).
"""

from ggml_cffi.rpc.client import Health, connect, device, disconnect, health
from ggml_cffi.rpc.server import Server, serve

__all__ = ["Health", "Server", "connect", "device", "disconnect", "health", "serve"]
