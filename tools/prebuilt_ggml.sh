#!/usr/bin/env bash
# Runs tests with the prebuilt ggml of the libggml-python wheel (0.20.2, CPU only) in a virtual environment of its own, with
# a copy of the sources that has no libraries of build_lib.sh. Both are in the cache folder.
#
#     tools/prebuilt_ggml.sh [PYTEST ARGUMENTS...]
set -euo pipefail

source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case ${1:-} in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
. "$source_dir/tools/version_tests.sh"
root=$cache/prebuilt python=$cache/prebuilt/venv/bin/python
copy_source "$root/src"
[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$root/venv"
# Without libraries in the sources, the package depends on the wheel.
"$python" -m pip install -q --disable-pip-version-check -e "$root/src" "${test_packages[@]}"
unset GGML_CFFI_LIBRARY_PATH
export GGML_VK_VISIBLE_DEVICES=99 # the wheel has no Vulkan: tests of GPUs skip
cd "$root/src"
"$python" -m ggml_cffi --version
[ $# -gt 0 ] || set -- "${tests[@]}" --deselect=tests/rpc # the wheel has no RPC plug-in
exec "$python" "${pytest[@]}" "$@"
