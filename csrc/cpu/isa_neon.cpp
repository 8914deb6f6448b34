// Kernels for AArch64, where NEON is always there.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bitmask::cpu {
namespace {
#include "tables.h"
#include "generic/elements.h"
#include "simd_neon.h"
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
constexpr Kernels kTable = make_kernels<Float32Lanes, Bfloat16Lanes, Float16Lanes>("neon");
}  // namespace
const Kernels& kernels_neon() { return kTable; }
}  // namespace bitmask::cpu
#endif
