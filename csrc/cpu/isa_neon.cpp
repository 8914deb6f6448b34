// Kernels for AArch64, where NEON is always there.
#include "kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace bitmask::cpu {
namespace {
#include "tables.h"
#include "simd_neon.h"
#include "generic/codec.h"
constexpr Kernels kTable = make_kernels("neon");
}  // namespace
const Kernels& kernels_neon() { return kTable; }
}  // namespace bitmask::cpu
#endif
