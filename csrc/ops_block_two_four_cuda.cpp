// The CUDA implementation of the product with a block-sparse weight whose kept blocks are 2:4. It waits for nothing: faulty metadata and
// faulty lines of the index give NaN in the columns of y that belong to them, or everywhere where the blocks are unpacked first.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "block_launch.h"
#include "block_operands.h"
#include "cuda/kernels.h"
#include "launch.h"
#include "operands.h"
#include "tensors.h"

namespace bitmask {
namespace {

// Unpacks all blocks, and multiplies with them.
void multiply_unpacked(const Launch& on, const BlockOperands& operands, const TwoFourParts& parts, const Tensor& x, const void* bias,
                       const Tensor& y) {
  const Tensor values = on.empty(parts.sizes, parts.element.dtype);
  const Verdict verdict(on);
  const TwoFourMatrix& w = parts.matrix;
  on.check(cuda::unpack_24(w, 0, w.rows, parts.element.width, values.mutable_data_ptr(), true, verdict.word(), on.stream()));
  cuda::BlockParams params = params_of(operands, values, x, y, false);
  params.bias = bias;
  params.fault = verdict.word();
  multiply(on, params);
}

cuda::TwoFourParams params_of(const BlockOperands& operands, const TwoFourParts& parts, const Tensor& values, const Tensor& x,
                              const void* bias, const Tensor& y) {
  const BlockSizes& sizes = operands.sizes;
  cuda::TwoFourParams params{};
  params.values = values.const_data_ptr();
  params.metadata = parts.matrix.metadata;
  params.rows = sizes.rows;
  params.cols = sizes.cols;
  params.index = index_of(operands.index);
  params.block_rows = sizes.block_rows;
  params.block_cols = sizes.block_cols;
  params.x = x.const_data_ptr();
  params.bias = bias;
  params.y = y.mutable_data_ptr();
  params.m = rows_of(x);
  params.dtype = linear_dtype_of(operands.dtype);
  return params;
}

Tensor bsr_linear_24(const Tensor& x, const Tensor& values, const Tensor& metadata, const Tensor& crow_indices, const Tensor& col_indices,
                     int64_t out_features, const std::optional<Tensor>& bias) {
  const std::initializer_list<Named> tensors = {
      {"values", &values},          {"metadata", &metadata}, {"x", &x}, {"bias", bias ? &*bias : &values}, {"crow_indices", &crow_indices},
      {"col_indices", &col_indices}};
  return launch("bsr_linear_24", tensors, [&](const Launch& on) {
    const TwoFourParts parts = two_four_blocks_of(values, metadata);
    const BlockOperands operands = linear_operands(x, parts.element.dtype, parts.sizes[0], parts.sizes[1], parts.sizes[2], crow_indices,
                                                   col_indices, out_features, bias);
    const Tensor y = on.empty(with_last_size(x, out_features), operands.dtype);
    if (y.numel() == 0) return y;
    const Tensor rows = on.aligned("x", x), offset = bias ? contiguous("bias", *bias) : rows;
    const void* const bias_data = bias ? offset.const_data_ptr() : nullptr;
    const Tensor stored = on.aligned("values", parts.values);
    const cuda::TwoFourParams params = params_of(operands, parts, stored, rows, bias_data, y);
    const cuda::Device device = on.device();
    const cuda::TwoFourPlan plan = cuda::plan_two_four(params, device);
    if (plan.way == cuda::TwoFourWay::kLibrary) {
      multiply_unpacked(on, operands, parts, rows, bias_data, y);
      return y;
    }
    const Tensor workspace = on.bytes(plan.workspace_bytes);
    const auto run = plan.way == cuda::TwoFourWay::kStream ? cuda::two_four_stream : cuda::two_four_multiply;
    on.check(run(params, device, workspace.mutable_data_ptr(), on.stream()));
    return y;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CUDA, m) { m.impl("bsr_linear_24", TORCH_BOX(&bsr_linear_24)); }

}  // namespace bitmask
