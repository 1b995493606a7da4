#!/usr/bin/env bash
# Runs tests with Debian's own ggml (libggml0) and Python, in a root folder made by debootstrap. As root on Debian or
# Ubuntu only, and run on x86-64 only. The machine's system does not change, apart from debootstrap itself.
#
#     tools/debian_ggml.sh [--suite forky] [--root FOLDER] [PYTEST ARGUMENTS...]
set -euo pipefail

say() { printf 'debian_ggml: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
source_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
suite=forky root=""
while [ $# -gt 0 ]; do
    case $1 in
        --suite) suite=${2:?--suite needs a name}; shift 2 ;;
        --root) root=${2:?--root needs a folder}; shift 2 ;;
        -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) break ;;
    esac
done
. "$source_dir/tools/version_tests.sh"
root=${root:-$cache/debian-$suite}
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || fail "needs root on Debian or Ubuntu"

packages=(libggml0 libggml0-backend-vulkan libggml0-backend-rpc libvulkan1 mesa-vulkan-drivers
    libggml-dev python3 python3-venv gcc libc6-dev git make ca-certificates)
if [ ! -f "$root/.complete" ]; then
    command -v debootstrap >/dev/null || apt-get -qq install -y --no-install-recommends debootstrap >/dev/null
    site=$(apt-get indextargets --format '$(LABEL) $(SITE)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }')
    [ -n "$site" ] || fail "no Debian mirror is configured"
    say "making a root of Debian $suite in $root"
    rm -rf "$root"; mkdir -p "$root"
    # The script of sid serves suites that are newer than debootstrap.
    debootstrap --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" "$suite" "$root" "$site" \
        /usr/share/debootstrap/scripts/sid >"$root.log" 2>&1 || fail "debootstrap failed; its output: $root.log"
    touch "$root/.complete"
fi

# With the cooperative matrices that Mesa 26's software device offers, products of more than 8 rows are wrong.
inside() { env -i HOME=/root PATH=/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 GGML_VK_VISIBLE_DEVICES=0,0 GGML_VK_DISABLE_COOPMAT=1 \
    GGML_CFFI_CACHE=/var/cache/ggml_cffi PIP_CERT=/etc/ssl/certs/machine.crt PIP_DISABLE_PIP_VERSION_CHECK=1 chroot "$root" "$@"; }

# pip trusts the certificates that this machine trusts.
cp /etc/resolv.conf /etc/hosts "$root/etc/" 2>/dev/null || true
cp "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" "$root/etc/ssl/certs/machine.crt"
copy_source "$root/src"; mkdir -p "$root/proc" "$root/dev/shm" "$root/var/cache/ggml_cffi"
mountpoint -q "$root/proc" || mount --bind /proc "$root/proc" || say "no /proc in the root: some tests need it"
mountpoint -q "$root/dev" || mount --bind /dev "$root/dev" || say "no /dev in the root: some tests need it"
trap 'umount "$root/proc" "$root/dev" 2>/dev/null || true' EXIT
[ ! -d "$cache/models" ] || cp -rn "$cache/models" "$root/var/cache/ggml_cffi/"

# Without the libggml-python wheel, which would be found before the system's library.
inside sh -c 'test -x /venv/bin/python || python3 -m venv /venv'
inside /venv/bin/python -m pip install -q cffi cloudpickle numpy jinja2 tqdm hatchling editables "${test_packages[@]}"
inside /venv/bin/python -m pip install -q --no-deps --no-build-isolation -e /src
inside /venv/bin/python -m ggml_cffi --version
inside /venv/bin/python -m ggml_cffi devices
[ $# -gt 0 ] || set -- "${tests[@]}"
# The tests choose the devices themselves, with the settings for a software device.
inside env -u GGML_VK_VISIBLE_DEVICES sh -c 'cd /src && exec /venv/bin/python "$@"' sh "${pytest[@]}" "$@"
