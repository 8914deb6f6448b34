#!/usr/bin/env bash
# Tests csrc/ops*_cuda.cpp without a GPU: builds them and the kernels for the CPU, over the twin of the CUDA runtime in tests/cuda/twin, lets
# them take the place of the CPU implementations, and runs cases*.py and some tests of the ops against it.
#
#   tests/cuda/ops/run.sh [ARGUMENTS OF PYTEST]
#
# Needs g++ (CXX names another compiler), and a Python in which the tests run. Everything built goes to build/cuda/ops.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

BUILD=build/cuda/ops
CXX=${CXX:-g++}
torch=$(python -c "import os, torch; print(os.path.dirname(torch.__file__))")
target=$(python -c "import runpy; print(runpy.run_path('setup.py')['TORCH_TARGET_VERSION'])")
flags=(-std=c++17 -O2 -fPIC -fvisibility=hidden -Itests/cuda/twin -Icsrc/cuda -Wall -Wextra -Wno-unknown-pragmas)
ops=(-Wno-unused-parameter -I"$torch/include" -I"$torch/include/torch/csrc/api/include" -include tests/cuda/ops/as_cpu.h
  -DTORCH_TARGET_VERSION="$target" '-DBITMASK_CUDA_ARCHITECTURES="the twin, sm_90a"')

rm -rf "$BUILD"
mkdir -p "$BUILD"
find csrc/cuda tests/cuda/twin -maxdepth 1 \( -name '*.cu' -o -name '*.cpp' \) -print0 |
  xargs -0 -P "$(nproc)" -I{} sh -c 'source=$1 objects=$2; shift 2; "$@" -x c++ -c "$source" -o "$objects/$(basename "$source").o"' \
    sh {} "$BUILD" "$CXX" "${flags[@]}"
for source in csrc/ops*_cuda.cpp; do
  "$CXX" "${flags[@]}" "${ops[@]}" -c "$source" -o "$BUILD/$(basename "$source" .cpp).o"
done
"$CXX" -shared "$BUILD"/*.o -L"$torch/lib" -ltorch -ltorch_cpu -o "$BUILD/libops.so" -Wl,-z,defs -lpthread

run() { python -m pytest -q -p tests.cuda.ops.plugin "$@"; }

if (($#)); then
  run "$@"
else
  run tests/cuda/ops/cases*.py tests/test_golden.py
  # With one instruction set, which is not used: what compares bits and what expects errors of the parts.
  run tests/test_ops.py -k "not avx and not neon and (any_rank or edge_columns or strided or bad_ or into or mutated or opcheck)"
  # Few rows of blocks of any size, gradients, and what compilers ask.
  run tests/test_block_ops.py \
    -k "not avx and not neon and (edges or reference or infinity or views or gradient or order or opcheck or compiles)"
  # 2:4: its bits, what it refuses, gradients; neither modes of the CPU nor what takes gigabytes.
  run tests/test_two_four_ops.py -k "not avx and not neon and not flushes and not 2_to and not harmless and \
    (round_trip or elements or views or stored or largest or prune or refused or bad_ or mutated or gradients or opcheck or shrunk)"
  run tests/test_two_four_linear.py -k "not avx and not neon and \
    (zeros_and or views or same_as_reference or gradients_equal or opcheck or autocast or require_a_gradient)"
  run tests/test_block_two_four_ops.py -k "not avx and not neon and \
    (all_sizes or densities or same_as_reference or views or gradcheck or gradients or opcheck or autocast or require_a_gradient)"
fi
