// How a product with a compressed weight is done on a GPU: the choices in one place, made without one.
#include "kernels.h"
#include "linear_multiply.h"

namespace bitmask::cuda {
namespace {

// Rows of x up to which W is streamed. 16 bits: from there on, tensor cores reuse what is expanded, and CUDA cores that feed them a few
// columns at a time fall behind. float32 has no tensor cores that keep its precision; four rows of x cost another pass over W, 2.1 bytes
// an element at 50% sparsity, where decompressing it costs 10.1: that many, written and read again.
constexpr int64_t kStreamRows = 4;
constexpr int64_t kStreamRowsFloat32 = 16;

// Rows of x from which on cuBLAS gains more from dense weights than it costs to decompress them.
constexpr int64_t kMultiplyRows = 64;

}  // namespace

LinearPlan plan_linear(const LinearParams& params, const Device& device) {
  if (params.m <= (params.dtype == kFloat32 ? kStreamRowsFloat32 : kStreamRows)) return {LinearWay::kStream, 0};
  if (params.dtype != kFloat32 && params.m <= kMultiplyRows) {
    return {LinearWay::kMultiply, linear_multiply_workspace_bytes(params, device)};
  }
  return {LinearWay::kLibrary, 0};
}

}  // namespace bitmask::cuda
