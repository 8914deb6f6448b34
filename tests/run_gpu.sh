#!/usr/bin/env bash
# Builds bitmask on a machine with a GPU and runs everything that needs one. Each command of a phase has its limit, of at most nine minutes.
#
#   tests/run_gpu.sh [--out DIR] [--quick] [PHASE ...]      default: all phases, in this order
#
#   build       the extension with its CUDA library (BITMASK_CUDA=1), installed in place; proves that its CUDA ops are there
#   tests       pytest tests/gpu, with what takes gigabytes, and the tests of the Triton kernels
#   tests-blocks
#               those of block-sparse and 2:4 weights, and the cases on a GPU of tests that also run without one
#   smoke       smoke_test.py, which must report the GPU
#   memcheck, racecheck, initcheck, synccheck (or sanitizers: all four)
#               compute-sanitizer's tool of that name over tests/gpu/small_shapes.py; before, it must find a planted error
#   benchmark   benchmark.py --device cuda (with --quick on tiny sizes): compression, products and decoding with bitmasks
#   benchmark-blocks
#               the same for block-sparse and 2:4 weights
#
# Logs and results go to DIR (build/gpu); a summary comes last. Every phase needs that build ran once; all go on when one fails, and the
# exit status is 1 then. PYTHON names the interpreter, whose torch is used as it is: nothing is downloaded. No setting of the GPU is changed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
OUT=build/gpu
QUICK=()
PHASES=()
TOOLS=(memcheck racecheck initcheck synccheck)
while (($#)); do
  case $1 in
    --out) OUT=${2:?--out needs a directory} && shift ;;
    --quick) QUICK=(--quick) ;;
    sanitizers) PHASES+=("${TOOLS[@]}") ;;
    build | tests | tests-blocks | smoke | memcheck | racecheck | initcheck | synccheck | benchmark | benchmark-blocks) PHASES+=("$1") ;;
    *) echo "run_gpu.sh: unknown argument $1" >&2 && exit 2 ;;
  esac
  shift
done
((${#PHASES[@]})) || PHASES=(build tests tests-blocks smoke "${TOOLS[@]}" benchmark benchmark-blocks)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}

run_build() {
  BITMASK_CUDA=1 timeout 540 "$PYTHON" -m pip install --no-index --no-build-isolation --no-deps -e . || return
  "$PYTHON" -c 'import sys; from benchmarks.gpu.device import reason_against; sys.exit(reason_against())' || return
  # The sanitizers look at kernels with bitmask in their mangled names: that must be all of them.
  local kernels
  kernels=$(cuobjdump -symbols bitmask/_C_cuda*.so | grep STO_ENTRY) || return
  ! grep -v bitmask <<< "$kernels" && echo "built, with $(wc -l <<< "$kernels") kernels"
}

run_tests() {
  local triton=(tests/test_triton*.py)
  [[ -e ${triton[0]} ]] || triton=()
  timeout 540 "$PYTHON" -m pytest -q --durations=10 tests/gpu "${BLOCKS[@]/#/--ignore=}" "${triton[@]}"
}
BLOCKS=(tests/gpu/test_gpu_block.py tests/gpu/test_gpu_two_four.py)
# Of the latter the files hold many cases that need none: "gpu" is in the path of all tests of the former.
DEVICES=(tests/test_semi_structured.py tests/test_files_two_four.py)
run_tests-blocks() { timeout 540 "$PYTHON" -m pytest -q --durations=10 "${BLOCKS[@]}" "${DEVICES[@]}" -k "gpu or cuda"; }

run_smoke() {
  timeout 120 "$PYTHON" smoke_test.py || return
  "$PYTHON" -c 'import sys; from benchmarks.gpu.device import reason_against; sys.exit(reason_against())'
}

# The kernels of torch and cuBLAS would take most of the time. initcheck sees them all: it must know who wrote what ours read.
OWN_KERNELS=(--kernel-name kns=bitmask)
run_memcheck() { sanitize oob --cublas -- --tool memcheck; }
run_racecheck() { sanitize race -- --tool racecheck "${OWN_KERNELS[@]}"; }
run_initcheck() { sanitize uninit -- --tool initcheck; }
run_synccheck() { sanitize barrier -- --tool synccheck "${OWN_KERNELS[@]}"; }

# sanitize PLANTED [OPTIONS OF small_shapes.py] -- OPTIONS OF compute-sanitizer: the planted error is found, and no other.
sanitize() {
  local planted=$1 found=9 options=()
  shift
  while [[ $1 != -- ]]; do options+=("$1") && shift; done
  shift
  local command=(compute-sanitizer --error-exitcode "$found" --report-api-errors no --print-limit 20 "$@")
  local planted_program=$OUT/planted
  nvcc -std=c++17 -arch=native -lineinfo -o "$planted_program" tests/gpu/planted.cu || return
  expect "$found" "${command[@]}" "$planted_program" "$planted" &&
    expect 0 "${command[@]}" "$planted_program" clean &&
    PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 expect 0 "${command[@]}" "$PYTHON" tests/gpu/small_shapes.py "${options[@]}"
  local status=$?
  rm -f "$planted_program"
  return $status
}

# expect STATUS COMMAND...: fails unless the command ends with this status.
expect() {
  local expected=$1 status
  shift
  timeout 240 "$@"
  status=$?
  ((status == expected)) || { echo "run_gpu.sh: status $status instead of $expected: $*" && return 1; }
}

run_benchmark() { benchmark codec,linear,decode; }
run_benchmark-blocks() { benchmark block_sparse,semi_structured,decode_blocks; }

# benchmark SUITES: runs them, and writes what is found to a file that is named like the phase.
benchmark() {
  timeout 540 "$PYTHON" benchmark.py --device cuda --suite "$1" "${QUICK[@]}" --json "$OUT/$phase.json"
}

SUMMARY=()
STATUS=0
rm -f "$OUT/sanitizers.log"
for phase in "${PHASES[@]}"; do
  echo "== $phase"
  start=$SECONDS
  log=$OUT/$phase.log
  [[ " ${TOOLS[*]} " != *" $phase "* ]] || log=$OUT/sanitizers.log
  [[ $log == */sanitizers.log ]] || : > "$log"
  echo "== $phase" >> "$log"
  if "run_$phase" >> "$log" 2>&1; then
    outcome=ok
  else
    outcome=FAILED STATUS=1
    tail -n 40 "$log"
  fi
  SUMMARY+=("$(printf '%-17s%-7s%4d s  %s' "$phase" "$outcome" $((SECONDS - start)) "$(tail -n 1 "$log")")")
done
printf '\n== summary (%s)\n' "$OUT"
printf '%s\n' "${SUMMARY[@]}"
exit $STATUS
