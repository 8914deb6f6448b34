// Kernels for AArch64, where NEON is always there.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bitmask::cpu {
namespace {
#include "tables.h"
#include "simd_neon.h"
#include "generic/codec.h"
#include "generic/lanes.h"
#include "generic/linear.h"
#include "generic/table.h"
constexpr Kernels kTable =
    make_kernels<PortableLanes<Float32Element>, PortableLanes<Bfloat16Element>, PortableLanes<Float16Element>>("neon");
}  // namespace
const Kernels& kernels_neon() { return kTable; }
}  // namespace bitmask::cpu
#endif
