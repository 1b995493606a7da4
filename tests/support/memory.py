"""Devices that report another amount of free memory than they have."""

import ggml_cffi as ggml
from tests.support import GPUS

GIB = 2**30


def memory(monkeypatch, **free):
    """Patch devices of these names to report this number of free bytes. Other devices report their real memory.

    Names of Vulkan devices are those of the devices in their place.
    """
    real = ggml.Device.memory
    free = {GPUS.get(name, name): n for name, n in free.items()}

    def fake(self):
        return ggml.Memory(free[self.name], free[self.name]) if self.name in free else real(self)

    monkeypatch.setattr(ggml.Device, "memory", fake)
