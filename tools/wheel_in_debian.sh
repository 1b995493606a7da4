#!/usr/bin/env bash
# Installs a wheel in a root folder of Debian without a compiler, and runs the smoke tests there on the CPU and on the
# Vulkan devices that there are. As root on Debian or Ubuntu only. The machine's system does not change, apart from
# debootstrap itself. Debian 11 (bullseye) has no Python of this package: CPython is compiled in a second root.
#
# With --arch, Debian of another processor, whose programs qemu-user runs (package qemu-user-static): on the CPU only.
#
#     tools/wheel_in_debian.sh [--suite bookworm] [--arch arm64] [--root FOLDER] WHEEL [MODEL.gguf]
set -euo pipefail

say() { printf 'wheel_in_debian: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
suite=bookworm arch="" root=""
while [ $# -gt 0 ]; do
    case $1 in
        --suite) suite=${2:?--suite needs a name}; shift 2 ;;
        --arch) arch=${2:?--arch needs a name of Debian, such as arm64}; shift 2 ;;
        --root) root=${2:?--root needs a folder}; shift 2 ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) break ;;
    esac
done
wheel=$(realpath "${1:?needs a wheel}") model=${2:-}
cache=${GGML_CFFI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ggml_cffi}
root=${root:-$cache/wheel-$suite${arch:+-$arch}}
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "needs root on Debian or Ubuntu"
site=$(apt-get indextargets --format '$(LABEL) $(SITE)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }')
[ -n "$site" ] || fail "no Debian mirror is configured"

make_root() { # folder, packages
    [ ! -f "$1/.complete" ] || return 0
    command -v debootstrap >/dev/null || apt-get -qq install -y --no-install-recommends debootstrap >/dev/null
    say "making a root of Debian $suite in $1"
    rm -rf "$1"; mkdir -p "$1"
    # The script of sid serves suites that are newer than debootstrap.
    debootstrap ${arch:+--arch="$arch" --foreign} --variant=minbase --include="$2" "$suite" "$1" "$site" /usr/share/debootstrap/scripts/sid >"$1.log" 2>&1 ||
        fail "debootstrap failed; its output: $1.log"
    touch "$1/.complete"
}

compile_python() { # of Debian 12's sources, in a root of its own, into /opt/python of $root
    local build=$root-compiler work
    make_root "$build" ca-certificates,gcc,libc6-dev,make,libffi-dev,zlib1g-dev,libssl-dev
    say "compiling Python 3.11"
    work=$build/src; rm -rf "$work"; mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site bookworm main" >"$work/sources.list"
    local apt=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=)
    (cd "$work" && apt-get "${apt[@]}" update && apt-get "${apt[@]}" source --download-only python3.11 &&
        tar -xzf python3.11_*.orig.tar.gz --strip-components=1)
    chroot "$build" sh -c 'cd /src && ./configure -q --prefix=/opt/python --disable-test-modules && make -s && make -s install' \
        >"$build.log" 2>&1 || fail "Python cannot be compiled; the output: $build.log"
    mkdir -p "$root/opt"; cp -a "$build/opt/python" "$root/opt/"
}

