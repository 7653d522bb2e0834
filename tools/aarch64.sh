#!/bin/bash
# Cross-compiles the native library for aarch64 and runs tests there under emulation, twenty times as slowly.
#
#     apt-get install g++-aarch64-linux-gnu qemu-user
#     tools/aarch64.sh FOLDER build
#     tools/aarch64.sh FOLDER pytest -q tests/kernels/test_linear_native.py
#
# On Debian, with the packages of a pip whose Python is 3.11. FOLDER keeps 1 GB: Debian's Python for arm64, and PyTorch
# from PyPI. `qemu` takes any CPU of qemu-aarch64 by QEMU_CPU; the default has all it can emulate.
set -euo pipefail
folder=$(realpath -m "$1") root=$(realpath "$(dirname "$0")/..")
shift
mkdir -p "$folder"

build() {
    cmake -S "$root" -B "$folder/cmake" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
        -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
    cmake --build "$folder/cmake" --parallel
}

debian() {  # apt with lists of its own, so that the machine's are not touched
    mkdir -p "$folder"/apt/{lists,cache/archives}/partial "$folder/apt/dpkg" "$folder/debs" "$folder/system"
    touch "$folder/apt/dpkg/status"
    local options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root
        -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/dpkg/status" -o Dir::Cache="$folder/apt/cache")
    apt-get "${options[@]}" update
    (cd "$folder/debs" && apt-get "${options[@]}" download {,lib}python3.11-minimal libpython3.11-stdlib libc6 libffi8 \
        libstdc++6 libgcc-s1 libgomp1 zlib1g libexpat1 libssl3 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1)
    for package in "$folder"/debs/*.deb; do dpkg -x "$package" "$folder/system"; done
}

packages() {
    local target=(-q --target "$folder/site" --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64
        --only-binary=:all: --python-version 3.11)
    # the last PyTorch for aarch64 on PyPI that needs no CUDA; what it is asked for came with 2.11
    pip install "${target[@]}" --no-deps torch==2.10.0 torchvision==0.25.0
    printf '\n\ndef get_capabilities():\n    return {"architecture": "aarch64"}\n' >>"$folder/site/torch/cpu/__init__.py"
    pip install "${target[@]}" --no-deps timm
    pip install "${target[@]}" filelock sympy networkx jinja2 fsspec numpy pillow pyyaml huggingface_hub safetensors \
        pytest hypothesis psutil
}

if [ "$1" = build ]; then
    build
    exit
fi
[ -d "$folder/system" ] || debian
[ -d "$folder/site" ] || packages
build >/dev/null
# a copy of what is tracked: the library here is of another processor
mkdir -p "$folder/tree"
git -C "$root" archive HEAD | tar x -C "$folder/tree"
cp "$folder/cmake/libinsvp_fast_cpu.so" "$folder/tree/insvp_fast/runtime/native/"
cd "$folder/tree"
exec qemu-aarch64 -L "$folder/system" -E LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu:/lib/aarch64-linux-gnu \
    -E PYTHONPATH="$folder/tree:$folder/site" -E OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    "$folder/system/usr/bin/python3.11" -m "$@"
