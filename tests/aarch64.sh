#!/bin/sh
# The lean wheel on 64-bit ARM, emulated, as far as that goes without a GPU: each bundle's self-check, and the doctor.
#
#   apt-get install qemu-user-static mmdebstrap
#   smolvla-export tests/data/tiny/checkpoint --output tiny
#   tests/aarch64.sh tiny
#
# Debian 12 has Python 3.11, between JetPack 6 (3.10) and 7 (3.12): for those two, only that every wheel exists.
set -eu
PYTHON=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
root=$scratch/root

"$PYTHON" -m build --outdir "$scratch" "$here" >"$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }

wheels_for() {  # PYTHON-VERSION PIP-OPTION...: the wheel and what it needs, for glibc 2.35 (Ubuntu 22.04)
    version=$1 && shift
    platforms=$(seq -f "--platform=manylinux_2_%.0f_aarch64" 17 35)
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --python-version "$version" $platforms --only-binary=:all: \
        --target "$scratch/site" "$@" "$scratch"/*.whl
}
wheels_for 3.10 --dry-run --report "$scratch/report" && wheels_for 3.12 --dry-run --report "$scratch/report"
echo "every wheel exists for Python 3.10 and 3.12 on aarch64"
wheels_for 3.11

mmdebstrap --quiet --variant=extract --architectures=arm64 --include=python3,libstdc++6 bookworm "$root"
# ONNX Runtime crashes on the cpuinfo of another architecture: these are cores of an Orin.
mkdir -p "$root/proc"
for cpu in $(seq 0 $(($(nproc --all) - 1))); do
    printf '%s\t: %s\n' processor "$cpu" Features "fp asimd aes crc32 atomics fphp asimdhp asimdrdm asimddp" \
        "CPU implementer" 0x41 "CPU architecture" 8 "CPU variant" 0x0 "CPU part" 0xd42 "CPU revision" 1
    echo
done >"$root/proc/cpuinfo"

emulated() {  # COMMAND OPTION...
    # cortex-a76 is the emulated core nearest to an Orin's A78AE. With `max`, ONNX Runtime takes SME, which no Jetson
    # has, and QEMU 7.2 computes wrong INT8 products with it.
    command=$1 && shift
    PYTHONPATH="$scratch/site" OMP_NUM_THREADS=1 \
        qemu-aarch64-static -cpu cortex-a76 -L "$root" "$root/usr/bin/python3.11" -c "
import platform
from smolvla_edge.runtime.commands.$command import main

print('$command on', platform.machine(), 'Python', platform.python_version(), flush=True)
main()" "$@"
}

for bundle in "$@"; do
    emulated run --bundle "$bundle" --device cpu --self-check
    emulated doctor --bundle "$bundle" --device cpu
    emulated doctor --bundle "$bundle" --board all
done
