// The CPU implementations of products with a block-sparse weight, and of the transpose of its index. No arithmetic here.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "block_index.h"
#include "block_operands.h"
#include "block_products.h"
#include "checks.h"
#include "layout.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace bitmask {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// Fails unless that is the transpose of an index.
void check_transposed(const BlockIndex& index, const BlockParts& transposed) {
  const BlockIndex expected = transpose(index, transposed.lines);
  const char* const yardstick = "crow_indices and col_indices";
  check_entries(transposed.fields.starts, data_of(transposed.starts), expected.line_starts, yardstick);
  check_entries(transposed.fields.positions, data_of(transposed.positions), expected.positions, yardstick);
  check_entries("order", data_of(*transposed.order), expected.order, yardstick);
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices, int64_t out_features,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& ccol_indices, const std::optional<Tensor>& row_indices,
                  const std::optional<Tensor>& order, bool /* allow_tf32: CPUs have none */) {
  check_block_values(values.sizes());
  BlockOperands operands =
      linear_operands(x, dtype_of(values), values.size(0), values.size(1), values.size(2), crow_indices, col_indices, out_features, bias);
  add_transposed(operands, ccol_indices, row_indices, order);
  const BlockWeight weight = weight_of(operands, values);
  if (operands.transposed) check_transposed(weight.index, *operands.transposed);

  const BlockKernels& kernels = weight.kernels;
  const Tensor y = empty(with_last_size(x, out_features), operands.dtype);
  const int64_t m = rows_of(x);
  if (m == 0 || out_features == 0) return y;
  const Tensor rows = contiguous("x", x), offset = bias ? contiguous("bias", *bias) : rows;
  const void* const bias_data = bias ? const_bytes(offset) : nullptr;
  const BlockMatrix w = weight.matrix();
  if (m <= kernels.streaming_rows) {
    stream(weight, const_bytes(rows), m, [&](int64_t begin, int64_t end, const void* packed) {
      kernels.stream(w, begin, end, packed, m, bias_data, mutable_bytes(y), w.rows, scratch(kernels.scratch_bytes));
    });
  } else {
    multiply(weight, const_bytes(rows), m, mutable_bytes(y), [&](int64_t begin, int64_t end, const void* tiles, int64_t count, void* to) {
      kernels.multiply(w, begin, end, tiles, count, bias_data, to, w.rows, scratch(kernels.scratch_bytes));
    });
  }
  return y;
}

Tensor bsr_linear_backward_input(const Tensor& grad, const Tensor& values, const Tensor& ccol_indices, const Tensor& row_indices,
                                 const Tensor& order, int64_t in_features, bool /* allow_tf32 */) {
  const BlockOperands operands = backward_input_operands(grad, values, ccol_indices, row_indices, order, in_features);
  const BlockWeight weight = weight_of(operands, values);

  const Tensor y = empty(with_last_size(grad, in_features), operands.dtype);
  const int64_t m = rows_of(grad);
  if (m == 0 || in_features == 0) return y;
  const BlockKernels& kernels = weight.kernels;
  const BlockMatrix w = weight.matrix();
  const Tensor g = contiguous("grad", grad);
  multiply(weight, const_bytes(g), m, mutable_bytes(y), [&](int64_t begin, int64_t end, const void* tiles, int64_t count, void* to) {
    kernels.multiply_transposed(w, begin, end, tiles, count, to, scratch(kernels.scratch_bytes));
  });
  return y;
}

// ------------------------------------------------------------------------------------------------- the gradient of values

// Rows [m, cols] repacked by blocks of columns, in parallel where there is much of it.
Tensor pack_columns(const BlockKernels& kernels, const uint8_t* x, int64_t m, int64_t cols, int64_t block) {
  const int64_t bytes = kernels.columns_bytes(m, cols, block), lines = blocks_across(cols, block);
  const Tensor columns = empty_bytes(bytes);
  uint8_t* const packed = mutable_bytes(columns);
  const int64_t count = bytes < kLeastPackBytes ? 1 : std::clamp<int64_t>(task_count(2 * bytes), 1, lines);
  for_each_task(count, 2 * bytes / count,
                [&](int64_t task) { kernels.pack_columns(x, m, cols, block, lines * task / count, lines * (task + 1) / count, packed); });
  return columns;
}

