// Kernels for AVX2 (Haswell, Zen and later). The target region reaches to the end of the file, because templates take
// the options in force where they are instantiated; nothing from the standard library may be included inside it.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace bitmask::cpu {
namespace {
#include "tables.h"
#include "generic/elements.h"
#include "simd_avx2.h"
#include "generic/codec.h"
#include "generic/convert_rows.h"
#include "generic/convert_transpose.h"
#include "generic/convert_blocks.h"
#include "generic/two_four_codec.h"
#include "generic/lanes.h"
#include "generic/linear_rows.h"
#include "generic/linear_stream.h"
#include "generic/linear_multiply.h"
#include "generic/linear_gradient.h"
#include "generic/block_tiles.h"
#include "generic/block_stream.h"
#include "generic/block_stream_transposed.h"
#include "generic/block_multiply.h"
#include "generic/block_sample.h"
#include "generic/two_four_stream.h"
#include "generic/two_four_multiply.h"
#include "generic/two_four_prune.h"
#include "generic/table.h"
constexpr Kernels kTable = make_kernels<Float32Lanes, Bfloat16Lanes, Float16Lanes>("avx2");
}  // namespace
const Kernels& kernels_avx2() { return kTable; }
}  // namespace bitmask::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
