"""``tools/system.sh`` as a user who must not change the system, in a root folder that the test makes up."""

import os
import subprocess

import pytest

from tests.support import ROOT

NO_LOADER = "system: no Vulkan loader (libvulkan1): ggml will use the CPU only"
NO_DRIVER = "system: no Vulkan driver: ggml will use the CPU only (mesa-vulkan-drivers has a software device)"
DRIVER = "usr/share/vulkan/icd.d/radeon_icd.json"


class System:
    """A root folder, and the commands that the script asks about the system."""

    def __init__(self, folder):
        self.root, self.commands = folder / "root", folder / "bin"
        self.root.mkdir()
        self.commands.mkdir()
        self.command("id", "echo 1000")
        self.command("uname", "echo Linux")
        for name in ("c++", "python3", "ldconfig"):
            self.command(name, "exit 0")

    def command(self, name, line):
        file = self.commands / name
        file.write_text(f"#!/bin/sh\n{line}\n")
        file.chmod(0o755)

    def add(self, *files):
        for name in files:
            file = self.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def messages(self):
        path = f"{self.commands}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHON": "python3", "SYSTEM_ROOT": str(self.root)}
        done = subprocess.run([ROOT / "tools" / "system.sh"], check=True, capture_output=True, text=True, env=env)
        assert done.stdout == ""
        return done.stderr.splitlines()


@pytest.fixture
def system(tmp_path):
    return System(tmp_path)


def test_a_machine_with_a_loader_and_a_driver_needs_nothing(system):
    system.add(DRIVER, "usr/lib/x86_64-linux-gnu/libvulkan.so.1")
    assert system.messages() == []


def test_a_loader_that_only_the_linker_knows_is_found(system):
    system.add(DRIVER)
    system.command("ldconfig", "echo '\tlibvulkan.so.1 (libc6,x86-64) => /opt/lib/libvulkan.so.1'")
    assert system.messages() == []


def test_the_loader_of_a_program_is_none_of_the_systems(system):
    system.add(DRIVER, "usr/lib/chromium/libvulkan.so.1")
    assert system.messages() == [NO_LOADER]


def test_a_machine_without_loader_and_driver_is_told_of_both(system):
    assert system.messages() == [NO_LOADER, NO_DRIVER]


def test_a_manifest_of_the_administrator_is_a_driver(system):
    system.add("etc/vulkan/icd.d/mine.json", "usr/lib/aarch64-linux-gnu/libvulkan.so.1")
    assert system.messages() == []
