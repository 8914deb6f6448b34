// The CUDA implementations of products with a block-sparse weight: check, allocate, take torch's current stream, launch. No arithmetic
// here.
//
// Nothing waits for the GPU but bsr_transpose, which throws. Products with a faulty index give NaN instead: in the columns of y that belong
// to its faulty lines, and where more must be known of an index than its lines, everywhere.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "block_index.h"
#include "block_launch.h"
#include "block_operands.h"
#include "checks.h"
#include "cuda/kernels.h"
#include "dtypes.h"
#include "launch.h"
#include "operands.h"
#include "tensors.h"

namespace bitmask {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// ------------------------------------------------------------------------------------------------------------ operands

int64_t* mutable_entries(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

// Proves all lines, and where an index by columns says that its blocks lie -> the line of each block.
Tensor prove(const Launch& on, const BlockParts& parts, const Verdict& verdict) {
  const std::vector<int64_t> blocks{parts.blocks()};
  const cuda::BlockIndex index = index_of(parts);
  const Tensor lines = on.empty(blocks, aoti_torch_dtype_int64());
  on.check(cuda::prove_block_index(index, mutable_entries(lines), verdict.word(), on.stream()));
  if (parts.order) {
    const Tensor workspace = on.empty(blocks, aoti_torch_dtype_int64());
    on.check(cuda::prove_block_order(index, data_of(lines), verdict.word(), workspace.mutable_data_ptr(), on.stream()));
  }
  return lines;
}

// Proves that an index has the blocks of one by rows, whose lines whoever walks them proves.
void prove_transposed(const Launch& on, const BlockParts& by_row, const BlockParts& by_column, const Verdict& verdict) {
  on.check(cudaMemsetAsync(verdict.word(), 0xff, sizeof(cuda::Fault), on.stream()));  // kNoFault
  on.check(cuda::prove_transposed(index_of(by_row), index_of(by_column), verdict.word(), on.stream()));
}

// ------------------------------------------------------------------------------------------------------------- products

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices, int64_t out_features,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& ccol_indices, const std::optional<Tensor>& row_indices,
                  const std::optional<Tensor>& order, bool allow_tf32) {
  const auto given = [&](const std::optional<Tensor>& tensor) { return tensor ? &*tensor : &values; };
  const std::initializer_list<Named> tensors = {{"values", &values},
                                                {"x", &x},
                                                {"bias", given(bias)},
                                                {"crow_indices", &crow_indices},
                                                {"col_indices", &col_indices},
                                                {"ccol_indices", given(ccol_indices)},
                                                {"row_indices", given(row_indices)},
                                                {"order", given(order)}};
  return launch("bsr_linear", tensors, [&](const Launch& on) {
    check_block_values(values.sizes());
    BlockOperands operands =
        linear_operands(x, dtype_of(values), values.size(0), values.size(1), values.size(2), crow_indices, col_indices, out_features, bias);
    add_transposed(operands, ccol_indices, row_indices, order);
    const Tensor y = on.empty(with_last_size(x, out_features), operands.dtype);
    if (y.numel() == 0) return y;
    const Tensor rows = on.aligned("x", x), blocks = on.aligned("values", values), offset = bias ? contiguous("bias", *bias) : rows;
    cuda::BlockParams params = params_of(operands, blocks, rows, y, allow_tf32);
    params.bias = bias ? offset.const_data_ptr() : nullptr;
    const Verdict verdict(on);
    if (operands.transposed) {
      prove_transposed(on, operands.index, *operands.transposed, verdict);
      params.fault = verdict.word();
    }
    multiply(on, params);
    return y;
  });
}

Tensor bsr_linear_backward_input(const Tensor& grad, const Tensor& values, const Tensor& ccol_indices, const Tensor& row_indices,
                                 const Tensor& order, int64_t in_features, bool allow_tf32) {
  const std::initializer_list<Named> tensors = {
      {"values", &values}, {"grad", &grad}, {"ccol_indices", &ccol_indices}, {"row_indices", &row_indices}, {"order", &order}};
  return launch("bsr_linear_backward_input", tensors, [&](const Launch& on) {
    const BlockOperands operands = backward_input_operands(grad, values, ccol_indices, row_indices, order, in_features);
    const Tensor y = on.empty(with_last_size(grad, in_features), operands.dtype);
    if (y.numel() == 0) return y;
    const Tensor rows = on.aligned("grad", grad), blocks = on.aligned("values", values);
    cuda::BlockParams params = params_of(operands, blocks, rows, y, allow_tf32);
    const Verdict verdict(on);
    prove(on, operands.index, verdict);
    params.fault = verdict.word();
    multiply(on, params);
    return y;
  });
}

void sample(const Launch& on, const cuda::BlockSampleParams& params) {
  const cuda::Device device = on.device();
  const cuda::BlockPlan plan = cuda::plan_block_sample(params, device);
  const Tensor workspace = on.bytes(plan.workspace_bytes);
  const auto run = plan.way == cuda::BlockWay::kMultiply    ? cuda::block_sample
                   : plan.way == cuda::BlockWay::kWarpgroup ? cuda::block_sample_warpgroup
                                                            : cuda::block_sample_cores;
  on.check(run(params, device, workspace.mutable_data_ptr(), on.stream()));
}

Tensor bsr_linear_backward_values(const Tensor& grad, const Tensor& x, const Tensor& crow_indices, const Tensor& col_indices,
                                  IntHeaderOnlyArrayRef block_shape, bool allow_tf32) {
  const std::initializer_list<Named> tensors = {{"grad", &grad}, {"x", &x}, {"crow_indices", &crow_indices}, {"col_indices", &col_indices}};
  return launch("bsr_linear_backward_values", tensors, [&](const Launch& on) {
    const BlockOperands operands = backward_values_operands(grad, x, crow_indices, col_indices, block_shape);
    const BlockSizes& sizes = operands.sizes;
    const Tensor values = on.empty(values_sizes(operands), operands.dtype);
    if (values.numel() == 0) return values;
    const Verdict verdict(on);
    const Tensor lines = prove(on, operands.index, verdict);
    if (rows_of(x) == 0) {
      on.check(cudaMemsetAsync(values.mutable_data_ptr(), 0, static_cast<size_t>(nbytes(values)), on.stream()));
      verdict.poison(values);
      return values;
    }
    const Tensor g = on.aligned("grad", grad), rows = on.aligned("x", x);
    cuda::BlockSampleParams params{};
    params.index = index_of(operands.index);
    params.lines = data_of(lines);
    params.values = values.mutable_data_ptr();
    params.rows = sizes.rows;
    params.cols = sizes.cols;
    params.block_rows = sizes.block_rows;
    params.block_cols = sizes.block_cols;
    params.g = g.const_data_ptr();
    params.x = rows.const_data_ptr();
    params.m = rows_of(x);
    params.dtype = linear_dtype_of(operands.dtype);
    params.tf32 = allow_tf32;
    params.fault = verdict.word();
    sample(on, params);
    return values;
  });
}

// ------------------------------------------------------------------------------------------------------------- the index

std::vector<int64_t> copy_to_cpu(const Launch& on, const Tensor& from) {
  std::vector<int64_t> copy(static_cast<size_t>(from.numel()));
  if (!copy.empty()) on.read(copy.data(), from.const_data_ptr(), copy.size() * sizeof(int64_t));
  return copy;
}

// Until the stream is waited for, `from` has to stay.
void copy_to_gpu(const Launch& on, const std::vector<int64_t>& from, const Tensor& to) {
  if (from.empty()) return;
  on.check(cudaMemcpyAsync(to.mutable_data_ptr(), from.data(), from.size() * sizeof(int64_t), cudaMemcpyHostToDevice, on.stream()));
}

// On the CPU: its copy of the index is the one that is proven, and faults are named.
std::tuple<Tensor, Tensor, Tensor> bsr_transpose(const Tensor& crow_indices, const Tensor& col_indices, int64_t cols_of_blocks) {
  const std::initializer_list<Named> tensors = {{"crow_indices", &crow_indices}, {"col_indices", &col_indices}};
  return launch("bsr_transpose", tensors, [&](const Launch& on) -> std::tuple<Tensor, Tensor, Tensor> {
    on.refuse_capture("transpose before, and hand the result over");
    const BlockParts parts = parts_to_transpose(crow_indices, col_indices, cols_of_blocks);
    const std::vector<int64_t> starts = copy_to_cpu(on, parts.starts), positions = copy_to_cpu(on, parts.positions);
    const BlockIndex index = copy_block_index(parts.fields, starts.data(), parts.lines, positions.data(), parts.blocks(), parts.limit);
    const auto entries = [&](int64_t count) { return on.empty(std::vector<int64_t>{count}, aoti_torch_dtype_int64()); };
    const Tensor ccol_indices = entries(cols_of_blocks + 1), row_indices = entries(parts.blocks()), order = entries(parts.blocks());
    const BlockIndex transposed = transpose(index, cols_of_blocks);
    copy_to_gpu(on, transposed.line_starts, ccol_indices);
    copy_to_gpu(on, transposed.positions, row_indices);
    copy_to_gpu(on, transposed.order, order);
    on.check(cudaStreamSynchronize(on.stream()));
    return {ccol_indices, row_indices, order};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CUDA, m) {
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_backward_input", TORCH_BOX(&bsr_linear_backward_input));
  m.impl("bsr_linear_backward_values", TORCH_BOX(&bsr_linear_backward_values));
  m.impl("bsr_transpose", TORCH_BOX(&bsr_transpose));
}

}  // namespace bitmask
