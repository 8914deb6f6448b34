// Kernels for AVX-512 with VBMI2 (Ice Lake, Zen 4 and later). The target region reaches to the end of the file, because templates take
// the options in force where they are instantiated; nothing from the standard library may be included inside it.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi,bmi2,popcnt")
#endif

namespace bitmask::cpu {
namespace {
#include "simd_avx512.h"
#include "generic/codec.h"
#include "generic/lanes.h"
#include "generic/linear.h"
#include "generic/table.h"
constexpr Kernels kTable =
    make_kernels<PortableLanes<Float32Element>, PortableLanes<Bfloat16Element>, PortableLanes<Float16Element>>("avx512");
}  // namespace
const Kernels& kernels_avx512() { return kTable; }
}  // namespace bitmask::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
