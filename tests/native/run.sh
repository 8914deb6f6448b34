#!/usr/bin/env bash
# Builds and runs the tests of the CPU kernels that need neither Python nor torch.
#
#   tests/native/run.sh [host|sanitize|planted|extension|neon|baseline|fuzz [SECONDS]|all [SECONDS]]      default: all
#
#   host      every kernel table that this machine can run, built as the extension is: for any CPU of this architecture
#   sanitize  the same under AddressSanitizer and UndefinedBehaviorSanitizer
#   planted   kernels of each table read past a buffer on purpose, which AddressSanitizer must report
#   extension the Python tests of the ops on an extension built with both sanitizers, and a planted error that must be reported
#   neon      AArch64 build, run by qemu
#   baseline  x86-64 build on emulated CPUs without AVX and without AVX-512: it must start there and use what there is
#   fuzz      replays tests/fuzz/regressions, then fuzzes for SECONDS (60), a share for each target; inputs that fail are kept there
#
# Needs g++, clang++ with its sanitizer and libFuzzer runtimes, an AArch64 cross g++ with a static libc, and qemu-user. CXX, CLANGXX,
# AARCH64_CXX, QEMU_AARCH64 and QEMU_X86_64 name other programs. Everything built goes to build/native.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BUILD=build/native
WARNINGS=(-std=c++17 -Wall -Wextra -Werror)
SANITIZERS=(-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all)
TESTS='tests/native/test_*.cpp'
FUZZ_TARGETS=(decompress linear block two_four)

fail() {
  echo "run.sh: $*" >&2
  exit 1
}

# Prints the first program of the list that is installed. $1: the variable that overrides the list.
tool() {
  local variable=$1
  shift
  [[ -n ${!variable:-} ]] && set -- "${!variable}"
  local name
  for name in "$@"; do
    if command -v "$name" > /dev/null; then
      echo "$name"
      return
    fi
  done
  fail "none of these is installed: $* (set $variable to name another)"
}

