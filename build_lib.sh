#!/usr/bin/env bash
# Builds the pinned ggml into ggml_cffi/lib/. See --help.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
versions=$root/vendor/versions.txt
default_version=$(awk '$2 ~ /^pypi:/ { v = $1 } END { print v }' "$versions")
GGML_VERSION=$default_version
out=$root/ggml_cffi/lib
cache=${GGML_CFFI_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ggml_cffi}
python=${PYTHON:-python3}
mode=native arch=$(uname -m) vulkan=auto use_cache=yes only_source=no zig_flags=()
backend="" cuda_arch="" backend_flags=()
# Zig's version, and the oldest glibc that a wheel runs with: the tag of the wheels says it too.
zig=0.17.1 glibc=2.28
# Zig's libraries do not run their destructors when they are closed, but at exit, so they must stay loaded.
zig_link="-s -Wl,--gc-sections -Wl,-z,defs -Wl,-z,nodelete"
jobs=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
step="start"

usage() {
    cat <<USAGE
usage: ./build_lib.sh [--version V] [--native | --portable [--arch A]] [--out FOLDER] [--no-vulkan] [--no-cache]
                      [--jobs N] [--source-only]
       ./build_lib.sh --cuda [--cuda-arch LIST] [-- CMAKE FLAGS]
       ./build_lib.sh --backend NAME [-- CMAKE FLAGS]

Builds ggml into ggml_cffi/lib/: the core, the CPU backend, and the Vulkan and RPC
backends as plug-ins that are loaded on first use. It is safe to run again.
With --cuda or --backend, it adds the plug-in of another backend to that folder, and builds the
rest only if the folder has no core. Later builds of the same version keep the plug-in.

  --version V    one of the versions in vendor/versions.txt (default: $default_version)
  --native       this machine's instructions (default)
  --portable     all CPU variants, of which ggml chooses one when it loads. For wheels: on Linux, Zig (from PyPI) compiles
                 for glibc $glibc or newer, with its own C++ library inside, and the Vulkan loader is found at run time
  --arch A       with --portable on Linux, another processor: x86_64 or aarch64 (default: this machine's)
  --out FOLDER   the folder to fill (default: ggml_cffi/lib)
  --no-vulkan    build without the Vulkan plug-in
  --backend NAME add another backend of ggml: cuda, hip, musa, sycl, opencl, cann, blas, metal, … It needs the backend's
                 own development packages. The flags after -- are CMake's, such as -DGGML_BLAS_VENDOR=OpenBLAS
  --cuda         the same as --backend cuda. It needs nvcc and cuBLAS, and uses NCCL where it is found; the libraries may
                 be those of NVIDIA's packages from PyPI (nvidia-cublas, nvidia-nccl-cu13) in the Python of PYTHON
  --cuda-arch LIST
                 CMake's CMAKE_CUDA_ARCHITECTURES, such as "80-real;90-real" (default: the cards of this machine; without
                 cards, all that ggml supports)
  --no-cache     build even if the cache has a build with the same content key
  --jobs N       parallel compiler jobs (default: $jobs)
  --source-only  fetch and verify the source into vendor/ggml/VERSION, build nothing

environment:
  GGML_SOURCE_DIR   a tree of that version of ggml to use instead of the download (verified like it)
  VULKAN_SDK        a Vulkan SDK to compile the shaders with
  CC, CXX           compilers (Zig is that of --portable on Linux)
  NVCC              CUDA's compiler (default: nvcc of PATH, or of /usr/local/cuda/bin)
  PYTHON            the Python whose pip downloads the source and missing build tools (default: python3)
  GGML_CFFI_CACHE   folder of sources, tools and finished builds (default: \${XDG_CACHE_HOME:-~/.cache}/ggml_cffi)
USAGE
}

while [ $# -gt 0 ]; do
    case $1 in
        --version) GGML_VERSION=${2:?--version needs a version}; shift ;;
        --native | --portable) mode=${1#--} ;;
        --arch) arch=${2:?--arch needs x86_64 or aarch64}; shift ;;
        --out) mkdir -p "${2:?--out needs a folder}"; out=$(cd "$2" && pwd); shift ;;
        --no-vulkan) vulkan=no ;;
        --cuda) backend=cuda ;;
        --cuda-arch) backend=cuda cuda_arch=${2:?--cuda-arch needs a list of architectures, such as 90-real}; shift ;;
        --backend) backend=${2:?--backend needs a name, such as cuda}; shift ;;
        --) shift; backend_flags=("$@"); break ;;
        --no-cache) use_cache=no ;;
        --source-only) only_source=yes ;;
        --jobs) jobs=${2:?--jobs needs a number}; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "build_lib.sh: unknown option $1 (try --help)" >&2; exit 2 ;;
    esac
    shift
