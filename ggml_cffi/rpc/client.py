"""The client's side: connections to servers, and the devices of these servers."""

from __future__ import annotations

import threading
import time

from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.core.device import Device, add_remote, devices_of
from ggml_cffi.rpc.connection import Connection
from ggml_cffi.rpc.handshake import Address, Health, open_server, parse_endpoint, probe, protocol, resolve
from ggml_cffi.rpc.protocol import version_text

_lock = threading.RLock()
_connections: dict[Address, Connection] = {}


def connect(endpoint: str, *, timeout: float = 10.0, patience: float = 300.0) -> list[Device]:
    """Connect to a server and return its devices.

    :func:`ggml_cffi.devices` lists them until the server is lost. Their names are ``rpc://host:port``,
    ``rpc://host:port/1`` and so on. Connecting twice returns the same devices; after the server was lost, connecting
    again returns new ones.

    Parameters
    ----------
    endpoint
        ``host:port`` or ``rpc://host:port``.
    timeout
        Seconds for the handshake with the server.
    patience
        Seconds that the server may be silent while an answer is due; after that it counts as lost. A server is silent
        while it computes.

    Raises
    ------
    RemoteError
        If nothing listens there, the server does not answer, or it is not a ggml RPC server of this version.
    LibraryNotFoundError
        If there is no RPC plug-in.
    ValueError
        If ``endpoint`` is not of this form.

    C: ``ggml_backend_rpc_add_server``.
    """
    host, port, _ = parse_endpoint(endpoint)
    name = f"rpc://{host}:{port}"
    if not (timeout > 0 and patience > 0):
        raise ValueError(f"timeout and patience must be seconds above 0, not {timeout} and {patience}")
    library.load("rpc")
    with _lock:
        address = resolve(name, host, port)
        known = _known(address)
        if known is None:
            server, _ = open_server(name, address, timeout)
            known = Connection(name, server, protocol(), patience)
            try:
                _add_devices(known)
            except BaseException:
                known.close()
                raise
            _connections[address] = known
        return devices_of(known)


def connections() -> list[Connection]:
    """Return the open connections. A lost connection stays listed until its server is connected again."""
    with _lock:
        return list(_connections.values())


def _known(address: Address) -> Connection | None:
    """Return the connection to an address, None if there is none or its server is lost."""
    connection = _connections.get(address)
    if connection is not None and not connection.usable:
        del _connections[address]
        connection.close()
        return None
    return connection


def _add_devices(connection: Connection) -> None:
    free, total = c.ffi.new("size_t *"), c.ffi.new("size_t *")
    with connection:
        registry = c.ggml_backend_rpc_add_server(connection.proxy_endpoint.encode())
        pointers = [c.ggml_backend_reg_dev_get(registry, i) for i in range(c.ggml_backend_reg_dev_count(registry))]
        for pointer in pointers:
            c.ggml_backend_dev_buffer_type(pointer)  # C requests the sizes from the server now, and keeps them
    # A server answers this request once it has done all earlier work.
    connection.ping = lambda: c.ggml_backend_dev_memory(pointers[0], free, total)
    # The devices are not added to ggml's registry, which never removes a device.
    for i, pointer in enumerate(pointers):
        text = f"device {i + 1} of {len(pointers)} of an RPC server (protocol {version_text(protocol())})"
        add_remote(pointer, f"{connection.name}/{i}" if i else connection.name, text, connection)


def disconnect(endpoint: str) -> None:
    """Disconnect from a server, so that it can serve another client. Its devices are no longer listed.

    Objects on these devices raise :class:`ClosedError` from now on, also in the middle of a run. They can be closed.

    Raises
    ------
    ValueError
        If the server is not connected.
    """
    host, port, _ = parse_endpoint(endpoint)
    with _lock:
        connection = _connections.pop(resolve(endpoint, host, port), None)
    if connection is None:
        names = ", ".join(other.name for other in _connections.values()) or "no servers"
        raise ValueError(f"{endpoint} is not connected; connected are {names}")
    connection.close()


def device(name: str) -> Device:
    """Return the device ``rpc://host:port/index``, or the server's first one without an index.

    Connect to the server first if it is not connected; see :func:`connect` for the errors.

    Raises
    ------
    ValueError
        If the server has no such device.
    """
    _, _, index = parse_endpoint(name)
    found = connect(name)
    if index >= len(found):
        raise ValueError(f"there is no device {name!r}; the server has {', '.join(d.name for d in found)}")
    return found[index]


def health(endpoint: str, *, timeout: float = 5.0) -> Health:
    """Return the state of a server: version, round-trip time, memory.

    A server that serves another client does not answer, just as one that hangs. If this process is connected to the
    server, the request uses that connection, and the server answers it after all earlier work.

    Raises
    ------
    RemoteError, ValueError
        As :func:`connect`.
    """
    host, port, _ = parse_endpoint(endpoint)
    address = resolve(endpoint, host, port)
    with _lock:
        connection = _known(address)
    if connection is None:
        return probe(f"rpc://{host}:{port}", address, timeout)
    with connection:
        start = time.perf_counter()
        connection.wait()
        seconds = time.perf_counter() - start
    return Health(protocol(), seconds, [d.memory() for d in devices_of(connection)])
