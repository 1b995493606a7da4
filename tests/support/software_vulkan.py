"""Settings for a software Vulkan device (Mesa's lavapipe), so that tests with cold shader caches take minutes.

Lavapipe compiles every shader with LLVM when it is first used. Three settings make that fast: a driver with a recent
LLVM (``tools/system.sh`` installs it), no optimization, and a free processor for the compiler. ggml polls the
device in a loop, which takes one of two processors from the compiler, so a Vulkan layer makes ggml sleep instead.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

#: Manifest of the driver that ``tools/system.sh`` installs on Debian 12.
DRIVER = Path("/usr/local/share/ggml_cffi/vulkan/lvp_icd.json")


def use() -> None:
    """Set the environment for a software device with two logical devices; child processes inherit it."""
    os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0,0")
    os.environ.setdefault("GALLIVM_PERF", "nopt")
    if DRIVER.exists():
        os.environ.setdefault("VK_DRIVER_FILES", str(DRIVER))
    _sleep_while_waiting()


def _sleep_while_waiting() -> None:
    """Compile the Vulkan layer of ``patient_layer.c`` and add it to the loader's, where there is a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None or "VK_INSTANCE_LAYERS" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="ggml_cffi_layer"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(__file__).with_name("patient_layer.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", folder / "patient.so", source], check=True)
    layer = {
        "name": "VK_LAYER_GGML_CFFI_patient",
        "type": "GLOBAL",
        "library_path": "./patient.so",
        "api_version": "1.3.0",
        "implementation_version": "1",
        "description": "sleeps while it waits for fences",
    }
    (folder / "patient.json").write_text(json.dumps({"file_format_version": "1.1.2", "layer": layer}))
    os.environ["VK_ADD_LAYER_PATH"] = str(folder)
    os.environ["VK_INSTANCE_LAYERS"] = layer["name"]
