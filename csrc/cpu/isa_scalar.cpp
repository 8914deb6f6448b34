// Kernels for any CPU.
#include "kernels.h"

namespace bitmask::cpu {
namespace {
#include "simd_scalar.h"
#include "generic/codec.h"
constexpr Kernels kTable = make_kernels("scalar");
}  // namespace
const Kernels& kernels_scalar() { return kTable; }
}  // namespace bitmask::cpu
