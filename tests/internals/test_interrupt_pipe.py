"""The descriptor that wakes the watcher of Ctrl-C: its preparation may be interrupted at any line."""

import os

import pytest

from ggml_cffi.core import interrupt


def test_an_exception_during_the_preparation_leaves_nothing_half_done(monkeypatch):
    monkeypatch.setattr(interrupt, "_pipe", None)

    def interrupted(fd, blocking):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "set_blocking", interrupted)
        with pytest.raises(KeyboardInterrupt):
            interrupt.begin(lambda: None)
    assert interrupt.begin(lambda: None)
    interrupt.end()
