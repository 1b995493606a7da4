"""Devices and backends by C's names."""

import re

import pytest

from ggml_cffi import flat
from tests.support import run_python
from tests.support.flat_guide import CPU


def test_vulkan_devices_are_counted_from_0(two_gpus):
    assert flat.ggml_vulkan_available() is True
    n = flat.ggml_vulkan_device_count()
    assert n >= 2
    assert flat.ggml_vulkan_device_description(n - 1)
    free, total = memory = flat.ggml_vulkan_device_memory(0)
    assert 0 < free == memory.free <= total == memory.total
    assert flat.ggml_backend_name(flat.ggml_vulkan_init(1)) == "Vulkan1"
    for i in (-1, n, 2**70):
        with pytest.raises(IndexError, match=f"this machine has {n}, counted from 0"):
            flat.ggml_vulkan_init(i)


def test_status_lists_the_devices(two_gpus, capsys):
    flat.ggml_vulkan_status()
    assert capsys.readouterr().out.startswith("Vulkan0: ")


def test_without_a_gpu_there_are_no_devices_and_opening_one_raises():
    code = """
        from ggml_cffi.flat import *
        assert ggml_vulkan_device_count() == 0
        ggml_vulkan_status()
        try: ggml_vulkan_init(0)
        except IndexError as error: print(error)
    """
    out = run_python(re.sub(r"^ {8}", "", code, flags=re.M), GGML_VK_VISIBLE_DEVICES="99").stdout
    first, error = out.splitlines()
    assert first == "no Vulkan device"
    assert error.startswith("there is no Vulkan device 0: this machine has 0, counted from 0; run `ggml-cffi doctor`")


def test_the_number_of_threads_can_be_set():
    cpu = CPU()
    flat.ggml_backend_cpu_set_n_threads(cpu, 3)
    assert cpu.n_threads == 3
    flat.ggml_backend_free(cpu)