done

say() { printf 'build_lib: %s\n' "$*" >&2; }
warn() { printf 'build_lib: warning: %s\n' "$*" >&2; }
fail() { printf 'build_lib: error in step "%s": %s\n' "$step" "$*" >&2; exit 1; }
trap 'code=$?; [ $code -eq 0 ] || printf "build_lib: stopped in step \"%s\" (exit %s)\n" "$step" "$code" >&2' EXIT
sha256() { sha256sum "$@" 2>/dev/null || shasum -a 256 "$@"; }
digest() { sha256 | cut -d' ' -f1; }

# Run a long command quietly, and show the end of its log if it fails.
remedy=""
quietly() {
    local log=$1; shift
    mkdir -p "$(dirname "$log")"
    "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; fail "$1 failed; whole log: $log${remedy:+; $remedy}"; }
}

# ---------------------------------------------------------------- source
tree_digest() { # digest of names and contents of the compiled files
    (cd "$1" && find CMakeLists.txt ggml.pc.in cmake include src -type f 2>/dev/null | LC_ALL=C sort | tr '\n' '\0' |
        xargs -0 sha256sum | digest)
}

read_pin() { # sets origin, archive_sha256, folder and tree_sha256 of $GGML_VERSION
    step="version"
    local version
    while read -r version origin archive_sha256 folder tree_sha256; do
        [ "$version" != "$GGML_VERSION" ] || return 0
    done <"$versions"
    fail "ggml $GGML_VERSION is not in vendor/versions.txt, which has: $(grep -v '^#' "$versions" | cut -d' ' -f1 | tr '\n' ' ')"
}

