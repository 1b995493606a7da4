# The tests that debian_ggml.sh and prebuilt_ggml.sh run with versions of ggml other than that of build_lib.sh. They source
# this file and set source_dir.
# shellcheck shell=bash disable=SC2034,SC2154

cache=${GGML_CFFI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ggml_cffi}
test_packages=(gguf mypy safetensors hypothesis pexpect pytest pytest-timeout pytest-xdist pycparser
    huggingface_hub jsonschema llguidance pydantic)
tests=(-m "not nightly" tests/test_smoke.py tests/c tests/codegen tests/core tests/ops tests/scheduler tests/session tests/models tests/rpc)
pytest=(-m pytest -q -n 2 --dist worksteal -p no:cacheprovider)

copy_source() { # folder: it gets the tracked files, so no libraries of build_lib.sh
    rm -rf "$1"; mkdir -p "$1"
    (cd "$source_dir" && git ls-files -z | tar --null -T - -c) | tar -x -C "$1"
}
