"""Speeds of devices are measured once."""

import json

import pytest

import ggml_cffi as ggml
from ggml_cffi.models.placement import calibration


def test_calibration_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path))
    with ggml.Backend("CPU", n_threads=1) as cpu:
        first = calibration.seconds(cpu, ggml.Q8_0)
        assert 0 < first < 1
        (name,) = json.loads(calibration.path().read_text())
        assert cpu.device.description in name
        assert "1 threads, Q8_0, ggml" in name
        monkeypatch.setattr(calibration, "measure", lambda backend, dtype, tokens: {1: 1e-3, 512: 1e-5}[tokens])
        assert calibration.seconds(cpu, ggml.Q8_0) == first
        assert calibration.seconds(cpu, ggml.F16) == pytest.approx(1e-4)
        assert len(json.loads(calibration.path().read_text())) == 2
        for broken in ("", "[]", '{"x"', json.dumps({calibration.key(cpu, ggml.Q8_0): "fast"})):
            calibration.path().write_text(broken)
            assert calibration.seconds(cpu, ggml.Q8_0) == pytest.approx(1e-4)
        assert not [f for f in calibration.path().parent.iterdir() if f != calibration.path()]


def test_the_file_may_be_a_link_and_need_not_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda *_: 1e-4)
    target = tmp_path / "shared.json"
    calibration.path().parent.mkdir()
    calibration.path().symlink_to(target)
    with ggml.Backend("CPU", n_threads=1) as cpu:
        assert calibration.seconds(cpu, ggml.Q8_0) == pytest.approx(1e-4)
        assert calibration.path().is_symlink()
        assert list(json.loads(target.read_text())) == [calibration.key(cpu, ggml.Q8_0)]
        monkeypatch.setenv("GGML_CFFI_CACHE", str(target / "folder"))  # target is a file
        assert calibration.seconds(cpu, ggml.Q8_0) == pytest.approx(1e-4)
