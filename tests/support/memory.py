"""Devices that report other memory than they have."""

import ggml_cffi as ggml

GIB = 2**30


def memory(monkeypatch, **free):
    """Have devices of these names say that they have so much free; others have what they have."""
    real = ggml.Device.memory

    def fake(self):
        return ggml.Memory(free[self.name], free[self.name]) if self.name in free else real(self)

    monkeypatch.setattr(ggml.Device, "memory", fake)
