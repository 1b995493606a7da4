"""Notices of long work that no caller asked for, and the notice of shaders that a first run compiles."""

import logging
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core import shaders
from ggml_cffi.core.progress import display_notices, notice
from tests.support import PATIENCE, need


class Display:
    """A display that keeps the texts of all notices, and those that are shown now."""

    def __init__(self):
        self.texts, self.shown = [], []
        self.appeared = threading.Event()

    @contextmanager
    def __call__(self, text):
        self.texts.append(text)
        self.shown.append(text)
        self.appeared.set()
        try:
            yield
        finally:
            self.shown.remove(text)


def test_notices_are_logged_and_shown_by_the_display_of_the_block(caplog):
    display = Display()
    with caplog.at_level(logging.INFO, "ggml_cffi"):
        with display_notices(display), notice("one"):
            assert display.shown == ["one"]
        with notice("two"):
            pass
    assert (display.texts, display.shown) == (["one"], [])
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [("ggml_cffi", "INFO", "two")]


def test_a_display_ends_with_its_block_after_an_error():
    display = Display()
    with pytest.raises(KeyError), display_notices(display), notice("one"):
        raise KeyError
    assert not display.shown
    with notice("two"):
        pass
    assert display.texts == ["one"]


def test_a_long_first_run_on_a_gpu_has_a_notice_once(vulkan, monkeypatch):
    (gpu,) = need(("Vulkan0",))
    monkeypatch.setattr(shaders, "DELAY", 0)
    display = Display()

    def wait(out, x):
        waited.append(display.appeared.wait(PATIENCE))
        out[...] = x

    def function(x):
        return ggml.map_custom1(ggml.scale(ggml.expm1(x), 2.0), wait)

    x = np.linspace(-1, 1, 8, dtype=np.float32)
    waited = []
    with display_notices(display), ggml.Session(gpu) as session:
        np.testing.assert_allclose(session.compile(function)(x), 2 * np.expm1(x), rtol=1e-5, atol=1e-6)
        assert waited == [True]
        assert display.texts == [f"compiling shaders for {gpu}, once"]
        session.compile(function)(x)  # another program with the same kernels
    assert (display.texts, display.shown) == ([f"compiling shaders for {gpu}, once"], [])


def test_the_cpu_has_no_notice(monkeypatch):
    monkeypatch.setattr(shaders, "DELAY", 0)
    display = Display()
    with display_notices(display), ggml.Session("CPU") as session:
        session.compile(lambda x: ggml.expm1(x) * 3)(np.ones(5))
    assert display.texts == []