get_source() {
    step="source"
    source_dir=$root/vendor/ggml/$GGML_VERSION
    if [[ $origin == deb:* ]]; then get_headers; return; fi
    if [ -n "${GGML_SOURCE_DIR:-}" ]; then
        source_dir=$GGML_SOURCE_DIR
        [ -f "$source_dir/CMakeLists.txt" ] || fail "GGML_SOURCE_DIR=$source_dir holds no CMakeLists.txt"
        [ "$(tree_digest "$source_dir")" = "$tree_sha256" ] ||
            fail "GGML_SOURCE_DIR=$source_dir is not ggml $GGML_VERSION as pinned in vendor/versions.txt: its tree digest is $(tree_digest "$source_dir")"
        return
    fi
    if [ -f "$source_dir/LICENSE" ] && [ -d "$source_dir/chat-templates" ] &&
        [ "$(tree_digest "$source_dir")" = "$tree_sha256" ]; then return; fi
    local requirement=${origin#pypi:} name archive tmp depth
    name=${requirement%%==*}; name=${name//-/_}-${requirement##*==}
    archive=$cache/source/$name.tar.gz
    mkdir -p "$cache/source"
    tmp=$(mktemp -d "$cache/source/tmp.XXXXXX")
    if ! is_archive "$archive"; then
        say "downloading $requirement"
        "$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip; install python3-pip or set PYTHON to a venv's python"
        quietly "$tmp/pip.log" "$python" -m pip download -q --no-deps --no-binary "${requirement%%==*}" -d "$tmp" "$requirement"
        is_archive "$tmp/$name.tar.gz" ||
            fail "SHA-256 of $name.tar.gz is not the one pinned in vendor/versions.txt: it is $(digest <"$tmp/$name.tar.gz")"
        mv "$tmp/$name.tar.gz" "$archive"
    fi
    mkdir "$tmp/tree"
    depth=$(tr -dc / <<<"$name/$folder" | wc -c)
    tar -xzf "$archive" -C "$tmp/tree" --strip-components=$((depth + 1)) "$name/$folder"
    # llama.cpp has ggml's licence beside it.
    [ -f "$tmp/tree/LICENSE" ] || tar -xzOf "$archive" "$name/$(dirname "$folder")/LICENSE" >"$tmp/tree/LICENSE"
    # Tests render the chat templates that llama.cpp keeps of many models; ggml alone has none.
    mkdir -p "$tmp/tree/chat-templates"
    tar -xzf "$archive" -C "$tmp/tree/chat-templates" --strip-components=$((depth + 2)) \
        "$name/$(dirname "$folder")/models/templates" 2>/dev/null || true
    [ "$(tree_digest "$tmp/tree")" = "$tree_sha256" ] || fail "the archive's ggml tree is not the pinned one: its digest is $(tree_digest "$tmp/tree")"
    rm -rf "$source_dir"; mkdir -p "$(dirname "$source_dir")"
    mv "$tmp/tree" "$source_dir"
    rm -rf "$tmp"
    say "source verified: vendor/ggml/$GGML_VERSION"
}

is_archive() { [ -f "$1" ] && echo "$archive_sha256  $1" | sha256 -c - >/dev/null 2>&1; }

# A Debian package with the headers alone. Its suite may have moved on to a newer version; then there is no file to check.
get_headers() {
    [ $only_source = yes ] || fail "of ggml $GGML_VERSION there are only headers (${origin#deb:}); build $default_version"
    local suite=${origin#deb:} package archive tmp
    package=${suite#*:}; suite=${suite%%:*}
    archive=$cache/source/${package/=/_}.deb
    if is_archive "$archive" && [ -d "$source_dir/include" ]; then return; fi
    tmp=$(mktemp -d "$cache/apt.XXXXXX")
    if ! is_archive "$archive"; then
        say "downloading $package of Debian's suite $suite"
        apt_download "$suite" "$tmp" "$package" || fail "Debian's suite $suite could not be asked for $package, or has a newer version"
        mkdir -p "$cache/source"; mv "$tmp"/debs/*.deb "$archive"
        is_archive "$archive" || fail "SHA-256 of $package is not the one pinned in vendor/versions.txt: it is $(digest <"$archive")"
    fi
    dpkg -x "$archive" "$tmp/files"
    rm -rf "$source_dir"; mkdir -p "$source_dir"
    mv "$tmp/files/$folder" "$source_dir/include"
    rm -rf "$tmp"
    say "headers verified: vendor/ggml/$GGML_VERSION"
}

# Download Debian or Ubuntu packages of any suite with the machine's own apt and keys; the system does not change.
apt_download() { # suite, working folder, packages: the files are in its subfolder debs
    local suite=$1 tmp=$2 label site keyring component apt; shift 2
    command -v apt-get >/dev/null && command -v dpkg >/dev/null || return 1
    # The mirror is that of the machine's own sources.
    read -r label site < <(apt-get indextargets --format '$(LABEL) $(SITE)' 'Created-By: Packages' 2>/dev/null |
        grep -m1 -E '^(Debian|Ubuntu) ') || { warn "apt knows no mirror yet; run apt-get update"; return 1; }
    keyring=/usr/share/keyrings/${label,,}-archive-keyring.gpg
    [ -f "$keyring" ] || keyring=""
    mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial" "$tmp/debs"
    component="main"; [ "$suite" = devel ] && component="main universe"
    echo "deb ${keyring:+[signed-by=$keyring]} $site $suite $component" >"$tmp/sources.list"
    apt=(-qq -o "Dir::Etc::SourceList=$tmp/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$tmp/lists"
        -o "Dir::Cache=$tmp/cache" -o APT::Sandbox::User= -o Acquire::Languages=none)
    (apt-get "${apt[@]}" update && cd "$tmp/debs" && apt-get "${apt[@]}" download "$@") >"$tmp/apt.log" 2>&1 ||
        { warn "apt could not fetch them: $(grep -m1 '^[EW]:' "$tmp/apt.log")"; return 1; }
}

# ---------------------------------------------------------------- tools
get_build_tools() {
    step="build tools"
    if [ $mode = portable ] && [ "$(uname -s)" = Linux ]; then get_zig; fi
    CC=${CC:-cc} CXX=${CXX:-c++}
    command -v "$CC" >/dev/null || fail "no C compiler ($CC); install gcc or set CC"
    command -v "$CXX" >/dev/null || fail "no C++ compiler ($CXX); install g++ or set CXX"
    export CC CXX
    local tools=$cache/tools tool
    for tool in cmake ninja; do
        if command -v $tool >/dev/null && $tool --version >/dev/null 2>&1; then continue; fi
        [ -x "$tools/bin/$tool" ] || install_tool $tool
        PATH=$tools/bin:$PATH
    done
}

install_tool() { # requirement, of PyPI
    say "installing $1 from PyPI"
    [ -x "$cache/tools/bin/python" ] || quietly "$cache/log/venv.log" "$python" -m venv "$cache/tools"
    quietly "$cache/log/${1%%=*}.log" "$cache/tools/bin/python" -m pip install -q "$1"
}

# Zig is clang with the headers and the symbols of every glibc: CC and CXX compile for the oldest one, and the libraries run
# with all newer ones. Its libc++ is linked into each library, since no two of them pass C++ objects to one another.
get_zig() {
    case $arch in x86_64 | aarch64) ;; *) fail "--arch is x86_64 or aarch64, not $arch" ;; esac
    local tools=$cache/tools bin=$cache/zig-$zig-$arch-$glibc name folder
    "$tools/bin/python" -c "import ziglang, importlib.metadata as m; assert m.version('ziglang') == '$zig'" 2>/dev/null ||
        install_tool "ziglang==$zig"
    folder=$("$tools/bin/python" -c "import ziglang; print(ziglang.__path__[0])")
    mkdir -p "$bin"
    for name in cc c++ ar ranlib; do
        # Zig knows a processor's features by LLVM's names, and no -march for aarch64.
        cat >"$bin/$name" <<WRAPPER
#!/usr/bin/env bash
case $name in
    cc | c++)
        for argument; do
            shift
            case \$argument in
                -march=armv*)
                    features=\${argument#-march=armv}
                    version=\${features%%-a*} features=\${features#*-a}
                    argument=-mcpu=generic\${features/+fp16/+fullfp16}
                    [ \$version = 8 ] || argument=\$argument+v\${version/./_}a ;;
            esac
            set -- "\$@" "\$argument"
        done
        set -- -target $arch-linux-gnu.$glibc "\$@" ;;
esac
exec "$folder/zig" $name "\$@"
WRAPPER
        chmod +x "$bin/$name"
    done
    CC=$bin/cc CXX=$bin/c++
    zig_flags=("-DCMAKE_AR=$bin/ar" "-DCMAKE_RANLIB=$bin/ranlib" -DVULKAN_AT_RUN_TIME=ON)
    for name in SHARED MODULE; do zig_flags+=("-DCMAKE_${name}_LINKER_FLAGS=$zig_link"); done
    if [ "$arch" != "$(uname -m)" ]; then zig_flags+=(-DCMAKE_SYSTEM_NAME=Linux "-DCMAKE_SYSTEM_PROCESSOR=$arch"); fi
}

glslc_compiles() { # glslc, name of one of ggml's feature tests
    "$1" --target-env=vulkan1.3 -fshader-stage=compute -o /dev/null \
        "$source_dir/src/ggml-vulkan/vulkan-shaders/feature-tests/$2.comp" >/dev/null 2>&1
}

headers_work() { # include folder: new enough for ggml-vulkan.cpp, SPIR-V headers beside
    [ -f "$1/spirv/unified1/spirv.hpp" ] && grep -q VkLayerSettingsCreateInfoEXT "$1/vulkan/vulkan_core.h" 2>/dev/null
}

use_vulkan() { # glslc, include folder, CMake prefix, folders of libvulkan: true if the set is complete and works
    local dir lib=""
    glslc_compiles "$1" coopmat && glslc_compiles "$1" integer_dot && headers_work "$2" || return 1
    for dir in "${@:4}"; do
        for lib in "$dir"/libvulkan.so "$dir"/libvulkan.so.1; do [ -e "$lib" ] && break 2; done
        lib=""
    done
    [ -n "$lib" ] || return 1
    vulkan_flags=("-DVulkan_GLSLC_EXECUTABLE=$(keeping_glslc "$1")" "-DVulkan_INCLUDE_DIR=$2" "-DCMAKE_PREFIX_PATH=$3" "-DVulkan_LIBRARY=$lib")
    vulkan_id=$({ "$1" --version; "$CC" -E -dM -I"$2" -include vulkan/vulkan_core.h -x c /dev/null | grep VK_HEADER_VERSION; } 2>/dev/null | digest)
}

# Print the path of a glslc that compiles each shader of this source once, for the builds of all processors.
keeping_glslc() { # glslc
    local kept; kept=$cache/shaders/$({ echo "$tree_sha256"; "$1" --version; } | digest | cut -c 1-16)
    mkdir -p "$kept"
    cat >"$kept/glslc.$$" <<WRAPPER
#!/usr/bin/env bash
set -eu
key="" out="" before=""
for argument; do
    # Without the folders of the source and of the build, which differ between builds.
    case \$before in -o) out=\$argument ;; -MF) ;; *) key+=" \${argument##*/}" ;; esac
    before=\$argument
done
case \$out in "" | - | /dev/null) exec "$1" "\$@" ;; esac
shader=$kept/\$(printf %s "\$key" | { sha256sum 2>/dev/null || shasum -a 256; } | cut -c 1-32).spv
[ -f "\$shader" ] || { "$1" "\$@"; cp "\$out" "\$shader.\$\$"; mv "\$shader.\$\$" "\$shader"; }
cp "\$shader" "\$out"
WRAPPER
    chmod +x "$kept/glslc.$$"; mv "$kept/glslc.$$" "$kept/glslc"
    echo "$kept/glslc"
}

# Newer suites of Debian and Ubuntu have newer tools. They are unpacked into a private prefix and run through the dynamic
# loader of that prefix, so the system does not change.
suite_tools() { # suite
    local prefix=$cache/vulkan-tools-$1 tmp loader deb
    if [ ! -x "$prefix/glslc" ]; then
        say "fetching shader tools of suite $1 with apt (private prefix; the system does not change)"
        mkdir -p "$cache"; tmp=$(mktemp -d "$cache/apt.XXXXXX")
        apt_download "$1" "$tmp" glslc libshaderc1 libstdc++6 libgcc-s1 libc6 libvulkan-dev libvulkan1 spirv-headers ||
            { rm -rf "$tmp"; return 1; }
        mkdir "$tmp/prefix"
        for deb in "$tmp"/debs/*.deb; do dpkg -x "$deb" "$tmp/prefix"; done
        loader=$(cd "$tmp/prefix" && find . -name 'ld-linux*.so.*' | head -n 1)
        [ -n "$loader" ] || { rm -rf "$tmp"; return 1; }
        cat >"$tmp/prefix/glslc" <<WRAPPER
#!/bin/sh
here=\$(dirname "\$0")
exec "\$here/$loader" --library-path "\$(echo "\$here"/usr/lib/*-linux-gnu | tr ' ' ':'):\$(echo "\$here"/lib/*-linux-gnu | tr ' ' ':')" "\$here/usr/bin/glslc" "\$@"
WRAPPER
        chmod +x "$tmp/prefix/glslc"
        rm -rf "$prefix"; mv "$tmp/prefix" "$prefix"; rm -rf "$tmp"
    fi
    use_vulkan "$prefix/glslc" "$prefix/usr/include" "$prefix/usr" /usr/lib/*-linux-gnu "$prefix"/usr/lib/*-linux-gnu
}

get_vulkan_tools() {
    step="Vulkan tools"
    local sdk=${VULKAN_SDK:-} suite
    vulkan_flags=() vulkan_id=""
    if [ -n "$sdk" ]; then
        use_vulkan "$sdk/bin/glslc" "$sdk/include" "$sdk" "$sdk/lib" || fail "VULKAN_SDK=$sdk lacks a working glslc, headers or loader"
        say "Vulkan tools: \$VULKAN_SDK"; return
    fi
    if command -v glslc >/dev/null && use_vulkan "$(command -v glslc)" /usr/include /usr /usr/lib/*-linux-gnu /usr/lib64 /usr/lib; then
        say "Vulkan tools: the system's"; return
    fi
    for suite in $(. /etc/os-release 2>/dev/null; case ${ID:-}${ID_LIKE:-} in *ubuntu*) echo devel ;; *debian*) echo testing trixie ;; esac); do
        if suite_tools "$suite"; then say "Vulkan tools: suite $suite, private prefix"; return; fi
    done
    vulkan=no
    warn "building for the CPU only: found no glslc with cooperative matrices; install the Vulkan SDK and set VULKAN_SDK"
}

# ---------------------------------------------------------------- other backends
check_backend() {
    step="options"
    [ -n "$backend" ] || { [ ${#backend_flags[@]} = 0 ] || fail "the flags after -- are for --backend or --cuda"; return 0; }
    [ $mode = native ] || fail "--backend builds for this machine: it does not go with --portable"
    case $backend in
        cpu | vulkan | rpc) fail "the $backend backend is built without --backend" ;;
        cuda)
            nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
            command -v "$nvcc" >/dev/null || fail "no CUDA compiler ($nvcc); install CUDA's toolkit (package cuda-toolkit of" \
                "NVIDIA's repository, nvidia-cuda-toolkit of Debian and Ubuntu), or set NVCC to its nvcc" ;;
    esac
}

get_backend_tools() { # sets backend_id and remedy, and adds to backend_flags
    step="$backend tools"
    local known; known=$(cd "$source_dir/src" && ls -d ggml-*/ | sed 's|^ggml-||; s|/$||' | grep -vxE 'cpu|vulkan|rpc' | tr '\n' ' ')
    [[ " $known" == *" $backend "* ]] || fail "ggml $GGML_VERSION has no backend $backend; it has: $known"
    backend_id="${backend_flags[*]-}"
    backend_flags=("-DGGML_$(tr '[:lower:]-' '[:upper:]_' <<<"$backend")=ON" ${backend_flags[@]+"${backend_flags[@]}"})
    case $backend in
        cuda) get_cuda_tools; return ;;
        blas) remedy="install a BLAS, such as libopenblas-dev, and name it after --: -DGGML_BLAS_VENDOR=OpenBLAS" ;;
        hip) remedy="install ROCm with hipcc, hipBLAS and rocBLAS" ;;
        musa) remedy="install the MUSA toolkit" ;;
        sycl) remedy="install Intel's oneAPI, load its setvars.sh, and set CC=icx CXX=icpx" ;;
        opencl) remedy="install opencl-headers and ocl-icd-opencl-dev" ;;
        cann) remedy="install Ascend's CANN toolkit, and load its set_env.sh" ;;
        metal) remedy="it needs macOS with Xcode's command line tools" ;;
        *) remedy="see the CMakeLists.txt in $source_dir/src/ggml-$backend for the packages that it needs" ;;
    esac
}

