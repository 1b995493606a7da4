"""Devices that address one another's memory: partial sums stay there, and devices wait for one another's events."""

from types import SimpleNamespace

import numpy as np
import pytest

from ggml_cffi import HostBlock, device
from ggml_cffi.c import cuda_peers
from ggml_cffi.core import transfer, unified
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.errors import ClosedError
from ggml_cffi.parallel import trace
from ggml_cffi.parallel.executors import Step, Streams, streams, turns
from tests.support import relative_error
from tests.support.ranks import DIM, Blocks, Ranks


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("rows", [1, 7, 300])  # the partial sums of 300 rows are too large for slots of their own
def test_sums_in_the_memory_of_peers(n, rows, rng, monkeypatch):
    blocks, x = Blocks(rng), rng.standard_normal((rows, DIM)).astype(np.float32)
    found = []
    for peers in (False, True):
        monkeypatch.setattr(trace, "are_peers", lambda devices, peers=peers: peers)
        with Ranks(n, threads=False) as group:
            network = blocks.network(group)
            for _ in range(3):
                got = network(x)
            (program,) = network.programs
            assert program.sums_on_devices == peers
            found.append((got, program.host_bytes))
    for got, _ in found:
        for a, b in zip(got, blocks.expected(x), strict=True):
            assert relative_error(a, b) < 1e-5
    assert found[1][1] < found[0][1]  # no sums in host memory


def test_a_stream_waits_for_all_others_between_steps(monkeypatch):
    calls = []
    fake = SimpleNamespace(
        ggml_backend_event_new=lambda dev: f"event of {dev}",
        ggml_backend_event_free=lambda event: calls.append(("free", event)),
        ggml_backend_event_record=lambda event, pointer: calls.append(("record", event, pointer)),
        ggml_backend_event_wait=lambda pointer, event: calls.append(("wait", pointer, event)),
        ggml_backend_graph_compute_async=lambda pointer, graph: calls.append((graph, pointer)) or 0,
        ggml_backend_synchronize=lambda pointer: calls.append(("synchronize", pointer)),
    )
    for module in (streams, turns):
        monkeypatch.setattr(module, "c", fake)
    with Ranks(2, threads=False) as group, Streams(group.backends) as executor:
        a, b = (backend.ptr for backend in group.backends)
        ea, eb = (f"event of {backend.device.ptr}" for backend in group.backends)
        assert executor.submit([[Step(immediate=("a0",)), Step(immediate=("a1",))], [Step(immediate=("b0",))]]) == 0
        assert calls == [
            ("a0", a),
            ("b0", b),
            ("record", ea, a),
            ("record", eb, b),
            ("wait", a, eb),
            ("wait", b, ea),
            ("a1", a),
        ]
        assert executor.steps_computed == [2, 1]
        submitted = [*calls]
        calls.clear()
        executor.finish()
        assert calls == [("synchronize", a), ("synchronize", b)]

        steps = executor.arrange([[Step(immediate=("a0",)), Step(immediate=("a1",))], [Step(immediate=("b0",))]])
        calls.clear()
        assert executor.run(steps, lambda: calls.append("meanwhile")) == 0
        assert calls == [*submitted, "meanwhile", ("synchronize", a), ("synchronize", b)]
        assert executor.steps_computed == [4, 2]
        calls.clear()
        with pytest.raises(ZeroDivisionError):  # the devices are done before the caller sees it
            executor.run(steps, lambda: 1 / 0)
        assert calls == [*submitted, ("synchronize", a), ("synchronize", b)]
        group.close()
        calls.clear()
        with pytest.raises(ClosedError):
            executor.submit(steps)
        assert not any(call[0] in ("a0", "b0") for call in calls)


def test_only_some_backends_have_unified_addresses(monkeypatch):
    cpu = device("CPU")
    assert not unified.has_unified_addresses(cpu)
    cuda = SimpleNamespace(backend_name="CUDA")
    assert unified.has_unified_addresses(cuda)
    monkeypatch.setattr(cuda_peers, "all_reach", lambda: False)
    assert not unified.are_peers([cuda, cuda])
    monkeypatch.setattr(cuda_peers, "all_reach", lambda: True)
    assert unified.are_peers([cuda, cuda])
    assert not unified.are_peers([cuda, cpu])


def test_devices_with_unified_addresses_share_pinned_memory(two_gpus, monkeypatch):
    monkeypatch.setattr(transfer, "has_unified_addresses", lambda device: True)
    with HostBlock(100, two_gpus) as block:
        first, second = (block.buffers[device(name)] for name in two_gpus)
        assert first is second
        assert first.is_host
        block.memory[:] = 7
        assert len(block.memory) == 64 << 10 <= first.size
        kept = block.memory
    assert (kept == 7).all()  # arrays keep the memory


def test_ordinary_memory_does_not_pass_for_pinned_memory(monkeypatch):
    # The CPU takes the part of a device whose driver has no pinned memory left.
    monkeypatch.setattr(transfer, "has_unified_addresses", lambda device: True)
    monkeypatch.setattr(Buffer, "imported", lambda which, memory: None)
    with HostBlock(100, ["CPU"]) as block:
        assert not block.buffers