# The smoke tests with each variant of the CPU backend. Only Python runs in the root, which is unpacked but not configured.
run_foreign() {
    local processor qemu version file libraries=/src/packages/ggml_cffi/lib chosen=()
    case $arch in arm64) processor=aarch64 ;; *) processor=$arch ;; esac
    qemu=$(command -v "qemu-$processor-static") || fail "needs qemu-$processor-static; install qemu-user-static"
    make_root "$root" ca-certificates,python3,libvulkan1
    if [ ! -x "$root/qemu" ]; then
        for file in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$file" "$root"; done
        cp "$qemu" "$root/qemu"
    fi
    version=$(cd "$root/usr/bin" && ls python3.?*[0-9])
    rm -rf "$root/src"; mkdir -p "$root/src/packages"
    python3 -m pip install -q --disable-pip-version-check --only-binary=:all: --platform "manylinux_2_28_$processor" \
        --platform "manylinux_2_17_$processor" --platform any --python-version "${version#python}" \
        --target "$root/src/packages" "$wheel" pytest
    cp -r "$source_dir/tests" "$root/src/"; [ -z "$model" ] || cp "$model" "$root/src/model.gguf"
    mountpoint -q "$root/proc" || mount --bind /proc "$root/proc"
    trap 'umount "$root/proc" 2>/dev/null || true' EXIT
    emulated() { env -i HOME=/root PATH=/usr/bin:/usr/sbin GGML_VK_VISIBLE_DEVICES=99 PYTHONPATH=/src/packages \
        PYTHONDONTWRITEBYTECODE=1 "${chosen[@]}" chroot "$root" /qemu "/usr/bin/$version" "$@"; }
    smoke() { emulated -c 'import os, sys, pytest; os.chdir("/src"); sys.exit(pytest.main(sys.argv[1:]))' \
        -q --disable-warnings -p no:cacheprovider tests/test_smoke.py; }
    emulated -c 'import platform; print(*platform.libc_ver(), platform.machine(), platform.python_version())'
    emulated -m ggml_cffi --version
    emulated -m ggml_cffi devices
    [ -z "$model" ] || emulated -m ggml_cffi run /src/model.gguf -n 12 -p "What is the capital of France?"
    smoke
    for file in "$root$libraries"/libggml-cpu-*; do
        say "$(basename "$file") alone"
        rm -rf "$root/src/one"; mkdir "$root/src/one"
        cp "$root$libraries"/libggml.* "$root$libraries"/libggml-base.* "$file" "$root/src/one/"
        chosen=(GGML_CFFI_LIBRARY_PATH=/src/one)
        smoke
    done
}

if [ -n "$arch" ]; then run_foreign; exit; fi
if [ "$suite" = bullseye ]; then
    make_root "$root" ca-certificates,libvulkan1,libffi7,libssl1.1,zlib1g
    [ -x "$root/opt/python/bin/python3" ] || compile_python
    python=/opt/python/bin/python3
else
    make_root "$root" ca-certificates,python3,python3-venv,libvulkan1,mesa-vulkan-drivers
    python=/usr/bin/python3
fi
! chroot "$root" sh -c 'command -v cc gcc g++ cmake' || fail "the root has a compiler"

# With the cooperative matrices that Mesa 26's software device offers, products of more than 8 rows are wrong.
inside() { env -i HOME=/root PATH=/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 GGML_VK_VISIBLE_DEVICES=0,0 GGML_VK_DISABLE_COOPMAT=1 \
    PIP_CERT=/etc/ssl/certs/machine.crt PIP_DISABLE_PIP_VERSION_CHECK=1 chroot "$root" "$@"; }

# pip trusts the certificates that this machine trusts.
cp /etc/resolv.conf /etc/hosts "$root/etc/" 2>/dev/null || true
cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root/etc/ssl/certs/machine.crt"
rm -rf "$root/src" "$root/venv"; mkdir -p "$root/src" "$root/proc" "$root/dev"
cp "$wheel" "$root/src/"; cp -r "$source_dir/tests" "$root/src/"; [ -z "$model" ] || cp "$model" "$root/src/model.gguf"
mountpoint -q "$root/proc" || mount --bind /proc "$root/proc" || say "no /proc in the root: some tests need it"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev" || say "no /dev in the root: some tests need it"
trap 'umount "$root/proc" "$root/dev" 2>/dev/null || true' EXIT

inside $python -m venv /venv
inside /venv/bin/python -m pip install -q "/src/$(basename "$wheel")" pytest
inside sh -c 'ldd --version | head -n 1; /venv/bin/python --version; /venv/bin/ggml-cffi --version; /venv/bin/ggml-cffi devices'
[ -z "$model" ] || inside /venv/bin/ggml-cffi run /src/model.gguf -n 12 -p "What is the capital of France?"
inside sh -c 'cd /src && exec /venv/bin/python -m pytest -q -p no:cacheprovider tests/test_smoke.py'
