"""The loader: the time of loading, the search path, and the error message if nothing is found."""

import re
import shutil
import subprocess
import sys

import pytest

import ggml_cffi
from ggml_cffi import c
from ggml_cffi.c import library
from ggml_cffi.c.places import places, wheel
from ggml_cffi.c.versions import SINCE, VERSIONS
from tests.support import ROOT, run_python
from tests.support.libraries import compile_source, copy_libraries

_NO_OTHER_PLACE = """
import ggml_cffi.c.library as lib
real = lib.places
lib.places = lambda: (p for p in real() if p[0].startswith("$"))
"""


def test_import_loads_no_library_and_no_driver():
    done = run_python(
        "import ggml_cffi, ggml_cffi.c, ggml_cffi.models\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libggml' not in maps and 'libvulkan' not in maps, maps\n"
        "ggml_cffi.Context().close()\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libggml-base' in maps and 'libvulkan' not in maps\n"
    )
    assert done.stderr.count("Error") == 0


@pytest.mark.parametrize("numbers", ["99", "99,98", ""])
def test_a_number_that_no_device_has_means_the_cpu_and_silence(numbers):
    code = "import ggml_cffi as ggml\nwith ggml.Session() as s: print(*ggml.devices(), s, sep='\\n')"
    done = run_python(code, GGML_VK_VISIBLE_DEVICES=numbers)
    assert done.stderr == ""
    assert re.fullmatch(r"<Device CPU: .*>\n<Session CPU>\n", done.stdout)


def test_other_lines_on_standard_error_are_kept_while_a_driver_is_loaded():
    code = (
        "import logging, os, sys\n"
        "from ggml_cffi.c import log, library\n"
        "library.load('base')\n"
        "logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format='%(levelname)s %(message)s')\n"
        "with log.without_missing_devices():\n"
        "    os.write(2, b'kept\\nggml_vulkan: Invalid device index 77 in GGML_VK_VISIBLE_DEVICES.\\nkept too\\n')\n"
        "with log.without_missing_devices():\n"
        "    library.load('ggml').ggml_backend_load(b'/none.so')\n"  # another error keeps its level
    )
    done = run_python(code, GGML_VK_VISIBLE_DEVICES="77")
    assert done.stderr == "kept\nkept too\n"
    assert "DEBUG ggml_vulkan: Invalid device index 77 in GGML_VK_VISIBLE_DEVICES." in done.stdout
    assert "ERROR load_backend: failed to load /none.so" in done.stdout


@pytest.mark.parametrize("numbers", ["0,0", "15", ""])
def test_the_last_words_of_a_driver_are_kept_where_every_number_may_be_a_device(numbers):
    code = (
        "import os\n"
        "from ggml_cffi.c import log, library\n"
        "library.load('base')\n"
        "with log.without_missing_devices():\n"
        "    os.write(2, b'the driver aborts\\n')\n"
        "    os._exit(3)\n"
    )
    done = run_python(code, check=False, GGML_VK_VISIBLE_DEVICES=numbers)
    assert (done.returncode, done.stderr) == (3, "the driver aborts\n")


def test_nothing_found_lists_every_place_and_the_remedy(tmp_path):
    done = run_python(
        f"{_NO_OTHER_PLACE}\nfrom ggml_cffi import Context\n"
        "try:\n    Context()\nexcept ImportError as error:\n    print(type(error).__name__, error)\n",
        GGML_CFFI_LIBRARY_PATH=f"{tmp_path}:{tmp_path / 'missing'}",
    )
    text = done.stdout
    assert text.startswith("LibraryNotFoundError")
    assert f"{tmp_path}\n" in text
    assert "libggml-base.so.0 in it" in text
    assert "no such folder" in text
    assert "pip install libggml-python" in text
    assert "build_lib.sh" in text


