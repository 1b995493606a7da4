"""Devices, backends and buffers."""

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import need


def test_the_cpu_is_last_and_always_there():
    found = ggml.devices()
    assert found[-1].is_cpu
    assert found[-1].name == "CPU"
    assert found[-1].type is ggml.DeviceType.CPU
    assert [d.is_cpu for d in found].count(True) == 1


def test_a_device_has_a_name_a_type_and_memory(devices):
    for name in devices:
        d = ggml.device(name.lower())
        assert d.name == name
        assert d.description
        assert d.backend_name == name.rstrip("0123456789")
        memory = d.memory()
        assert 0 < memory.free <= memory.total
        assert d.pci_id is None or ":" in d.pci_id
        assert d.is_cpu == (name == "CPU")
        assert d.capabilities.asynchronous == (not d.is_cpu)
        assert d == ggml.device(name)
        assert len({d, ggml.device(name)}) == 1
        assert name in repr(d)


def test_a_device_is_found_by_its_position():
    assert ggml.device(0) == ggml.devices()[0]


@pytest.mark.parametrize("which", ["Vulkan99", "", 99, -1])
def test_an_unknown_device_name_raises_with_the_list_of_devices(which):
    with pytest.raises(ValueError, match=r"there is no device .*this machine has .*CPU"):
        ggml.device(which)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "CUDA:12", "mps", "gpu", "cpu:0", "vulkan", "vulkan:0", "auto"])
def test_a_name_of_another_library_gets_the_names_of_the_devices(name):
    message = f"there is no device '{name}'; this machine has .*CPU.*: use these names, or name no device for every GPU"
    for use in (ggml.device, ggml.Session, ggml.Backend, lambda which: ggml.Session([which])):
        with pytest.raises(ValueError, match=message):
            use(name)


def test_a_backend_has_its_device_and_buffer_type(devices):
    with ggml.Backend(devices[0]) as backend:
        assert backend.name == devices[0]
        assert backend.device == ggml.device(devices[0])
        assert backend.supports_buffer_type(backend.buffer_type)
        backend.synchronize()
        assert devices[0] in repr(backend)


def test_the_number_of_cpu_threads_can_be_set():
    with ggml.Backend("CPU", n_threads=2) as cpu:
        assert cpu.n_threads == 2
        cpu.n_threads = 1
        assert cpu.n_threads == 1
        for n in (0, -1, 513):
            with pytest.raises(ValueError, match="1 to 512"):
                cpu.n_threads = n
    with pytest.raises(ValueError, match="1 to 512"):
        ggml.Backend("CPU", n_threads=0)


def test_only_the_cpu_takes_a_number_of_threads():
    (name,) = need(("Vulkan0",))
    with pytest.raises(ValueError, match="n_threads is for the CPU"):
        ggml.Backend(name, n_threads=2)
    with ggml.Backend(name) as gpu:
        assert gpu.n_threads == 1
        with pytest.raises(ValueError, match="n_threads is for the CPU"):
            gpu.n_threads = 2


def test_a_buffer_has_size_type_and_usage(devices):
    with ggml.Buffer(devices[0], 1000, usage=ggml.Usage.WEIGHTS) as buffer:
        assert buffer.size >= 1000
        assert buffer.usage is ggml.Usage.WEIGHTS
        assert buffer.is_host == (devices[0] == "CPU")
        assert buffer.buffer_type == ggml.BufferType.of(devices[0])
        assert buffer.buffer_type.alignment >= 1
        assert buffer.base % buffer.buffer_type.alignment == 0
        assert buffer.buffer_type.name in repr(buffer)


@pytest.mark.parametrize("size", [0, -1])
def test_a_buffer_needs_at_least_one_byte(size):
    with pytest.raises(ValueError, match="a buffer has at least 1 byte"):
        ggml.Buffer("CPU", size)


def test_a_buffer_larger_than_memory_raises(devices):
    with pytest.raises(ggml.OutOfMemoryError, match="no room"):
        ggml.Buffer(devices[0], 2**50)


def test_out_of_memory_is_a_memory_error():
    assert issubclass(ggml.OutOfMemoryError, MemoryError)


def test_a_buffer_can_use_python_memory():
    raw = np.zeros(4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    memory = raw[start : start + 4096]
    with ggml.Buffer.over(memory) as buffer, ggml.Context() as ctx:
        assert buffer.size == 4096
        t = ctx.new_tensor(ggml.F32, (4, 4))
        ctx.put(t, buffer, buffer.base + 64)
        ctx.adopt(buffer)
        t.set(np.ones((4, 4)))
        assert memory[64:128].view(np.float32).tolist() == [1.0] * 16
        with pytest.raises(ValueError, match="has memory already"):
            ctx.put(t, buffer, buffer.base)
        for where, message in ((4096, "does not fit"), (4064, "does not fit"), (1, "not at a multiple")):
            with pytest.raises(ValueError, match=message):
                ctx.put(ctx.new_tensor(ggml.F32, (4, 4)), buffer, buffer.base + where)
    with pytest.raises(ValueError, match="multiple of 32"):
        ggml.Buffer.over(raw[start + 1 : start + 100])
