// Kernels for any CPU.
#include "kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // how vectors are passed here concerns nobody else

namespace bitmask::cpu {
namespace {
#include "generic/elements.h"
#include "simd_scalar.h"
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
constexpr Kernels kTable =
    make_kernels<PortableLanes<Float32Element>, PortableLanes<Bfloat16Element>, PortableLanes<Float16Element>>("scalar");
}  // namespace
const Kernels& kernels_scalar() { return kTable; }
}  // namespace bitmask::cpu
