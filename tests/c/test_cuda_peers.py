"""Peer access among CUDA devices, with a driver and a plug-in that tests compile."""

import json
import subprocess

import pytest

from tests.support import run_python
from tests.support.command import run
from tests.support.libraries import compile_stub, copy_libraries

_DRIVER = """
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *n) { *n = DEVICES; return 0; }
int cuDeviceGet(int *device, int i) { *device = 10 + i; return 0; }
#ifndef OLD
int cuDeviceCanAccessPeer(int *can, int device, int peer) { *can = !(device == FROM && peer == TO); return 0; }
#endif
"""

_STATE = """
import json, os
import ggml_cffi as ggml
from ggml_cffi.c import cuda_peers
before = os.environ.get("GGML_CUDA_P2P")
ggml.devices()
print(json.dumps([before, os.environ.get("GGML_CUDA_P2P"), cuda_peers.state(), cuda_peers.all_reach()]))
"""


@pytest.fixture
def core(tmp_path, monkeypatch):
    """Return a folder with the core and a CUDA plug-in, in an environment without settings for it."""
    for name in ("GGML_CUDA_P2P", "GGML_CFFI_CUDA_P2P", "GGML_BACKEND_PATH", "GGML_CFFI_BACKENDS"):
        monkeypatch.delenv(name, raising=False)
    folder = copy_libraries(tmp_path / "core", plugins=())
    compile_stub(folder / "libggml-cuda.so", DEVICES=2)
    monkeypatch.setenv("GGML_CFFI_LIBRARY_PATH", str(folder))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    return folder


def compile_driver(core, **macros):
    """Compile a driver into the folder of ``LD_LIBRARY_PATH``. One pair of its devices may not reach one another."""
    defines = [f"-D{name}={value}" for name, value in {"INIT": 0, "DEVICES": 4, "FROM": 0, "TO": 0, **macros}.items()]
    command = ["cc", "-shared", "-fPIC", *defines, "-o", str(core.parent / "libcuda.so.1"), "-x", "c", "-"]
    subprocess.run(command, input=_DRIVER, text=True, check=True)


def state(*, alone=False, **env):
    """Return ggml's variable before and after the plug-in is loaded, and the state in words."""
    before, after, words, all_reach = json.loads(run_python(_STATE, **env).stdout)
    assert all_reach == (alone or "all 4 devices reach one another" in words)
    return [before, after, words]


def test_peer_access_is_on_where_all_devices_reach_one_another(core):
    compile_driver(core)
    assert state() == [None, "1", "on: all 4 devices reach one another"]


def test_one_pair_that_cannot_reach_one_another_leaves_it_off(core):
    compile_driver(core, FROM=12, TO=11)
    assert state() == [None, None, "off: CUDA device 2 cannot reach device 1"]


@pytest.mark.parametrize("devices", [0, 1])
def test_one_device_needs_none(core, devices):
    compile_driver(core, DEVICES=devices)
    assert state(alone=devices == 1) == [None, None, ""]


def test_it_is_off_if_the_driver_does_not_tell(core):
    compile_driver(core, INIT=100)
    text = "off: the driver does not tell whether devices reach one another"
    assert state() == [None, None, f"{text} (CUDA error 100)"]
    compile_driver(core, OLD=1)
    after, words = state()[1:]
    assert after is None
    assert words.startswith(f"{text} (")
    assert "cuDeviceCanAccessPeer" in words


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_the_variable_of_the_user_is_kept(core, value):
    """ggml looks only whether the variable is set."""
    compile_driver(core)
    words = "on: all 4 devices reach one another ($GGML_CUDA_P2P is set)"
    assert state(GGML_CUDA_P2P=value) == [value, value, words]
    assert state(GGML_CUDA_P2P=value, GGML_CFFI_CUDA_P2P="0") == [value, value, words]
    compile_driver(core, FROM=12, TO=11)
    words = "on: CUDA device 2 cannot reach device 1 ($GGML_CUDA_P2P is set)"
    assert state(GGML_CUDA_P2P=value) == [value, value, words]


def test_the_switch_turns_it_off(core):
    compile_driver(core)
    assert state(GGML_CFFI_CUDA_P2P="0") == [None, None, "off: $GGML_CFFI_CUDA_P2P is 0"]


def test_without_the_plugin_no_driver_is_asked(core):
    compile_driver(core)
    assert state(GGML_CFFI_BACKENDS="") == [None, None, ""]


def test_devices_and_doctor_tell_the_state(core):
    compile_driver(core)
    text = "CUDA peer access is on: all 4 devices reach one another"
    assert f"\n{text}.\n" in run("devices").stdout
    assert f"\n  -    {text}\n" in run("doctor").stdout
    assert json.loads(run("doctor", "--json").stdout)["peer_access"] == "on: all 4 devices reach one another"
