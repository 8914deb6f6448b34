// The CPU implementations of products with a block-sparse weight. No arithmetic here.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "block_products.h"

namespace bitmask {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;

// Fails unless all of a transposed index is there, or nothing; and then unless it is that of `index`.
void check_transposed(const BlockIndex& index, int64_t lines, const std::optional<Tensor>& ccol_indices,
                      const std::optional<Tensor>& row_indices, const std::optional<Tensor>& order) {
  const int given = int{ccol_indices.has_value()} + int{row_indices.has_value()} + int{order.has_value()};
  if (given % 3 != 0) fail("ccol_indices, row_indices, order: got ", given, " of them, expected all three or none");
  if (given == 0) return;
  check_starts_size("ccol_indices", ccol_indices->sizes(), lines);
  check_entries_size("row_indices", row_indices->sizes(), index.blocks());
  check_entries_size("order", order->sizes(), index.blocks());
  const Tensor starts = entries_of("ccol_indices", *ccol_indices), positions = entries_of("row_indices", *row_indices),
               places = entries_of("order", *order);  // memory that is really there, before as much is reserved
  const BlockIndex expected = transpose(index, lines);
  const char* const yardstick = "crow_indices and col_indices";
  check_entries("ccol_indices", data_of(starts), expected.line_starts, yardstick);
  check_entries("row_indices", data_of(positions), expected.positions, yardstick);
  check_entries("order", data_of(places), expected.order, yardstick);
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices, int64_t out_features,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& ccol_indices, const std::optional<Tensor>& row_indices,
                  const std::optional<Tensor>& order, bool /* allow_tf32: CPUs have none */) {
  check_block_values(values.sizes());
  const BlockWeight weight = forward_weight(x, values, values.size(1), values.size(2), crow_indices, col_indices, out_features, bias);
  check_transposed(weight.index, weight.sizes.cols_of_blocks(), ccol_indices, row_indices, order);

  const Tensor y = empty(with_last_size(x, out_features), dtype_of(values));
  const int64_t m = rows_of(x);
  if (m == 0 || out_features == 0) return y;
  const BlockKernels& kernels = weight.kernels;
  const BlockMatrix w = weight.matrix();
  const Tensor rows = contiguous("x", x), offset = bias ? contiguous("bias", *bias) : rows;
  const void* const bias_data = bias ? const_bytes(offset) : nullptr;
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
  const int32_t dtype = dtype_of(values);
  const BlockKernels& kernels = kernels_for("values", dtype);
  const int64_t out_features = last_size("grad", grad, kOfValues, dtype);
  check_feature_count("in_features", in_features);
  check_block_values(values.sizes());
  const BlockSizes sizes{out_features, in_features, values.size(1), values.size(2)};
  BlockIndex index = index_of(kByColumn, ccol_indices, sizes.cols_of_blocks(), row_indices, values.size(0), sizes.rows_of_blocks());
  check_entries_size("order", order.sizes(), index.blocks());
  add_order(index, data_of(entries_of("order", order)));

  const Tensor y = empty(with_last_size(grad, in_features), dtype);
  const int64_t m = rows_of(grad);
  if (m == 0 || in_features == 0) return y;
  const BlockWeight weight{kernels, std::move(index), contiguous("values", values), sizes, true, width_of(dtype)};
  const BlockMatrix w = weight.matrix();
  const Tensor g = contiguous("grad", grad);
  multiply(weight, const_bytes(g), m, mutable_bytes(y), [&](int64_t begin, int64_t end, const void* tiles, int64_t count, void* to) {
    kernels.multiply_transposed(w, begin, end, tiles, count, to, scratch(kernels.scratch_bytes));
  });
  return y;
}

// ------------------------------------------------------------------------------------------------- the gradient of values

// Fails unless x has the leading dimensions of grad.
void check_leading_sizes(const Tensor& grad, const Tensor& x) {
  std::vector<int64_t> leading(grad.sizes().begin(), grad.sizes().end()), got(x.sizes().begin(), x.sizes().end());
  leading.pop_back();
  got.pop_back();
  if (got != leading) fail("x: got size ", to_text(x.sizes()), ", expected the leading dimensions of grad, ", to_text(leading));
}

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
  const int32_t dtype = dtype_of(grad);
  const BlockKernels& kernels = kernels_for("grad", dtype);
  const int64_t out_features = last_size("grad", grad, "the dtype of grad", dtype);
  const int64_t in_features = last_size("x", x, "the dtype of grad", dtype);
  check_leading_sizes(grad, x);
  if (block_shape.size() != 2) fail("block_shape: got ", to_text(block_shape), ", expected block rows and block columns");
  check_block_shape("block_shape", block_shape, block_shape[0], block_shape[1]);
  const BlockSizes sizes{out_features, in_features, block_shape[0], block_shape[1]};
  check_vector("col_indices", col_indices.sizes(), 0);
  const int64_t blocks = col_indices.size(0), m = rows_of(x), width = width_of(dtype);
  BlockIndex index = index_of(kByRow, crow_indices, sizes.rows_of_blocks(), col_indices, blocks, sizes.cols_of_blocks());

  const std::vector<int64_t> shape{blocks, sizes.block_rows, sizes.block_cols};
  geometry(shape);
  const Tensor values = empty(shape, dtype);
  if (blocks == 0) return values;
  if (m == 0) {
    std::memset(mutable_bytes(values), 0, static_cast<size_t>(nbytes(values)));
    return values;
  }
  const BlockWeight weight{kernels, std::move(index), values, sizes, false, width};
  const Tensor g = contiguous("grad", grad), rows = contiguous("x", x);
  if (m <= kernels.sampled_rows) {
    sample(weight, const_bytes(g), const_bytes(rows), m, true, true, nullptr);
    return values;
  }
  const Tensor sums = empty_bytes(weight.elements() * kernels.sum_bytes);
  for_each_block(m, kernels.sampled_rows, 1, [&](int64_t start, int64_t count) {
    sample(weight, const_bytes(g) + start * out_features * width, const_bytes(rows) + start * in_features * width, count, start == 0,
           start + count == m, mutable_bytes(sums));
  });
  return values;
}

// ------------------------------------------------------------------------------------------------------------- the index

std::tuple<Tensor, Tensor, Tensor> bsr_transpose(const Tensor& crow_indices, const Tensor& col_indices, int64_t cols_of_blocks) {
  check_feature_count("cols_of_blocks", cols_of_blocks);
  check_vector("crow_indices", crow_indices.sizes(), 1);
  check_vector("col_indices", col_indices.sizes(), 0);
  const int64_t blocks = col_indices.size(0);
  const BlockIndex index = index_of(kByRow, crow_indices, crow_indices.size(0) - 1, col_indices, blocks, cols_of_blocks);
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
