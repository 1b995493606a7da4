"""Devices that report another amount of free memory than they have."""

import ggml_cffi as ggml

GIB = 2**30


def memory(monkeypatch, **free):
    """Patch devices of these names to report this number of free bytes. Other devices report their real memory."""
    real = ggml.Device.memory

    def fake(self):
        return ggml.Memory(free[self.name], free[self.name]) if self.name in free else real(self)

    monkeypatch.setattr(ggml.Device, "memory", fake)
