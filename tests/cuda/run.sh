#!/usr/bin/env bash
# Builds and runs the tests of the CUDA kernels on the CPU, by the twin of the CUDA runtime in tests/cuda/twin: no GPU, no CUDA toolkit.
#
#   tests/cuda/run.sh [host|sanitize|race|planted|all] [--only FAMILY]      default: all
#
#   host      every test
#   sanitize  the same under AddressSanitizer and UndefinedBehaviorSanitizer
#   race      the same under ThreadSanitizer, to which every CUDA thread is a thread: accesses that nothing orders are reported
#   planted   errors planted on purpose, which a sanitizer, the twin or a check must report
#
# BITMASK_TWIN_SEED=N replays the schedule that a failure names. Needs g++, clang++ with its sanitizer runtimes; CXX and CLANGXX name other
# programs. Everything built goes to build/cuda.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

BUILD=build/cuda
FLAGS=(-std=c++17 -Itests/cuda/twin -Itests/cuda -Icsrc/cuda -Wall -Wextra -Werror -Wno-unknown-pragmas)

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

# build OUTPUT COMPILER FLAGS...: the program of all tests, as many files at a time as there are processors. Kernels are C++ here.
build() {
  local output=$BUILD/$1
  shift
  rm -rf "$output.o"
  mkdir -p "$output.o"
  find csrc/cuda tests/cuda tests/cuda/twin -maxdepth 1 \( -name '*.cu' -o -name '*.cpp' \) -print0 |
    xargs -0 -P "$(nproc)" -I{} sh -c 'source=$1 objects=$2; shift 2; "$@" -x c++ -c "$source" -o "$objects/$(basename "$source").o"' \
      sh {} "$output.o" "$@" "${FLAGS[@]}" || fail "$output does not compile"
  "$@" "$output.o"/*.o -o "$output"
}

# build_sanitized NAME SANITIZERS FLAGS...: the program of all tests under sanitizers, built once.
build_sanitized() {
  local name=$1 sanitizers=$2
  shift 2
  [[ " ${SANITIZED:-} " != *" $name "* ]] || return 0
  local clangxx
  clangxx=$(tool CLANGXX clang++-16 clang++-14 clang++)
  build "$name" "$clangxx" -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all "-fsanitize=$sanitizers" -Wno-pass-failed "$@"
  SANITIZED="${SANITIZED:-} $name"
}

build_sanitize() { build_sanitized sanitize address,undefined -fsanitize-address-use-after-return=never; }
build_race() { build_sanitized race thread; }

# run PROGRAM [--only FAMILY]: as many families at a time as there are processors.
run() {
  local program=$BUILD/$1
  shift
  if (($# == 0)); then
    "${FIXED[@]}" "$program" --families | xargs -P "$(nproc)" -I{} "${FIXED[@]}" "$program" --only {} || fail "$program found errors"
  else
    "${FIXED[@]}" "$program" "$@"
  fi
}

run_host() {
  local cxx
  cxx=$(tool CXX g++ clang++)
  build host "$cxx" -O2
  run host "$@"
}

run_sanitize() {
  build_sanitize
  run sanitize "$@"
}

run_race() {
  build_race
  run race "$@"
}

run_planted() {
  build_sanitize
  build_race
  local error expected program
  while IFS=$'\t' read -r error expected; do
    local report=$BUILD/planted.$error.txt
    program=sanitize
    [[ $expected != ThreadSanitizer* ]] || program=race
    if "${FIXED[@]}" "$BUILD/$program" --plant "$error" > "$report" 2>&1; then fail "the error planted in $error went unnoticed"; fi
    grep -q -- "$expected" "$report" || fail "$error: failed otherwise than planned; see $report"
    echo "$error: reported"
  done < <("${FIXED[@]}" "$BUILD/sanitize" --planted)
}

# ThreadSanitizer needs memory where it expects it, not at random places, if this machine lets us ask for that.
FIXED=(setarch "$(uname -m)" --addr-no-randomize)
"${FIXED[@]}" true 2> /dev/null || FIXED=()

WHAT=${1:-all}
(($# == 0)) || shift
[[ $# == 0 || ($# == 2 && $1 == --only) ]] || fail "not understood: $*"
mkdir -p "$BUILD"
case $WHAT in
  host | sanitize | race | planted) PARTS=("$WHAT") ;;
  all) PARTS=(host sanitize race planted) ;;
  *) fail "unknown part \"$WHAT\": host, sanitize, race, planted or all" ;;
esac
for part in "${PARTS[@]}"; do
  echo "== $part"
  SECONDS=0
  "run_$part" "$@"
  echo "== $part passed in $SECONDS s"
done
