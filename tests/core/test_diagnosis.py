"""The facts of ``ggml-cffi doctor`` about this machine."""

from pathlib import Path

import ggml_cffi as ggml
from ggml_cffi.c import library
from ggml_cffi.core.device import gpus
from ggml_cffi.core.diagnosis import collect, vulkan_features
from tests.support import run_python


def test_the_facts_are_those_of_the_library_and_of_the_devices():
    found = collect()
    assert (found.library.version, found.library.folder) == (library.version(), library.location())
    assert found.library.error == found.plugins_error == ""
    assert list(found.plugins) == library.plugins()
    assert [d.name for d in found.devices] == [d.name for d in ggml.devices()]
    assert found.gpus == tuple(d.name for d in gpus())
    for facts in found.devices:
        d = ggml.device(facts.name)
        assert (facts.type, facts.description, facts.pci_id) == (d.type.name, d.description, d.pci_id)
        assert (facts.capabilities, facts.memory_total) == (d.capabilities, d.memory().total)
        assert bool(facts.features) == (facts.backend == "Vulkan")
    assert found.cpu.description == found.devices[-1].description
    assert Path(found.cpu.file).exists()
    assert found.cpu.threads >= 1
    assert set(found.python.packages) == {"cffi", "numpy"}


def test_the_package_and_the_command_do_not_import_it():
    done = run_python("import sys, ggml_cffi.cli; print(*sys.modules)")
    imported = set(done.stdout.split())
    assert "ggml_cffi.cli.doctor" in imported
    assert not {f"ggml_cffi.core.{name}" for name in ("diagnosis", "gaps", "vulkan_setup")} & imported


def test_the_environment_has_the_variables_that_matter(tmp_path):
    environ = {"VK_DRIVER_FILES": str(tmp_path / "x"), "GGML_VK_VISIBLE_DEVICES": "", "HOME": "/", "SECRET": "1"}
    found = collect(environ=environ, root=tmp_path)
    assert found.environment == {"GGML_VK_VISIBLE_DEVICES": "", "VK_DRIVER_FILES": str(tmp_path / "x")}
    assert [d.manifest for d in found.vulkan.drivers] == [str(tmp_path / "x")]
    assert found.vulkan.cards == ()


def test_without_a_usable_library_the_other_facts_are_there(tmp_path):
    done = run_python(
        "import ggml_cffi.c.library as lib\n"
        f"lib.places = lambda: iter([('$GGML_CFFI_LIBRARY_PATH', {str(tmp_path)!r})])\n"
        "from ggml_cffi.core.diagnosis import collect\n"
        "found = collect()\n"
        "print(found.library.refused[0].reason, found.devices, found.cpu, bool(found.vulkan.loader.file))\n"
        "print(found.library.error)\n"
    )
    first, *error = done.stdout.splitlines()
    assert first == "no libggml-base.so.0 in it () None True"
    assert error[0].startswith("no usable libggml was found")


def test_a_plugin_that_crashed_is_told_with_its_end():
    names = [plugin.name for plugin in library.plugins()]
    found = collect(dict.fromkeys(names, "SIGSEGV"))
    assert [p.name for p in found.plugins] == names
    assert all(p.reason == "loading it ends the process (SIGSEGV)" and not p.loaded for p in found.plugins)


def test_features_are_read_from_the_messages_of_the_plugin():
    line = "ggml_vulkan: {} = a | b (driver) | uma: 0 | fp16: dot2 | int dot: 1 | matrix cores: NV_coopmat2"
    messages = ["ggml_vulkan: Found 2 Vulkan devices:", line.format(0), line.format(1), "Warning: Device type is CPU."]
    features = {"uma": "0", "fp16": "dot2", "int_dot": "1", "matrix_cores": "NV_coopmat2"}
    assert vulkan_features(messages) == {"Vulkan0": (features, False), "Vulkan1": (features, True)}
