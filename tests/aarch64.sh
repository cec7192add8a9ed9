#!/usr/bin/env bash
# usage: make test-aarch64
# Builds the wheel for aarch64 on another processor and runs tests/installed.py with it, whole models, under an emulator:
# on a processor with dot products and on one without. The Python there is Debian's for arm64, unpacked into a folder;
# nothing of this machine's system changes. Needs Debian (Ubuntu's mirrors have no arm64), g++-aarch64-linux-gnu, qemu-user
# and the system's own python3, whose version is that of the packages.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$PWD/build/tools/bin work=$PWD/build/aarch64 python=/usr/bin/python3
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg-deb $python; do
    if ! command -v $tool >/dev/null; then
        echo "test-aarch64 needs $tool: apt-get install g++-aarch64-linux-gnu qemu-user python3" >&2
        exit 2
    fi
done
version=$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
root=$work/root include=$work/root/usr/include

if [ ! -e "$include/python$version/Python.h" ]; then
    rm -rf "$work"
    mkdir -p "$work"/{lists,archives}/partial "$root"
    touch "$work/status"
    apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1
        -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" -o Dir::Cache::archives="$work/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    "${apt[@]}" update
    "${apt[@]}" --yes --download-only --no-install-recommends install python3-minimal libpython3-dev libstdc++6
    for package in "$work"/archives/*.deb; do dpkg-deb --extract "$package" "$root"; done
fi
emulated() { qemu-aarch64 -cpu "$1" -L "$root" "$root/usr/bin/python3" "${@:2}"; }

rm -rf "$work"/{wheel,dist,site}
suffix=$(emulated max -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
_PYTHON_HOST_PLATFORM=linux-aarch64 SETUPTOOLS_EXT_SUFFIX=$suffix CXX=aarch64-linux-gnu-g++ \
    "$tools/uv" build --quiet --wheel --python $python --out-dir "$work/wheel" \
    -C cmake.define.CMAKE_SYSTEM_NAME=Linux -C cmake.define.CMAKE_SYSTEM_PROCESSOR=aarch64 \
    -C cmake.define.CMAKE_CXX_FLAGS="-isystem $include" \
    -C cmake.define.Python_INCLUDE_DIR="$include/python$version" -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON
PATH=$tools:$PATH auditwheel repair --wheel-dir "$work/dist" "$work"/wheel/*.whl
libc=$(emulated max -c 'import platform; print(platform.libc_ver()[1].replace(".", "_"))')
"$tools/uv" pip install --quiet --target "$work/site" --python-platform "aarch64-manylinux_$libc" \
    --python-version "$version" --only-binary :all: "$work"/dist/*.whl
export PYTHONPATH=$work/site
emulated max tests/installed.py | tee /dev/stderr | grep -q neon-dot
emulated cortex-a53 tests/installed.py