# compile OBJECTS SOURCES COMPILER FLAGS...: compiles the kernels and SOURCES, a pattern, as many files at a time as there are processors.
compile() {
  local objects=$BUILD/$1.o pattern=$2
  shift 2
  rm -rf "$objects"
  mkdir -p "$objects"
  # shellcheck disable=SC2086
  printf '%s\0' csrc/cpu/*.cpp $pattern |
    xargs -0 -P "$(nproc)" -I{} sh -c 'source=$1 objects=$2; shift 2; "$@" -c "$source" -o "$objects/$(basename "$source").o"' \
      sh {} "$objects" "$@" "${WARNINGS[@]}" || fail "$objects does not compile"
}

# build OUTPUT COMPILER FLAGS...: the program of all tests.
build() {
  local output=$1
  shift
  compile "$output" "$TESTS" "$@"
  "$@" "$BUILD/$output.o"/*.o -o "$BUILD/$output"
}

# The program of all tests under both sanitizers, built once.
build_sanitized() {
  [[ -z ${SANITIZED:-} ]] || return 0
  local clangxx
  clangxx=$(tool CLANGXX clang++-16 clang++-14 clang++)
  build sanitize "$clangxx" "${SANITIZERS[@]}" -fsanitize=address,undefined
  SANITIZED=yes
}

run_host() {
  local cxx isa
  cxx=$(tool CXX g++ clang++)
  build host "$cxx" -O3
  "$BUILD/host"
  for isa in $("$BUILD/host" --list) unheard-of; do
    BITMASK_ISA=$isa "$BUILD/host" --dispatch
  done
}

run_sanitize() {
  build_sanitized
  "$BUILD/sanitize"
}

run_planted() {
  local isa error
  build_sanitized
  for isa in $("$BUILD/sanitize" --list); do
    for error in expand stream multiply gradient block_stream block_multiply block_transposed block_sample \
      pack_24 unpack_24 metadata_24 prune_24 transposable_24 list_columns transpose_values expand_blocks; do
      local report=$BUILD/planted.$isa.$error.txt
      if BITMASK_ISA=$isa "$BUILD/sanitize" --plant "$error" > "$report" 2>&1; then fail "$isa: the error planted in $error went unnoticed"; fi
      grep -q "reading past a buffer with $isa in $error\$" "$report" || fail "$isa: was not run; see $report"
      grep -q 'ERROR: AddressSanitizer: heap-buffer-overflow' "$report" || fail "$isa: failed otherwise than planned; see $report"
    done
    echo "$isa: AddressSanitizer reports the planted errors"
  done
}

run_extension() {
  local python tree=$BUILD/extension preload
  python=$(tool PYTHON python python3)
  rm -rf "$tree"
  mkdir -p "$tree"
  cp -r setup.py pyproject.toml README.md csrc bitmask benchmarks tests "$tree"
  rm -f "$tree"/bitmask/*.so
  (cd "$tree" && BITMASK_CUDA=0 BITMASK_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace) > "$BUILD/extension.txt" 2>&1 ||
    fail "the sanitized extension does not build; see $BUILD/extension.txt"
  # Python itself is not instrumented, so the runtime comes first by preloading; leaks at exit are Python's own.
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
  # Tests ask for more memory than there is and expect an error, not the end of the process.
  local options=detect_leaks=0:allocator_may_return_null=1
  sanitized() { (cd "$tree" && PYTHONPATH=. LD_PRELOAD=$preload ASAN_OPTIONS=$options "$python" "$@"); }
  # Large products are left to the native tests, which are faster under the sanitizers.
  local left_out="not compile and not opcheck and not larger_sizes and not many_rows"
  sanitized -m pytest -q -p no:cacheprovider -k "$left_out" tests/test_ops.py tests/test_linear.py tests/test_linear_gradient.py \
    tests/test_block_ops.py tests/test_block_ops_refused.py tests/test_two_four_ops.py tests/test_two_four_linear.py tests/test_sparse_layouts.py tests/test_block_two_four_ops.py
  local report=$BUILD/extension.planted.txt
  if sanitized tests/native/planted_extension.py > "$report" 2>&1; then fail "extension: the planted error went unnoticed"; fi
  grep -q 'ERROR: AddressSanitizer: heap-buffer-overflow' "$report" || fail "extension: failed otherwise than planned; see $report"
  echo "extension: AddressSanitizer reports the planted error"
}

run_neon() {
  local cxx qemu
  cxx=$(tool AARCH64_CXX aarch64-linux-gnu-g++)
  qemu=$(tool QEMU_AARCH64 qemu-aarch64 qemu-aarch64-static)
  build neon "$cxx" -O3 -static
  "$qemu" "$BUILD/neon" --brief neon scalar
}

run_baseline() {
  local cxx qemu
  [[ $(uname -m) == x86_64 ]] || fail "baseline: needs an x86-64 machine, this is $(uname -m)"
  cxx=$(tool CXX g++ clang++)
  qemu=$(tool QEMU_X86_64 qemu-x86_64 qemu-x86_64-static)
  build baseline "$cxx" -O3 -static
  "$qemu" -cpu Westmere "$BUILD/baseline" --brief scalar
  # A Haswell less the features that emulation warns it lacks; no kernel uses them.
  "$qemu" -cpu Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid "$BUILD/baseline" --brief avx2 scalar
}

# fuzz TARGET SECONDS
fuzz() {
  local program=$BUILD/fuzz_$1 regressions=tests/fuzz/regressions/$1 corpus=$BUILD/corpus/$1 seconds=$2
  local -a kept
  mkdir -p "$regressions"
  mapfile -d '' kept < <(find "$regressions" -type f -print0)
  if ((${#kept[@]} > 0)); then
    "$program" "${kept[@]}" > "$BUILD/replay.txt" 2>&1 || {
      tail -n 60 "$BUILD/replay.txt"
      fail "$1: a kept input fails again; the whole report is in $BUILD/replay.txt"
    }
  fi
  echo "$1: ${#kept[@]} kept inputs replayed"
  rm -rf "$corpus"
  mkdir -p "$BUILD/corpus"
  cp -r "tests/fuzz/corpus/$1" "$corpus"
  "$program" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
    -artifact_prefix="$regressions/" "$corpus" > "$BUILD/fuzz_$1.txt" 2>&1 || {
    tail -n 60 "$BUILD/fuzz_$1.txt"
    fail "$1: fuzzing found a fault; the whole report is in $BUILD/fuzz_$1.txt"
  }
  grep '^stat::' "$BUILD/fuzz_$1.txt"
}

run_fuzz() {
  local clangxx target
  clangxx=$(tool CLANGXX clang++-16 clang++-14 clang++)
  compile fuzz 'tests/fuzz/fuzz_*.cpp' "$clangxx" "${SANITIZERS[@]}" -fsanitize=fuzzer,address,undefined
  for target in "${FUZZ_TARGETS[@]}"; do
    local -a objects=("$BUILD/fuzz.o/fuzz_$target.cpp.o")
    mapfile -O 1 -t objects < <(find "$BUILD/fuzz.o" -type f ! -name 'fuzz_*')
    "$clangxx" -fsanitize=fuzzer,address,undefined "${objects[@]}" -o "$BUILD/fuzz_$target"
  done
  for target in "${FUZZ_TARGETS[@]}"; do
    fuzz "$target" $((($1 + ${#FUZZ_TARGETS[@]} - 1) / ${#FUZZ_TARGETS[@]}))
  done
}

WHAT=${1:-all}
SECONDS_OF_FUZZING=${2:-60}
[[ $SECONDS_OF_FUZZING =~ ^[1-9][0-9]*$ ]] || fail "not a number of seconds: $SECONDS_OF_FUZZING"
mkdir -p "$BUILD"
case $WHAT in
  host | sanitize | planted | extension | neon | baseline) PARTS=("$WHAT") ;;
  fuzz) PARTS=(fuzz) ;;
  all) PARTS=(host sanitize planted extension neon baseline fuzz) ;;
  *) fail "unknown part \"$WHAT\": host, sanitize, planted, extension, neon, baseline, fuzz [SECONDS] or all [SECONDS]" ;;
esac
for part in "${PARTS[@]}"; do
  echo "== $part"
  SECONDS=0
  "run_$part" "$SECONDS_OF_FUZZING"
  echo "== $part passed in $SECONDS s"
done
