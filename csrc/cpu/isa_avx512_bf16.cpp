// Kernels for AVX-512 with VBMI2 and BF16 (Sapphire Rapids, Zen 4 and later). The target region reaches to the end of the file, because
// templates take the options in force where they are instantiated; nothing from the standard library may be included inside it.
#include "kernels.h"

#if defined(__x86_64__)
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes the intrinsics' own undefined vectors for ours (bug 105593)
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,bmi,bmi2,popcnt")
#endif

namespace bitmask::cpu {
namespace {
#include "generic/elements.h"
#include "simd_avx512.h"
#include "simd_avx512_bf16.h"
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
constexpr Kernels kTable = make_kernels<Float32Lanes, Bfloat16PairLanes, Float16Lanes, WidenedBfloat16Lanes>("avx512_bf16");
}  // namespace
const Kernels& kernels_avx512_bf16() { return kTable; }
}  // namespace bitmask::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
