"""Graphs that the RPC proxy sends again, beside models of ggml's client and of its server.

The test looks inside the proxy: only more than a thousand graphs, with memory freed in between, show the limit to which
client and server keep them.
"""

import random

import pytest

from ggml_cffi.rpc import proxy
from ggml_cffi.rpc.protocol import Command, graph_key_size

LIMIT = 12


class Client:
    """ggml's client: it asks for a graph anew, or to repeat one that it knows the server to have been sent."""

    def __init__(self, several):
        self.several, self.known = several, {}

    def request(self, device, number):
        name = device.to_bytes(4, "little") + (number.to_bytes(8, "little") if self.several else b"")
        if not self.several:
            repeated, self.known[device] = self.known.get(device) == number, number
        else:
            numbers = self.known.setdefault(device, set())
            repeated = number in numbers
            if not repeated and number:
                if len(numbers) >= LIMIT:
                    numbers.clear()
                numbers.add(number)
        return (Command.GRAPH_RECOMPUTE, name) if repeated else (Command.GRAPH_COMPUTE, name + bytes([number]) * 99)


class Server:
    """ggml's server: it returns the number of the graph that it computes, None if it refuses the request."""

    def __init__(self, several):
        self.several, self.graphs = several, {}

    def answer(self, command, body):
        kept = self.graphs.setdefault(body[:4], {})
        name = body[4:12] if self.several else b""
        if command == Command.FREE_BUFFER:
            for graphs in self.graphs.values():
                graphs.update(dict.fromkeys(graphs))
            return None
        if command == Command.GRAPH_RECOMPUTE:
            return kept.get(name)
        if not self.several or any(name):
            if len(kept) >= LIMIT:
                kept.clear()
            kept[name] = body[-1]
        return body[-1]


@pytest.mark.parametrize("version", [(7, 0, 0), (8, 0, 0)])
def test_a_server_computes_the_graph_that_its_client_asks_for(version, monkeypatch):
    monkeypatch.setattr(proxy, "KEPT_GRAPHS", LIMIT)
    choose, several = random.Random(7), version >= (8, 0, 0)
    graphs, client, server = proxy.Graphs(graph_key_size(version)), Client(several), Server(several)
    repeated = 0
    for _ in range(20_000):
        if choose.random() < 0.05:
            request = graphs.renew(Command.FREE_BUFFER, bytes([Command.FREE_BUFFER]), bytes(8))
            server.answer(request[0], request[1:])
            continue
        device, number = choose.randrange(2), choose.randrange(LIMIT + 3)
        command, body = client.request(device, number)
        request = graphs.renew(command, bytes([command]), body)
        assert server.answer(request[0], request[1:]) == number
        repeated += request[0] == Command.GRAPH_RECOMPUTE
    assert repeated > 500
