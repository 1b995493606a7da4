#!/usr/bin/env bash
# Installs the system packages that `make` needs and that are missing: a C++ compiler, Python's venv module, the Vulkan
# loader, and Mesa's software device if there is no driver for a GPU.
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

command -v c++ >/dev/null || install g++
"$python" -c 'import venv, ensurepip' 2>/dev/null || install python3-venv

# Every driver manifest other than that of the software device belongs to a GPU.
has_driver() { find /usr/share/vulkan/icd.d /etc/vulkan/icd.d -name '*.json' "$@" 2>/dev/null | grep -q .; }
has_gpu() { compgen -G '/dev/dri/renderD*' >/dev/null || compgen -G '/dev/nvidia[0-9]*' >/dev/null; }
loader() { ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' || compgen -G '/usr/lib/*/libvulkan.so.1' >/dev/null; }

[ "$(uname -s)" = Linux ] || exit 0
loader || { is_root_debian && install libvulkan1; } || say "no Vulkan loader (libvulkan1): ggml will use the CPU only"
if has_gpu && has_driver ! -name 'lvp*'; then exit 0; fi
if ! is_root_debian; then
    has_driver || say "no Vulkan driver: ggml will use the CPU only (mesa-vulkan-drivers has a software device)"
    exit 0
fi

# Mesa 22.3 of Debian 12 corrupts the heap with two logical devices; the backport does not.
mesa() { dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true; }
candidate() { apt-cache policy mesa-vulkan-drivers 2>/dev/null | awk '/Candidate:/ { print $2 }'; }
good() { [ -n "$1" ] && [ "$1" != "(none)" ] && dpkg --compare-versions "$1" ge 24; }
good "$(mesa)" && exit 0
apt-get -qq update || true
updated=yes
if good "$(candidate)"; then
    install mesa-vulkan-drivers
    exit 0
fi
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
site=$(apt-get indextargets --format '$(LABEL) $(SITE)' 'Created-By: Packages' | awk '$1 == "Debian" { print $2; exit }')
[ -n "$site" ] || fail "mesa-vulkan-drivers 24 or newer is needed for a software Vulkan device; this system offers $(candidate)"
say "taking Mesa from $release-backports"
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f $key ] && key="[signed-by=$key]" || key=""
# The suite is added for this call only; the sources of the system stay unchanged.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
cp -r /etc/apt/sources.list.d "$sources/parts"
[ ! -f /etc/apt/sources.list ] || cp /etc/apt/sources.list "$sources/parts/main.list"
echo "deb $key $site $release-backports main" >"$sources/parts/backports.list"
apt=(-qq -o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=$sources/parts" -o "Dir::State::Lists=$sources/lists")
mkdir -p "$sources/lists/partial"
chmod -R a+rX "$sources"
export DEBIAN_FRONTEND=noninteractive
apt-get "${apt[@]}" update
apt-get "${apt[@]}" install -y --no-install-recommends -t "$release-backports" mesa-vulkan-drivers libvulkan1 >/dev/null
say "software Vulkan device: Mesa $(mesa)"
