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

// Elements of W from which on, by their instruction counts, multiply beats stream even for one row of x of 16 bits, where at least a
// quarter of them is stored: 2.2 instead of 2.8 cycles for 32 elements, against 1.5 microseconds more to begin with. Neither has been timed
// yet.
constexpr int64_t kMultiplyElements = int64_t{32} << 20;

// Rows of x from which on cuBLAS gains more from dense weights than it costs to decompress them.
constexpr int64_t kMultiplyRows = 64;

// Columns that both kernels can count in 32 bits.
constexpr int64_t kMostColumns = int64_t{1} << 30;

bool streams(const LinearParams& params) {
  if (params.dtype == kFloat32) return params.m <= kStreamRowsFloat32;
  const BitmaskMatrix& w = params.w;
  const bool large = w.cols > 0 && w.rows >= kMultiplyElements / w.cols;
  return params.m <= kStreamRows && !(large && w.nnz / w.cols >= w.rows / 4);
}

}  // namespace

LinearPlan plan_linear(const LinearParams& params, const Device& device) {
  if (params.w.cols > kMostColumns) return {LinearWay::kLibrary, 0};
  if (streams(params)) return {LinearWay::kStream, 0};
  if (params.dtype != kFloat32 && params.m <= kMultiplyRows) {
    return {LinearWay::kMultiply, linear_multiply_workspace_bytes(params, device)};
  }
  return {LinearWay::kLibrary, 0};
}

}  // namespace bitmask::cuda
