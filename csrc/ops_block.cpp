// The CPU implementations of products with a block-sparse weight: check, copy and prove its index, repack what is multiplied, split lines
// of blocks over threads. No arithmetic here.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "block_index.h"
#include "block_operands.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "dtypes.h"
#include "layout.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace bitmask {
namespace {

using cpu::BlockKernels;
using torch::headeronly::IntHeaderOnlyArrayRef;

// ------------------------------------------------------------------------------------------------------------ operands

// A weight with its proven index, line by line, and what multiplies it.
struct BlockWeight {
  const BlockKernels& kernels;
  BlockIndex index;
  Tensor values;  // contiguous
  BlockSizes sizes;
  bool by_column;  // lines are block columns
  int64_t width;

  int64_t elements() const { return index.blocks() * sizes.block_rows * sizes.block_cols; }
  // What is multiplied has this many columns; a block takes so many of them.
  int64_t depth() const { return by_column ? sizes.rows : sizes.cols; }
  int64_t block_depth() const { return by_column ? sizes.block_rows : sizes.block_cols; }
  // The product has this many columns; a line is so many of them.
  int64_t across() const { return by_column ? sizes.cols : sizes.rows; }
  int64_t block_across() const { return by_column ? sizes.block_cols : sizes.block_rows; }

  BlockMatrix matrix() const {
    return {const_bytes(values),    sizes.rows,         sizes.cols,
            sizes.block_rows,       sizes.block_cols,   index.line_starts.data(),
            index.positions.data(), index.lines.data(), by_column ? index.order.data() : nullptr};
  }
};

const BlockKernels& kernels_for(int32_t dtype) {
  return cpu::kernels().block[by_linear_dtype(dtype, cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64)];
}

// A copy, with the order if there is one; throws unless the index contradicts nothing.
BlockIndex prove(const BlockParts& parts) {
  BlockIndex index =
      copy_block_index(parts.fields, data_of(parts.starts), parts.lines, data_of(parts.positions), parts.blocks(), parts.limit);
  if (parts.order) add_order(index, data_of(*parts.order));
  return index;
}

BlockWeight weight_of(const BlockOperands& operands, const Tensor& values) {
  const bool by_column = operands.index.order.has_value();
  return {kernels_for(operands.dtype), prove(operands.index), contiguous("values", values), operands.sizes, by_column,
          width_of(operands.dtype)};
}

// ------------------------------------------------------------------------------------------------------------- products

// Ranges of lines, and of rows of what is multiplied, that make tasks of about equal cost.
struct Split {
  std::vector<int64_t> borders;  // of ranges of lines
  int64_t rows;                  // of each range but the last
  int64_t row_ranges;
  int64_t bytes;  // that all tasks touch

  int64_t line_ranges() const { return static_cast<int64_t>(borders.size()) - 1; }
  int64_t count() const { return line_ranges() * row_ranges; }
  int64_t task_bytes() const { return bytes / count(); }
};

// All rows together: split by lines alone.
Split split_lines(const BlockWeight& weight, int64_t m) {
  const BlockSizes& sizes = weight.sizes;
  const bool empty = weight.index.blocks() == 0;  // and then any size and m may meet
  const int64_t block_bytes = empty ? 0 : product_bytes(sizes.block_rows * sizes.block_cols, m, weight.width);
  const int64_t line_bytes = weight.block_across() * m * weight.width, lines = weight.index.line_count();
  const auto bytes_before = [&](int64_t line) {
    return weight.index.line_starts[static_cast<size_t>(line)] * block_bytes + line * line_bytes;
  };
  const int64_t bytes = bytes_before(lines);
  return {split_by_cost(lines, task_count(bytes), bytes_before), m, 1, bytes};
}

// Rows are split as well, by whole tiles: into as many as kernels take, and where there are too few lines for the threads.
Split split_lines_and_rows(const BlockWeight& weight, int64_t m) {
  Split split = split_lines(weight, m);
  const int64_t tile = weight.kernels.tile_rows, tiles = (m + tile - 1) / tile;
  const int64_t missing = (task_count(split.bytes) + split.line_ranges() - 1) / split.line_ranges();
  const int64_t least = (m + weight.kernels.most_rows - 1) / weight.kernels.most_rows;
  const int64_t ranges = std::clamp(std::max(missing, least), int64_t{1}, tiles);
  split.rows = (tiles + ranges - 1) / ranges * tile;
  split.row_ranges = (m + split.rows - 1) / split.rows;
  return split;
}

// y = x W^T + bias for few rows of x.
void stream(const BlockWeight& weight, const uint8_t* x, int64_t m, const void* bias, uint8_t* y) {
  const BlockKernels& kernels = weight.kernels;
  const BlockMatrix w = weight.matrix();
  const Tensor rows = empty_bytes(kernels.rows_bytes(m, w.cols, w.block_cols));
  kernels.pack_rows(x, m, w.cols, w.block_cols, mutable_bytes(rows));
  const Split split = split_lines(weight, m);
  for_each_task(split.count(), split.task_bytes(), [&](int64_t task) {
    const size_t range = static_cast<size_t>(task);
    kernels.stream(w, split.borders[range], split.borders[range + 1], const_bytes(rows), m, bias, y, scratch(kernels.scratch_bytes));
  });
}

// Bytes of x packed at a time, where one call of a kernel does not take more: what stays in a last cache.
constexpr int64_t kMostPackedBytes = 4 << 20;

// Multiplies m > 0 rows [m, depth]: body(begin, end, tiles, m, y) does the lines [begin, end) of m repacked rows, which go to y.
template <typename Body>
void multiply(const BlockWeight& weight, const uint8_t* x, int64_t m, uint8_t* y, const Body& body) {
  const BlockKernels& kernels = weight.kernels;
  const int64_t tile_bytes = std::max<int64_t>(kernels.tiles_bytes(kernels.tile_rows, weight.depth()), 1);
  const int64_t most_rows = std::max(kernels.most_rows, kMostPackedBytes / tile_bytes * kernels.tile_rows);
  for_each_block(m, most_rows, kernels.tile_rows, [&](int64_t start, int64_t count) {
    const int64_t cols = weight.depth();
    const Tensor tiles = pack_tiles(kernels, count, cols, [&](int64_t first, int64_t rows, void* to) {
      kernels.pack_tiles(x + (start + first) * cols * weight.width, rows, cols, to);
    });
    const Split split = split_lines_and_rows(weight, count);
    for_each_task(split.count(), split.task_bytes(), [&](int64_t task) {
      const size_t range = static_cast<size_t>(task / split.row_ranges);
      const int64_t first = task % split.row_ranges * split.rows;
      body(split.borders[range], split.borders[range + 1], const_bytes(tiles) + kernels.tiles_bytes(first, cols),
           std::min(split.rows, count - first), y + (start + first) * weight.across() * weight.width);
    });
  });
}

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
  if (m <= kernels.streaming_rows) {
    stream(weight, const_bytes(rows), m, bias_data, mutable_bytes(y));
  } else {
    const BlockMatrix w = weight.matrix();
    multiply(weight, const_bytes(rows), m, mutable_bytes(y), [&](int64_t begin, int64_t end, const void* tiles, int64_t count, void* to) {
      kernels.multiply(w, begin, end, tiles, count, bias_data, to, scratch(kernels.scratch_bytes));
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
