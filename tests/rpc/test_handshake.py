"""The handshake: peers that are not servers are refused with a reason."""

import struct

import pytest

import ggml_cffi as ggml
from ggml_cffi import rpc
from ggml_cffi.rpc.handshake import open_server, parse_endpoint, resolve
from tests.support.fake_rpc import Peer, Pretender, Talker


@pytest.mark.parametrize(
    "endpoint", ["host:", ":50052", "rpc://", "rpc://host", "a b:1", "host:0", "host:65536", "h:1/x"]
)
def test_a_malformed_endpoint_is_refused(endpoint):
    for function in (rpc.connect, rpc.disconnect, rpc.health, rpc.device):
        with pytest.raises(ValueError, match="is not an endpoint"):
            function(endpoint)


def assert_refused(endpoint, message, timeout=30.0):
    for function in (rpc.connect, rpc.health):
        with pytest.raises(ggml.RemoteError, match=message):
            function(endpoint, timeout=timeout)
    assert not any(d.is_remote for d in ggml.devices())


def test_a_silent_peer_is_refused():
    with Peer() as peer:
        assert_refused(peer.endpoint, r"no answer within 0.2 s", timeout=0.2)


def test_a_server_that_serves_another_client_is_refused(victim):
    with open_server("", resolve("", *parse_endpoint(victim.endpoint)[:2]), 30)[0]:
        assert_refused(victim.endpoint, "a server that serves another client does not answer either", timeout=0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it closed the connection: it is not a ggml RPC server"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not a ggml RPC server.*HTTP/1.1"),
        (
            struct.pack("<Q", 28) + bytes([4, 0, 1]).ljust(28, b"\0"),
            r"speaks version 4.0.1 of the protocol, and this client speaks \d",
        ),
        (struct.pack("<Q", 28) + bytes([5, 1, 0]).ljust(28, b"\0"), r"speaks version 5.1.0"),
        (struct.pack("<Q", 28) + bytes(10), "it closed the connection"),
    ],
)
def test_a_peer_that_is_no_server_of_this_version_is_refused(text, message):
    with Talker(text) as peer:
        assert_refused(peer.endpoint, message)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"DEVICE_COUNT": struct.pack("<QI", 4, 0)}, "has 0 devices"),
        ({"DEVICE_COUNT": struct.pack("<QI", 4, 1 << 31)}, "devices"),
        ({"GET_ALIGNMENT": struct.pack("<QQ", 8, 48)}, "impossible sizes"),
        ({"GET_MAX_SIZE": struct.pack("<QQ", 8, 0)}, "impossible sizes"),
        ({"GET_DEVICE_MEMORY": struct.pack("<Q", 8)}, "is not a ggml RPC server"),
    ],
)
def test_a_server_with_impossible_answers_is_refused(answers, message):
    with Pretender(**answers) as peer:
        assert_refused(peer.endpoint, message)


def test_a_host_that_does_not_exist_is_refused():
    assert_refused("no-such-host.invalid:50052", "there is no host 'no-such-host.invalid'")


def test_an_endpoint_must_be_a_string():
    with pytest.raises(TypeError, match="an endpoint is a string"):
        rpc.connect(50052)
