"""Devices of other machines, through ggml's own RPC backend.

A server offers its devices: run the command ``ggml-cffi rpc-server`` on the other machine, or use :class:`Server`. Any
function that takes a device's name takes the name of a remote device, and :func:`connect` returns all devices of a
server. A session may combine remote and local devices:

>>> import ggml_cffi as ggml
>>> with ggml.Session(["Vulkan0", "rpc://192.168.0.7:50052"]) as s:  # doctest: +SKIP
...     w = s.weight(W, on="rpc://192.168.0.7:50052")

The protocol has no authentication and no encryption, and a server trusts every message. Use it only in networks that
are trusted as a whole. A server serves one client at a time.

ggml's client ends the process when a server is lost or is not a ggml server. This package raises an exception instead.
Python makes the handshake with a server before C connects to it (``handshake``). C then connects only to an RPC proxy,
a small process on this machine that does not depend on the server (``proxy``). A worker process with all remote devices
would give the same protection, but a scheduler could not combine its devices with local ones. The proxy costs one small
process for each server and some 60 microseconds for each request; the kernel moves the data (``splice``).

``client`` has the functions for clients and ``server`` those for servers. ``connection`` is the lock of a server's
devices, and ``protocol`` has the constants of ggml's protocol.
"""

from ggml_cffi.rpc.client import connect, connections, device, disconnect, health
from ggml_cffi.rpc.handshake import Health
from ggml_cffi.rpc.server import Server, serve

__all__ = ["Health", "Server", "connect", "connections", "device", "disconnect", "health", "serve"]
