"""The command ``devices``."""

import json

from ggml_cffi.c import library
from tests.support.command import run


def test_devices_prints_ggmls_version_and_a_table_with_the_cpu_last():
    version, empty, *lines = run("devices").stdout.splitlines()
    assert version == f"ggml {library.version()}, from {library.location()}"
    assert empty == ""
    assert lines[0].split() == ["device", "type", "free", "total", "description"]
    assert lines[-1].startswith("CPU")
    assert "GiB" in lines[-1]


def test_devices_prints_json():
    found = json.loads(run("devices", "--json").stdout)
    assert found[-1]["name"] == "CPU"
    assert found[-1]["ggml_version"] == library.version()
    assert found[-1]["memory_total"] >= found[-1]["memory_free"] > 0
