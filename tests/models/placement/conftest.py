"""Counted memory of devices."""

import pytest

from ggml_cffi.core.buffer import Buffer


@pytest.fixture
def counted(monkeypatch):
    """Return a dict that collects the bytes of every new buffer, by name of its device."""
    made = {}
    plain = Buffer.__init__

    def init(self, kind, size, **options):
        plain(self, kind, size, **options)
        name = self.buffer_type.device.name
        if name == "CPU" or not self.is_host:  # a GPU's pinned memory is the host's
            made[name] = made.get(name, 0) + size

    monkeypatch.setattr(Buffer, "__init__", init)
    return made