def test_another_version_is_a_mismatch(tmp_path):
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler to make a library of another version")
    source = tmp_path / "fake.c"
    source.write_text('const char *ggml_version(void) { return "0.19.0"; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libggml-base.so.0", source], check=True)
    done = run_python(
        f"{_NO_OTHER_PLACE}\nfrom ggml_cffi import Context\n"
        "try:\n    Context()\nexcept ImportError as error:\n    print(type(error).__name__, error)\n",
        GGML_CFFI_LIBRARY_PATH=str(tmp_path),
    )
    assert done.stdout.startswith("LibraryMismatchError")
    assert "it is version 0.19.0; supported are 0.20.2 to 0.27" in done.stdout


_VERSION = """
from ggml_cffi import c, Context
try:
    Context().close()
    print(c.GGML_VERSION, c.library.declarations())
except ImportError as error:
    print(type(error).__name__, error)
"""


def version_of(folder):
    """Return what a new process prints that finds libraries in ``folder`` only, and its messages."""
    done = run_python(f"{_NO_OTHER_PLACE}\n{_VERSION}", GGML_CFFI_LIBRARY_PATH=str(folder))
    return done.stdout, done.stderr


def version_bytes(version):
    return version.encode() + b"\0"


def test_an_unknown_patch_is_used_like_the_version_before_it_with_a_warning(tmp_path):
    loaded = library.version()
    unknown = f"{loaded.rpartition('.')[0]}.9"
    copy_libraries(tmp_path, changed=[(version_bytes(loaded), version_bytes(unknown))])
    printed, messages = version_of(tmp_path)
    assert printed.split() == [unknown, library.declarations()]
    assert f"ggml {unknown} is none of the versions that ggml_cffi was made for" in messages


def test_an_unknown_version_that_lacks_functions_of_an_older_one_is_refused(tmp_path):
    newest = VERSIONS[-1]
    if library.declarations() == newest:
        pytest.skip(f"needs a library older than {newest}")
    unknown = f"{newest.rpartition('.')[0]}.9"
    copy_libraries(tmp_path, changed=[(version_bytes(library.version()), version_bytes(unknown))])
    printed, _ = version_of(tmp_path)
    assert "LibraryMismatchError" in printed
    assert f"version {unknown} has no ggml_" in printed


def test_versions_outside_the_range_are_refused_with_the_range(tmp_path):
    copy_libraries(tmp_path, changed=[(version_bytes(library.version()), version_bytes("0.28.0"))])
    printed, _ = version_of(tmp_path)
    assert printed.startswith("LibraryMismatchError")
    assert "it is version 0.28.0; supported are 0.20.2 to 0.27" in printed


@pytest.mark.parametrize(
    ("tensor", "traits", "message"),
    [
        (344, 56, "its ggml_tensor takes 344 bytes, not 336"),
        (336, 64, "its ggml_type_traits takes 64 bytes, not 56"),
    ],
)
def test_structs_of_another_size_are_refused(tmp_path, tensor, traits, message):
    source = f"""
        const char *ggml_version(void) {{ return "{VERSIONS[-1].rpartition(".")[0]}.9"; }}
        unsigned long ggml_tensor_overhead(void) {{ return {tensor} + 32; }}
        const void *ggml_get_type_traits(int type) {{ static char table[2][{traits}]; return table[type]; }}
    """
    compile_source(tmp_path / "libggml-base.so.0", source)
    printed, _ = version_of(tmp_path)
    assert printed.startswith("LibraryMismatchError")
    assert message in printed


def test_the_places_are_searched_in_the_documented_order(monkeypatch, tmp_path):
    monkeypatch.setenv("GGML_CFFI_LIBRARY_PATH", f"{tmp_path}:/other")
    labels = list(dict.fromkeys(label for label, _ in places()))
    expected = ["$GGML_CFFI_LIBRARY_PATH", "the package's own libraries (build_lib.sh)", "the libggml-python wheel"]
    expected += ["the environment's libraries", "Homebrew's libraries", "the system's libraries"]
    assert labels == [label for label in expected if label in labels]
    assert {*expected[:2], expected[3], expected[5]} <= set(labels)
    assert [folder for _, folder in places()][:2] == [str(tmp_path), "/other"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's loader reads LD_LIBRARY_PATH")
def test_the_systems_libraries_are_used_with_the_plugins_in_debians_folder(tmp_path):
    copy_libraries(tmp_path)
    folder = tmp_path / "ggml" / "backends0"
    folder.mkdir(parents=True)
    for plugin in tmp_path.glob("libggml-rpc*"):
        plugin.rename(folder / plugin.name)
    done = run_python(
        "import ggml_cffi.c.library as lib\nreal = lib.places\n"
        "lib.places = lambda: (p for p in real() if p[0].startswith('the system'))\n"
        "print(lib.location(), lib.place_label(), sorted(lib.plugin_files()), sep='|')",
        LD_LIBRARY_PATH=str(tmp_path),
    )
    plugins = ["rpc"] if any(folder.iterdir()) else []
    assert done.stdout.strip() == f"{tmp_path}|the system's libraries|{plugins}"


def test_an_unknown_version_with_other_operations_is_refused(tmp_path):
    loaded = library.version()
    unknown = f"{loaded.rpartition('.')[0]}.9"
    texts = [(version_bytes(loaded), version_bytes(unknown)), (b"\0OUT_PROD\0", b"\0IN_PROD_\0")]
    copy_libraries(tmp_path, changed=texts)
    printed, _ = version_of(tmp_path)
    assert f"version {unknown} calls number" in printed
    assert "IN_PROD_, not OUT_PROD" in printed


def test_plugins_are_found_in_debians_folder_of_backends_and_in_ggml_backend_path(tmp_path):
    core, elsewhere = tmp_path / "core", tmp_path / "elsewhere"
    copy_libraries(core)
    folder = core / "ggml" / "backends0"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    plugin = next(core.glob("libggml-rpc*"), None)
    if plugin is None:
        pytest.skip("needs the RPC plug-in, which the libggml-python wheel does not have")
    code = "from ggml_cffi.c import library; print(library.available('rpc'))"
    plugin = plugin.rename(folder / plugin.name)
    assert run_python(code, GGML_CFFI_LIBRARY_PATH=str(core)).stdout.strip() == "True"
    plugin = plugin.rename(elsewhere / plugin.name)
    assert run_python(code, GGML_CFFI_LIBRARY_PATH=str(core)).stdout.strip() == "False"
    for given in (plugin, elsewhere):
        done = run_python(code, GGML_CFFI_LIBRARY_PATH=str(core), GGML_BACKEND_PATH=str(given))
        assert done.stdout.strip() == "True"


def test_a_function_that_the_version_lacks_names_the_version_that_has_it():
    name = next(n for n, v in SINCE.items() if v == VERSIONS[-1])
    if library.provides(name):
        pytest.skip(f"needs a library older than {VERSIONS[-1]}")
    with pytest.raises(
        ggml_cffi.LibraryMismatchError, match=rf"{name} needs ggml {VERSIONS[-1]} or newer; loaded is ggml"
    ):
        getattr(c, name)
    with pytest.raises(ggml_cffi.LibraryMismatchError, match=r"this feature needs ggml"):
        library.require(name, "this feature")


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_the_advice_for_a_missing_function_is_to_build_only_a_version_that_can_be_built(version):
    newest_built = re.search(r"\(default: ([\d.]+)\)", build_help())[1]
    name = next(n for n, v in SINCE.items() if v == version)
    if library.provides(name):
        pytest.skip(f"needs a library older than {version}")
    with pytest.raises(ggml_cffi.LibraryMismatchError) as raised:
        library.require(name, "this feature")
    can_build = VERSIONS.index(version) <= VERSIONS.index(newest_built)
    assert ("build the newest with ./build_lib.sh" in str(raised.value)) == can_build
    assert (f"build_lib.sh builds {newest_built} at most" in str(raised.value)) != can_build


def test_the_environment_variable_comes_first(tmp_path):
    copy_libraries(tmp_path)
    done = run_python(
        "from ggml_cffi.c import library; print(library.location(), library.available('vulkan'))",
        GGML_CFFI_LIBRARY_PATH=str(tmp_path),
    )
    assert done.stdout.split() == [str(tmp_path), "False"]


@pytest.mark.skipif(not wheel(), reason="needs the libggml-python wheel, which a distribution's package leaves out")
def test_the_prebuilt_wheel_is_enough():
    done = run_python(
        "import ggml_cffi.c.library as lib\nreal = lib.places\n"
        "lib.places = lambda: (p for p in real() if 'wheel' in p[0])\n"
        "import ggml_cffi\nprint([d.name for d in ggml_cffi.devices()])\n"
    )
    assert done.stdout.strip() == "['CPU']"


def test_a_missing_plugin_says_how_to_get_it(tmp_path):
    copy_libraries(tmp_path)
    for plugin in tmp_path.glob("libggml-rpc*"):
        plugin.unlink()
    done = run_python(
        "from ggml_cffi.c import library\n"
        "try:\n    library.load('rpc')\nexcept ImportError as error:\n    print(error)\n",
        GGML_CFFI_LIBRARY_PATH=str(tmp_path),
    )
    assert "rpc plug-in" in done.stdout
    assert "build_lib.sh" in done.stdout


def test_messages_of_the_library_reach_logging():
    done = run_python(
        "import logging; logging.basicConfig(level=logging.DEBUG, format='%(name)s %(levelname)s')\n"
        "from ggml_cffi import c\n"
        "assert not c.ggml_backend_load(b'/nonexistent.so')\n"
    )
    assert "ggml_cffi.ggml ERROR" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["--nonsense"], {}, "unknown option --nonsense"),
        (["--source-only"], {"GGML_SOURCE_DIR": "."}, "holds no CMakeLists.txt"),
        (["--version", "0.19.0"], {}, "0.19.0 is not in vendor/versions.txt, which has: 0.20.2 0.25.3 0.27.0"),
        (["--version", "0.27.0"], {}, "of ggml 0.27.0 there are only headers"),
        (["--cuda"], {"NVCC": "/no/nvcc"}, "no CUDA compiler (/no/nvcc); install CUDA's toolkit (package cuda-toolkit"),
        (["--cuda-arch", "90-real"], {"NVCC": "/no/nvcc"}, "no CUDA compiler"),
        (["--backend", "vulkan"], {}, "the vulkan backend is built without --backend"),
        (["--portable", "--backend", "blas"], {}, "--backend builds for this machine"),
        (["--native", "--", "-DGGML_BLAS=ON"], {}, "the flags after -- are for --backend"),
    ],
)
def test_the_build_script_names_the_error(arguments, env, message):
    done = subprocess.run(
        [ROOT / "build_lib.sh", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env},
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_build_script_refuses_another_tree(tmp_path):
    tree = tmp_path / "ggml"
    for name in ("cmake", "include", "src"):
        (tree / name).mkdir(parents=True)
        (tree / name / "x").write_text("not ggml")
    (tree / "CMakeLists.txt").write_text("")
    (tree / "ggml.pc.in").write_text("")
    done = subprocess.run(
        [ROOT / "build_lib.sh", "--source-only"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "GGML_SOURCE_DIR": str(tree)},
    )
    assert done.returncode != 0
    assert "not ggml 0.25.3 as pinned in vendor/versions.txt" in done.stderr
    assert re.search(r"its tree digest is [0-9a-f]{64}", done.stderr)


def test_all_checkouts_build_the_same_libraries(tmp_path):
    """Else the libraries of a wheel would also tell where they were built, in each message of ggml."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a compiler")
    made = []
    for name in ("here", "elsewhere"):
        tree, build = tmp_path / name, tmp_path / "build"
        (tree / "src").mkdir(parents=True)
        (tree / "CMakeLists.txt").write_text("add_library(told SHARED src/told.c src/told2.cpp)\n")
        (tree / "src" / "told.c").write_text("const char *told(void) { return __FILE__; }\n")
        (tree / "src" / "told2.cpp").write_text("const char *told2() { return __FILE__; }\n")
        for command in (["-S", ROOT / "vendor", "-B", build, f"-DGGML_TREE={tree}"], ["--build", build]):
            subprocess.run(["cmake", *command], check=True, capture_output=True)
        made.append((build / "ggml" / "libtold.so").read_bytes())
        shutil.rmtree(build)
    assert made[0] == made[1]
    assert all(f"ggml/src/{file}\0".encode() in made[0] for file in ("told.c", "told2.cpp"))


def build_help():
    return subprocess.run([ROOT / "build_lib.sh", "--help"], capture_output=True, text=True, check=True).stdout


def test_build_script_prints_help():
    printed = build_help()
    for option in (
        "--cuda",
        "--backend",
        "--version",
        "--native",
        "--portable",
        "--arch",
        "--out",
        "VULKAN_SDK",
        "GGML_SOURCE_DIR",
    ):
        assert option in printed


def test_import_loads_no_slow_module():
    """Modules that import slowly, and that few calls need, are imported by those calls."""
    done = run_python("import sys, numpy; a = set(sys.modules); import ggml_cffi; print(*sorted(set(sys.modules) - a))")
    assert not {"asyncio", "concurrent.futures", "socket", "ssl", "logging", "tokenizers"} & set(done.stdout.split())
