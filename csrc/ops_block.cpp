// The CPU implementations of products with a block-sparse weight: check, copy and prove its index, repack what is multiplied, split lines
// of blocks over threads. No arithmetic here.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "block_index.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "dtypes.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace bitmask {
namespace {

using cpu::BlockKernels;
using torch::headeronly::IntHeaderOnlyArrayRef;

// ------------------------------------------------------------------------------------------------------------ operands

// Sizes of a weight [rows, cols] and of its blocks.
struct BlockSizes {
  int64_t rows, cols, block_rows, block_cols;

  int64_t rows_of_blocks() const { return blocks_across(rows, block_rows); }
  int64_t cols_of_blocks() const { return blocks_across(cols, block_cols); }
};

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

constexpr const char* kOfValues = "the dtype of values";

// `name` is what has the dtype.
const BlockKernels& kernels_for(const char* name, int32_t dtype) {
  return cpu::kernels().block[by_linear_dtype(dtype, cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64, name)];
}

int64_t width_of(int32_t dtype) { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)); }

// The entries of a part of an index, to be copied.
Tensor entries_of(const char* name, const Tensor& part) {
  check_dtype(name, dtype_of(part), "torch.int64", aoti_torch_dtype_int64());
  return contiguous(name, part);
}
const int64_t* data_of(const Tensor& entries) { return static_cast<const int64_t*>(entries.const_data_ptr()); }

// The proven copy of an index of so many blocks in so many lines, at positions below `limit`.
BlockIndex index_of(const BlockFields& fields, const Tensor& starts, int64_t lines, const Tensor& positions, int64_t blocks,
                    int64_t limit) {
  check_starts_size(fields.starts, starts.sizes(), lines);
  check_entries_size(fields.positions, positions.sizes(), blocks);
  const Tensor from = entries_of(fields.starts, starts), at = entries_of(fields.positions, positions);
  return copy_block_index(fields, data_of(from), lines, data_of(at), blocks, limit);
}

// The last size of what is multiplied; throws unless it has the dtype that is `expected`.
int64_t last_size(const char* name, const Tensor& tensor, const char* expected, int32_t dtype) {
  check_dtype(name, dtype_of(tensor), expected, dtype);
  if (tensor.dim() == 0) fail(name, ": got size [], expected at least one dimension");
  return tensor.size(tensor.dim() - 1);
}

int64_t rows_of(const Tensor& x) { return geometry(x.sizes()).rows; }

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
  const int32_t dtype = dtype_of(values);
  const BlockKernels& kernels = kernels_for("values", dtype);
  const int64_t in_features = last_size("x", x, kOfValues, dtype);
  check_feature_count("out_features", out_features);
  check_block_values(values.sizes());
  const BlockSizes sizes{out_features, in_features, values.size(1), values.size(2)};
  if (bias) check_dtype("bias", dtype_of(*bias), kOfValues, dtype);
  if (bias) check_bias_size(bias->sizes(), out_features);
  BlockIndex index = index_of(kByRow, crow_indices, sizes.rows_of_blocks(), col_indices, values.size(0), sizes.cols_of_blocks());
  check_transposed(index, sizes.cols_of_blocks(), ccol_indices, row_indices, order);

  const Tensor y = empty(with_last_size(x, out_features), dtype);
  const int64_t m = rows_of(x);
  if (m == 0 || out_features == 0) return y;
  const BlockWeight weight{kernels, std::move(index), contiguous("values", values), sizes, false, width_of(dtype)};
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