get_cuda_tools() {
    local toolkit major packages folder name file rpath='$ORIGIN' headers=""
    # nvcc in PATH may be a script that runs the one of the toolkit.
    toolkit=$("$nvcc" -dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
    toolkit=$(cd "${toolkit:-$(dirname "$nvcc")/..}" && pwd -P)
    major=$("$nvcc" --version | sed -n 's/.* release \([0-9]*\)\..*/\1/p')
    if [ -z "$cuda_arch" ]; then # such as 90-real, from a card's 9.0
        cuda_arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
            sed -n 's/^\([0-9]*\)\.\([0-9]\) *$/\1\2-real/p' | sort -u | paste -sd ';' -) || true
    fi
    packages=$("$python" -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2>/dev/null) || true
    cuda_folders=("$toolkit"/lib64 "$toolkit"/targets/*/lib)
    while read -r folder; do cuda_folders+=("$folder"/*/lib); done <<<"$packages"
    while read -r folder; do cuda_folders+=("$folder"); done < <(tr : '\n' <<<"${LD_LIBRARY_PATH:-}"; echo /usr/local/nvidia/lib64)

    # By default, ggml has CUDA graphs only inside llama.cpp. Without them, tensor parallelism decodes at half the speed.
    backend_flags=(-DGGML_CUDA_GRAPHS=ON "-DCMAKE_CUDA_COMPILER=$toolkit/bin/nvcc" "-DCMAKE_CUDA_HOST_COMPILER=$(command -v "$CXX")" "-DCUDAToolkit_ROOT=$toolkit"
        "${backend_flags[@]}")
    [ -z "$cuda_arch" ] || backend_flags+=("-DCMAKE_CUDA_ARCHITECTURES=$cuda_arch")
    file=$(cuda_library libcuda.so.1 libcuda.so stubs/libcuda.so) || fail "no libcuda.so.1; install NVIDIA's driver, or on a" \
        "machine without a card the toolkit's stub of it (package cuda-driver-dev)"
    backend_flags+=("-DCUDA_cuda_driver_LIBRARY=$file")
    for name in cudart cublas cublasLt nccl; do
        file=$(cuda_library "lib$name.so.$major" "lib$name.so" "lib$name.so.2") || case $name in
            nccl)
                warn "no NCCL (package libnccl-dev, or nvidia-nccl-cu$major of PyPI): ggml adds up the numbers of several cards itself"
                backend_flags+=(-DGGML_CUDA_NCCL=OFF); break ;;
            *) fail "no lib$name.so.$major; install it (package cuda-libraries-dev of NVIDIA's repository, or from PyPI:" \
                "$python -m pip install nvidia-cublas)" ;;
        esac
        folder=$(dirname "$file")
        case $name in
            nccl) backend_flags+=("-DNCCL_LIBRARY=$file"); backend_id+=" nccl"
                [ ! -d "$folder/../include" ] || backend_flags+=("-DNCCL_INCLUDE_DIR=$folder/../include") ;;
            *) backend_flags+=("-DCUDA_${name}_LIBRARY=$file") ;;
        esac
        # The plug-in looks there again when it is loaded. Headers of a package come behind those of the toolkit.
        case $folder in /lib | /lib/* | /usr/lib | /usr/lib/*) continue ;; esac
        [[ ";$rpath;" == *";$folder;"* ]] || rpath+=";$folder"
        [[ $folder == "$toolkit"/* || ! -d $folder/../include || $headers == *"$folder/"* ]] || headers+=" -isystem $folder/../include"
    done
    backend_flags+=("-DCMAKE_INSTALL_RPATH=$rpath" "-DCMAKE_CUDA_FLAGS=$headers" "-DCMAKE_CXX_FLAGS=$headers")
    backend_id+=" graphs $rpath $cuda_arch $("$nvcc" --version | digest)"
    remedy="if a header is missing, install the package of its library's development files"
    say "CUDA $("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p') of $toolkit, for ${cuda_arch:-all architectures that ggml supports}"
}

# Print the path of a library of CUDA's toolkit, of Python's packages or of the system. CMake would look for libNAME.so,
# which packages lack.
cuda_library() { # names of its file, the preferred first
    local name folder file
    for name; do
        for folder in "${cuda_folders[@]}"; do [ ! -e "$folder/$name" ] || { echo "$folder/$name"; return; }; done
        file=$(ldconfig -p 2>/dev/null | awk -v file="$name" '$1 == file { print $NF; exit }')
        [ -z "$file" ] || { echo "$file"; return; }
    done
    return 1
}

# ---------------------------------------------------------------- build
common=(-G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF -DGGML_CCACHE=OFF
    -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=ON -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN')

# build_part NAME KEY TARGETS... -- CMAKE FLAGS...: put the libraries of a part into $out, from the cache if possible.
build_part() {
    local name=$1 id=$2 key dir built targets=(); shift 2
    while [ "$1" != -- ]; do targets+=("$1"); shift; done; shift
    # Versions and flags determine a build; paths differ between machines, so the key excludes them.
    key=$(printf '%s\n' "$tree_sha256" "$id" "${common[@]}" "${targets[@]}" "$("$CXX" --version | head -n 1)" "$(uname -sm)" \
        "$(digest <"$root/vendor/CMakeLists.txt")" | digest)
    built=$cache/build/$name-${key:0:16}
    if [ $use_cache = no ] || [ ! -d "$built" ]; then
        step="configure $name"
        dir=$cache/build-tree/$name-${key:0:16}
        rm -rf "$dir"; mkdir -p "$dir" "$cache/build"
        # Without a git folder, ggml does not take the commit of this project for its own.
        GIT_DIR=/nonexistent quietly "$dir/configure.log" cmake -S "$root/vendor" -B "$dir" "-DGGML_TREE=$source_dir" "${common[@]}" "$@"
        step="build $name"
        say "building $name: ${targets[*]} ($jobs jobs)"
        quietly "$dir/build.log" cmake --build "$dir" -j "$jobs" --target "${targets[@]}"
        step="collect $name"
        rm -rf "$built.tmp" "$built"; mkdir "$built.tmp"
        collect "$dir" "$built.tmp"
        mv "$built.tmp" "$built"; rm -rf "$dir"
    else
        say "$name: cached build $(basename "$built")"
    fi
    cp "$built"/* "$out.tmp/"
    echo "$name $(basename "$built")" >>"$out.tmp/BUILD"
}

# Copy one file per library, under the name that the others load: core libraries by SONAME, plug-ins by plain name.
collect() { # build tree, destination
    local file name
    find "$1" \( -name 'libggml*.so' -o -name 'libggml*.dylib' \) | while read -r file; do
        name=$(basename "$file")
        case $name in
            # A plug-in build compiles the base too; only the copy of the core part is shipped.
            libggml.* | libggml-base.*) [[ $(basename "$2") == core-* ]] || continue ;;
        esac
        case $name in
            libggml.so | libggml-base.so | libggml-cpu.so) name=$name.0 ;;
            libggml.dylib | libggml-base.dylib | libggml-cpu.dylib) name=${name%.dylib}.0.dylib ;;
        esac
        cp -L "$file" "$2/$name"
    done
}

# ---------------------------------------------------------------- the folder
core_version() { # of the core in $out, which must run on this machine; nothing without one
    local file
    for file in "$out"/libggml-base.so.0 "$out"/libggml-base.0.dylib; do
        [ ! -f "$file" ] || "$python" -c 'import ctypes, sys
version = ctypes.CDLL(sys.argv[1]).ggml_version
version.restype = ctypes.c_char_p
print(version().decode())' "$file" || return
    done
}

# Add the plug-in of --backend to $out. A line of BUILD says which plug-ins were added, and for which source.
add_backend() {
    local file
    rm -rf "$out.tmp"; mkdir -p "$out.tmp"
    build_part "$backend" "plug-in $backend_id" "ggml-$backend" -- -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU=OFF "${backend_flags[@]}"
    step="install"
    { grep -v "^$backend " "$out/BUILD" 2>/dev/null || true; sed "s/\$/ added $tree_sha256/" "$out.tmp/BUILD"; } >"$out.tmp/BUILD.new"
    # A process may have the file of an earlier build open: the new one takes its name, not its place.
    for file in "$out.tmp"/libggml-*; do mv "$file" "$out/"; done
    mv "$out.tmp/BUILD.new" "$out/BUILD"; rm -rf "$out.tmp"
}

# Copy the plug-ins that were added to $out, unless they are of another source.
keep_added() {
    local name built added tree file
    [ ! -f "$out/BUILD" ] || while read -r name built added tree; do
        [ "$added" = added ] || continue
        if [ "$tree" != "$tree_sha256" ]; then
            warn "the $name plug-in is of another version of ggml and was left out: build it again with --backend $name"; continue
        fi
        for file in "$out/libggml-$name".*; do cp "$file" "$out.tmp/"; done
        echo "$name $built added $tree" >>"$out.tmp/BUILD"
    done <"$out/BUILD"
}

build_folder() {
    step="prepare"
    rm -rf "$out.tmp"; mkdir -p "$out.tmp"
    if [ $mode = native ]; then
        cpu_id=$("$CC" -march=native -Q --help=target 2>/dev/null | digest)
        build_part core "native $cpu_id" ggml ggml-base ggml-cpu -- -DGGML_NATIVE=ON
        plugin_id="plug-in"
    else
        portable_id="portable $arch $glibc $zig_link"
        plugin_id="$portable_id $(digest <"$root/vendor/vulkan_loader.c")"
        build_part core "$portable_id" all -- -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON ${zig_flags[@]+"${zig_flags[@]}"}
        [ ${#zig_flags[@]} = 0 ] || echo "platform manylinux_${glibc/./_}_$arch" >>"$out.tmp/BUILD"
    fi
    plugin=(-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU=OFF ${zig_flags[@]+"${zig_flags[@]}"})
    build_part rpc "$plugin_id" ggml-rpc -- "${plugin[@]}" -DGGML_RPC=ON
    [ $vulkan = no ] || get_vulkan_tools
    [ $vulkan = no ] || build_part vulkan "$plugin_id $vulkan_id" ggml-vulkan -- "${plugin[@]}" -DGGML_VULKAN=ON "${vulkan_flags[@]}"
    step="install"
    # Copies of ggml, such as those in a wheel, have its licence.
    for file in "$source_dir"/LICENSE "$source_dir"/../LICENSE; do [ ! -f "$file" ] || { cp "$file" "$out.tmp/LICENSE.ggml"; break; }; done
    keep_added
    rm -rf "$out"; mv "$out.tmp" "$out"
}

check_backend
read_pin
get_source
[ $only_source = no ] || exit 0
get_build_tools
if [ -z "$backend" ]; then build_folder; else
    get_backend_tools
    step="core"
    core=$(core_version) || fail "the core in $out cannot be loaded: build it again, without --backend"
    if [ -z "$core" ]; then build_folder; elif [ "$core" != "$GGML_VERSION" ]; then
        fail "the core in $out is of ggml $core: give --version $core, or build $GGML_VERSION first, without --backend"
    fi
    add_backend
fi
say "done: $(cd "$out" && ls | tr '\n' ' ')"
