"""Servers on the loopback, and the end of every connection."""

import gc
import time

import pytest

from ggml_cffi import rpc


@pytest.fixture(scope="module")
def servers():
    """Return the device names of two servers."""
    with rpc.Server(["CPU"], n_threads=1) as one, rpc.Server(["CPU"], n_threads=1) as other:
        yield f"rpc://{one.endpoint}", f"rpc://{other.endpoint}"


@pytest.fixture(autouse=True)
def disconnected():
    """Close the connections of a test, and wait until their proxies have ended."""
    yield
    connections = rpc.connections()
    for connection in connections:
        rpc.disconnect(connection.name)
    gc.collect()
    end = time.monotonic() + 10
    while any(connection.proxy.running for connection in connections):
        assert time.monotonic() < end, "a proxy did not end"
        time.sleep(0.001)


@pytest.fixture
def victim():
    """Return a server that the test may kill."""
    with rpc.Server(["CPU"], n_threads=1) as server:
        yield server
