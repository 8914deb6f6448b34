// Picks the kernel table once, by what CPU and operating system support (cpuid and xgetbv, behind __builtin_cpu_supports).
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace bitmask::cpu {
namespace {

struct Candidate {
  const char* name;
  bool (*runs_here)();
  const Kernels& (*table)();
};

#if defined(__x86_64__)
// The compilers' built-in check does not know F16C everywhere; whether the system saves AVX registers, AVX2's check tells.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
bool always() { return true; }

// Best first. To add an instruction set, add its line.
constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, kernels_avx512_bf16},
    {"avx512", has_avx512, kernels_avx512},
    {"avx2", has_avx2, kernels_avx2},
#elif defined(__aarch64__)
    {"neon", always, kernels_neon},
#endif
    {"scalar", always, kernels_scalar},
};

// The index-th candidate that this machine can run, or nullptr.
const Candidate* runnable(int index) {
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here() && index-- == 0) return &candidate;
  }
  return nullptr;
}

const Kernels* find(const char* name) {
  if (name == nullptr || *name == '\0') return &runnable(0)->table();
  for (int i = 0; const Candidate* candidate = runnable(i); ++i) {
    if (std::strcmp(candidate->name, name) == 0) return &candidate->table();
  }
  return nullptr;
}

// BITMASK_ISA, or the best where it names nothing this machine runs (module.cpp refuses to import in that case).
const Kernels* initial() {
  const Kernels* asked = find(std::getenv("BITMASK_ISA"));
  return asked != nullptr ? asked : find(nullptr);
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{initial()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

int isa_count() {
  int count = 0;
  while (runnable(count) != nullptr) ++count;
  return count;
}

const char* isa_name(int index) { return runnable(index)->name; }

bool force_isa(const char* name) {
  const Kernels* table = find(name);
  if (table != nullptr) current().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

}  // namespace bitmask::cpu
