// What the CUDA implementations of products with a block-sparse weight share: operands as kernels take them, and the launch.
#pragma once

#include <cstdint>

#include "block_operands.h"
#include "cuda/kernels.h"
#include "launch.h"

namespace bitmask {

inline cuda::BlockIndex index_of(const BlockParts& parts) {
  const int64_t* const order = parts.order ? data_of(*parts.order) : nullptr;
  return {data_of(parts.starts), data_of(parts.positions), order, parts.lines, parts.blocks(), parts.limit};
}

inline void multiply(const Launch& on, const cuda::BlockParams& params) {
  const cuda::Device device = on.device();
  const cuda::BlockPlan plan = cuda::plan_block(params, device);
  const Tensor workspace = on.bytes(plan.workspace_bytes);
  const auto run = plan.way == cuda::BlockWay::kStream      ? cuda::block_stream
                   : plan.way == cuda::BlockWay::kMultiply  ? cuda::block_multiply
                   : plan.way == cuda::BlockWay::kWarpgroup ? cuda::block_warpgroup
                                                            : cuda::block_cores;
  on.check(run(params, device, workspace.mutable_data_ptr(), on.stream()));
}

// Of contiguous operands. What they share with the other products is filled in.
inline cuda::BlockParams params_of(const BlockOperands& operands, const Tensor& values, const Tensor& x, const Tensor& y, bool allow_tf32) {
  const BlockSizes& sizes = operands.sizes;
  cuda::BlockParams params{};
  params.index = index_of(operands.index);
  params.values = values.const_data_ptr();
  params.rows = sizes.rows;
  params.cols = sizes.cols;
  params.block_rows = sizes.block_rows;
  params.block_cols = sizes.block_cols;
  params.transposed = operands.index.order.has_value();
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.m = rows_of(x);
  params.dtype = linear_dtype_of(operands.dtype);
  params.tf32 = allow_tf32;
  return params;
}

}  // namespace bitmask