// A block is the least task. Adds what m rows give: sums of the rows before are in `sums` unless these are the first; unless these are the
// last, it stays there.
void sample(const BlockWeight& weight, const uint8_t* g, const uint8_t* x, int64_t m, bool first, bool last, uint8_t* sums) {
  const BlockKernels& kernels = weight.kernels;
  const BlockMatrix w = weight.matrix();
  const Tensor g_columns = pack_columns(kernels, g, m, w.rows, w.block_rows);
  const Tensor x_columns = pack_columns(kernels, x, m, w.cols, w.block_cols);
  const int64_t blocks = weight.index.blocks(), bytes = product_bytes(weight.elements(), m, weight.width);
  const int64_t count = std::clamp<int64_t>(task_count(bytes), 1, blocks);
  for_each_task(count, bytes / count, [&](int64_t task) {
    kernels.sample(w, blocks * task / count, blocks * (task + 1) / count, const_bytes(g_columns), const_bytes(x_columns), m,
                   first ? nullptr : sums, last ? nullptr : sums, mutable_bytes(weight.values));
  });
}

Tensor bsr_linear_backward_values(const Tensor& grad, const Tensor& x, const Tensor& crow_indices, const Tensor& col_indices,
                                  IntHeaderOnlyArrayRef block_shape, bool /* allow_tf32 */) {
  const BlockOperands operands = backward_values_operands(grad, x, crow_indices, col_indices, block_shape);
  const BlockSizes& sizes = operands.sizes;
  BlockIndex index = prove(operands.index);
  const Tensor values = empty(values_sizes(operands), operands.dtype);
  const int64_t m = rows_of(x);
  if (index.blocks() == 0) return values;
  if (m == 0) {
    std::memset(mutable_bytes(values), 0, static_cast<size_t>(nbytes(values)));
    return values;
  }
  const BlockWeight weight{kernels_for(operands.dtype), std::move(index), values, sizes, false, width_of(operands.dtype)};
  const BlockKernels& kernels = weight.kernels;
  const Tensor g = contiguous("grad", grad), rows = contiguous("x", x);
  if (m <= kernels.sampled_rows) {
    sample(weight, const_bytes(g), const_bytes(rows), m, true, true, nullptr);
    return values;
  }
  const Tensor sums = empty_bytes(weight.elements() * kernels.sum_bytes);
  for_each_block(m, kernels.sampled_rows, 1, [&](int64_t start, int64_t count) {
    sample(weight, const_bytes(g) + start * sizes.rows * weight.width, const_bytes(rows) + start * sizes.cols * weight.width, count,
           start == 0, start + count == m, mutable_bytes(sums));
  });
  return values;
}

// ------------------------------------------------------------------------------------------------------------- the index

std::tuple<Tensor, Tensor, Tensor> bsr_transpose(const Tensor& crow_indices, const Tensor& col_indices, int64_t cols_of_blocks) {
  const BlockParts parts = parts_to_transpose(crow_indices, col_indices, cols_of_blocks);
  const BlockIndex index = prove(parts);
  const int64_t blocks = index.blocks();
  const auto entries = [](int64_t count) { return empty(std::vector<int64_t>{count}, aoti_torch_dtype_int64()); };
  const Tensor ccol_indices = entries(cols_of_blocks + 1), row_indices = entries(blocks), order = entries(blocks);
  const BlockIndex transposed = transpose(index, cols_of_blocks);
  const auto copy = [](const std::vector<int64_t>& from, const Tensor& to) {
    std::copy(from.begin(), from.end(), static_cast<int64_t*>(to.mutable_data_ptr()));
  };
  copy(transposed.line_starts, ccol_indices);
  copy(transposed.positions, row_indices);
  copy(transposed.order, order);
  return {ccol_indices, row_indices, order};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_backward_input", TORCH_BOX(&bsr_linear_backward_input));
  m.impl("bsr_linear_backward_values", TORCH_BOX(&bsr_linear_backward_values));
  m.impl("bsr_transpose", TORCH_BOX(&bsr_transpose));
}

}  // namespace bitmask
