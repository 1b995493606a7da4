#!/usr/bin/env bash
# Installs the system packages that `make` needs and that are missing: a C++ compiler, Python's venv module, the Vulkan
# loader, and Mesa's software device if there is no driver for a GPU. With --tests, it installs a browser instead.
# It changes the system only as root on Debian or Ubuntu; elsewhere it prints the names of the packages to install.
set -euo pipefail

say() { printf 'system: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
python=${PYTHON:-python3}

is_root_debian() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

updated=no
install() { # packages...
    is_root_debian || fail "please install: $*"
    say "installing $*"
    export DEBIAN_FRONTEND=noninteractive
    if [ $updated = no ]; then apt-get -qq update || say "apt-get update failed; trying with the current package lists"; updated=yes; fi
    apt-get -qq install -y --no-install-recommends "$@" >/dev/null || fail "apt-get could not install: $*"
}

if [ "${1:-}" = --tests ]; then # without a browser, the tests of the page for chats are skipped
    command -v chromium >/dev/null || (is_root_debian && install chromium) || say "no chromium: its tests are skipped"
    exit 0
fi

command -v c++ >/dev/null || install g++
"$python" -c 'import venv, ensurepip' 2>/dev/null || install python3-venv

# Tests make up the root folder in which drivers, loaders and devices are looked for.
root=${SYSTEM_ROOT:-}
exists() { compgen -G "$root$1" >/dev/null; }
# Every driver manifest other than that of the software device belongs to a GPU. One of the folders may be missing.
has_driver() { [ -n "$(find "$root"/usr/share/vulkan/icd.d "$root"/etc/vulkan/icd.d -name '*.json' "$@" 2>/dev/null)" ]; }
has_gpu() { exists '/dev/dri/renderD*' || exists '/dev/nvidia[0-9]*'; }
# Programs such as Chromium keep a loader of their own in a folder of /usr/lib, which nothing else finds.
loader() { ldconfig -p 2>/dev/null | grep 'libvulkan\.so\.1' >/dev/null || exists '/usr/lib/*-linux-*/libvulkan.so.1'; }

[ "$(uname -s)" = Linux ] || exit 0
loader || { is_root_debian && install libvulkan1; } || say "no Vulkan loader (libvulkan1): ggml will use the CPU only"
if has_gpu && has_driver ! -name 'lvp*'; then exit 0; fi
if ! is_root_debian; then
    has_driver || say "no Vulkan driver: ggml will use the CPU only (mesa-vulkan-drivers has a software device)"
    exit 0
fi

# Mesa 22.3 of Debian 12 corrupts the heap with two logical devices.
mesa() { dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true; }
candidate() { apt-cache policy mesa-vulkan-drivers 2>/dev/null | awk '/Candidate:/ { print $2 }'; }
good() { [ -n "$1" ] && [ "$1" != "(none)" ] && dpkg --compare-versions "$1" ge 24; }
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
ours=/usr/local/share/ggml_cffi/vulkan
if [ "$release" != bookworm ]; then
    good "$(mesa)" && exit 0
    apt-get -qq update || true
    updated=yes
    good "$(candidate)" || fail "a software Vulkan device needs mesa-vulkan-drivers 24 or newer; this system offers $(candidate)"
    install mesa-vulkan-drivers
    exit 0
fi

# Debian 12: the driver of Debian 13, whose LLVM compiles shaders several times faster than that of the backports. It gets a
# folder of its own, and a manifest where the Vulkan loader looks unless Debian's own driver is installed. The loader takes
# a relative path from the folder in which it finds the manifest, also through a link: the path there is absolute.
manifest() {
    good "$(mesa)" && return
    local found=/etc/vulkan/icd.d/lvp_icd.json
    mkdir -p /etc/vulkan/icd.d
    rm -f $found
    sed "s|\"\./|\"$ours/|" $ours/lvp_icd.json >$found
}
if [ -f $ours/lvp_icd.json ]; then manifest; exit 0; fi
site=$(apt-get indextargets --format '$(LABEL) $(SITE)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }')
[ -n "$site" ] || fail "no Debian mirror is configured, from which a software Vulkan device could come"
install libllvm19 libdrm2 libexpat1 libwayland-client0 libx11-xcb1 libxcb-dri3-0 libxcb-present0 libxcb-randr0 libxcb-shm0 \
    libxcb-sync1 libxcb-xfixes0 libxshmfence1 libzstd1 zlib1g
say "taking the software Vulkan device of Debian 13"
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f $key ] && key="[signed-by=$key]" || key=""
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The suite is added for this call only; the sources of the system stay unchanged.
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
echo "deb $key $site trixie main" >"$work/sources.list"
apt=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache=$work/cache" -o APT::Sandbox::User= -o Acquire::Languages=none)
apt-get "${apt[@]}" update
(cd "$work" && apt-get "${apt[@]}" download mesa-vulkan-drivers >/dev/null && dpkg -x mesa-vulkan-drivers_*.deb driver)
"$python" "$(dirname "$0")/software_vulkan.py" "$work"/driver/usr/lib/*/libvulkan_lvp.so "$work/vulkan"
mkdir -p "$(dirname $ours)"
rm -rf $ours
mv "$work/vulkan" $ours
manifest
say "software Vulkan device: $ours"
