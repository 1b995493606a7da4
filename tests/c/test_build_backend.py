"""``build_lib.sh --backend``: the plug-in comes beside a core, and stays there. A script stands in for CMake."""

import subprocess

import pytest

from ggml_cffi.c import library
from tests.support import ROOT
from tests.support.libraries import copy_libraries

_CMAKE = """#!/bin/sh
case $1 in
    --version) ;;
    --build) mkdir -p "$2/bin"; cp /bin/true "$2/bin/libggml-$PLUGIN.so"; echo build >>"$COUNT" ;;
    *) echo "$@" >>"$COUNT" ;;
esac
"""


class Builder:
    """The script with a cache and a folder of its own."""

    def __init__(self, folder):
        self.out, self.count = folder / "lib", folder / "count"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        (bin_folder / "cmake").write_text(_CMAKE)
        (bin_folder / "cmake").chmod(0o755)
        self.env = {
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "HOME": str(folder),
            "COUNT": str(self.count),
            "PLUGIN": "blas",
            "GGML_CFFI_CACHE": str(folder / "cache"),
        }

    def run(self, *arguments, code=0):
        command = [ROOT / "build_lib.sh", "--out", self.out, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.env)
        assert done.returncode == code, done.stderr
        return done.stderr

    @property
    def calls(self):
        return self.count.read_text().splitlines() if self.count.exists() else []


@pytest.fixture
def builder(tmp_path):
    if not (ROOT / "vendor" / "ggml" / library.version() / "LICENSE").exists():
        pytest.skip("needs the source of the loaded version: ./build_lib.sh --source-only")
    made = Builder(tmp_path)
    copy_libraries(made.out)
    return made


BLAS = ("--version", library.version(), "--backend", "blas")


def test_only_the_plugin_is_built_and_comes_beside_the_core(builder):
    before = {file.name: file.stat().st_mtime_ns for file in builder.out.iterdir()}
    builder.run(*BLAS, "--", "-DGGML_BLAS_VENDOR=OpenBLAS")
    configure, build = builder.calls
    assert build == "build"
    assert {"-DGGML_BLAS=ON", "-DGGML_BACKEND_DL=ON", "-DGGML_BLAS_VENDOR=OpenBLAS"} <= set(configure.split())
    after = {file.name: file.stat().st_mtime_ns for file in builder.out.iterdir()}
    assert set(after) - set(before) == {"libggml-blas.so", "BUILD"}
    assert {name: after[name] for name in before} == before
    name, built, added, tree = (builder.out / "BUILD").read_text().split()
    assert (name, built[:5], added, len(tree)) == ("blas", "blas-", "added", 64)


def test_the_plugin_of_cuda_has_cuda_graphs(builder, tmp_path):
    """ggml leaves them out by default, and tensor parallelism then decodes at half the speed."""
    nvcc, lib = tmp_path / "cuda" / "bin" / "nvcc", tmp_path / "cuda" / "lib64"
    for folder in (nvcc.parent, lib):
        folder.mkdir(parents=True)
    top = f'echo "#\\$ TOP={nvcc.parents[1]}"'
    nvcc.write_text(f'#!/bin/sh\ncase $1 in -dryrun) {top} ;; *) echo "tools, release 13.0, V13" ;; esac\n')
    nvcc.chmod(0o755)
    for name in ("cudart.so.13", "cublas.so.13", "cublasLt.so.13", "cuda.so.1"):
        (lib / f"lib{name}").touch()
    builder.env |= {"NVCC": str(nvcc), "PLUGIN": "cuda"}
    builder.run("--version", library.version(), "--cuda-arch", "90-real")
    configure = builder.calls[0].split()
    wanted = {
        "-DGGML_CUDA=ON",
        "-DGGML_CUDA_GRAPHS=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        "-DCMAKE_CUDA_ARCHITECTURES=90-real",
    }
    assert wanted <= set(configure)
    assert (builder.out / "libggml-cuda.so").exists()


def test_the_same_flags_are_built_once_and_others_again(builder):
    for _ in range(2):
        builder.run(*BLAS, "--", "-DGGML_BLAS_VENDOR=OpenBLAS")
    assert builder.calls.count("build") == 1
    builder.run(*BLAS, "--", "-DGGML_BLAS_VENDOR=Generic")
    assert builder.calls.count("build") == 2
    assert len((builder.out / "BUILD").read_text().splitlines()) == 1


def test_an_unknown_backend_raises_with_the_names_of_all(builder):
    text = builder.run("--version", library.version(), "--backend", "rocm", code=1)
    assert f"ggml {library.version()} has no backend rocm; it has: blas cann cuda" in text
    assert not builder.calls


def test_a_core_of_another_version_is_refused(builder, tmp_path):
    version = library.version().encode() + b"\0"
    copy_libraries(builder.out, changed=[(version, b"9" + version[1:])])
    assert f"is of ggml 9{library.version()[1:]}: give --version" in builder.run(*BLAS, code=1)
    assert not builder.calls
