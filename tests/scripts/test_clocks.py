"""Clocks of GPUs during a benchmark, by a stub of `nvidia-smi`."""

import time

import pytest

from benchmarks.clocks import Clocks

STUB = """#!/bin/sh
while true; do
    echo "00000000:0A:00.0, 345, 1980, 33"
    echo "00000000:0B:00.0, 1980, 1980, 98"
    echo "00000000:0C:00.0, [N/A], 1980, 0"
    sleep 0.01
done
"""


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-smi"
    path.write_text(STUB)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_a_low_clock_is_marked(nvidia_smi):
    with Clocks(["0000:0b:00.0", "0000:0a:00.0", "0000:0c:00.0", None]) as clocks:
        deadline = time.monotonic() + 30
        while len(clocks.found) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert str(clocks) == "1980 MHz 98 %, 345 MHz 33 % LOW CLOCK"
    assert [clock.was_low for clock in clocks.found.values()] == [True, False]


def test_there_are_no_samples_without_the_program_or_a_card(tmp_path, nvidia_smi, monkeypatch):
    for ids, path in (([None], None), (["0000:0d:00.0"], None), (["0000:0a:00.0"], str(tmp_path / "empty"))):
        if path:
            monkeypatch.setenv("PATH", path)
        with Clocks(ids) as clocks:
            time.sleep(0.05)
        assert str(clocks) == ""
        assert not clocks.found
