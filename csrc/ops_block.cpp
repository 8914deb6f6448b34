// The CPU implementations of products with a block-sparse weight: check, copy and prove its index, repack what is multiplied, split lines
// of blocks over threads. No arithmetic here.
#include <algorithm>
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

// What a line by itself costs, in columns of blocks: its part of y is written whatever blocks it has.
constexpr int64_t kLineColumns = 16;

const BlockKernels& kernels_for(int32_t dtype) {
  return cpu::kernels().block[by_linear_dtype(dtype, cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64)];
}

Tensor contiguous_index(const char* name, const Tensor& tensor) {
  check_dtype(name, dtype_of(tensor), "torch.int64", aoti_torch_dtype_int64());
  return contiguous(name, tensor);
}

const int64_t* const_entries(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// The proven copy of an index of blocks: so many of them in so many lines, at positions below `limit`.
BlockIndex index_of(const BlockFields& fields, const Tensor& starts, int64_t lines, const Tensor& positions, int64_t blocks,
                    int64_t limit) {
  check_starts_size(fields.starts, starts.sizes(), lines);
  check_entries_size(fields.positions, positions.sizes(), blocks);
  const Tensor from = contiguous_index(fields.starts, starts), at = contiguous_index(fields.positions, positions);
  return copy_block_index(fields, const_entries(from), lines, const_entries(at), blocks, limit);
}

// Blocks of a weight [rows, cols] by their sizes alone.
struct BlockShape {
  int64_t rows, cols, block_rows, block_cols;

  int64_t row_lines() const { return blocks_across(rows, block_rows); }
  int64_t col_lines() const { return blocks_across(cols, block_cols); }
};

// The shape of the blocks of `values` and of the weight that they belong to.
BlockShape shape_of(const Tensor& values, int64_t rows, int64_t cols) {
  by_linear_dtype(dtype_of(values), 0, 0, 0, 0);  // refuses dtypes that have no such kernels
  check_block_values(values.sizes());
  return {rows, cols, values.size(1), values.size(2)};
}

// ------------------------------------------------------------------------------------------------------------ y = x W^T

// Whether there are all parts of a transposed index, or none.
bool has_transposed(const std::optional<Tensor>& ccol_indices, const std::optional<Tensor>& row_indices,
                    const std::optional<Tensor>& order) {
  const int given = int{ccol_indices.has_value()} + int{row_indices.has_value()} + int{order.has_value()};
  if (given % 3 != 0) fail("ccol_indices, row_indices, order: got ", given, " of them, expected all three or none");
  return given != 0;
}

// Fails unless the parts are those of the transposed index.
void check_transposed(const BlockIndex& index, int64_t lines, const Tensor& ccol_indices, const Tensor& row_indices, const Tensor& order) {
  check_starts_size("ccol_indices", ccol_indices.sizes(), lines);
  check_entries_size("row_indices", row_indices.sizes(), index.blocks());
  check_entries_size("order", order.sizes(), index.blocks());
  const BlockIndex expected = transpose(index, lines);
  const auto check = [](const char* name, const Tensor& got, const std::vector<int64_t>& entries) {
    const Tensor part = contiguous_index(name, got);
    check_entries(name, const_entries(part), entries, "crow_indices and col_indices");
  };
  check("ccol_indices", ccol_indices, expected.line_starts);
  check("row_indices", row_indices, expected.positions);
  check("order", order, expected.order);
}

// Borders of ranges of lines that cost about the same.
std::vector<int64_t> split_lines(const BlockMatrix& w, int64_t lines, int64_t block_length, int64_t pieces) {
  return split_by_cost(lines, pieces, [&](int64_t line) { return w.line_starts[line] * block_length + line * kLineColumns; });
}

int64_t border_count(const std::vector<int64_t>& borders) { return static_cast<int64_t>(borders.size()) - 1; }

// For few rows of x: each task takes some lines.
void stream(const BlockKernels& kernels, const BlockMatrix& w, const BlockIndex& index, const uint8_t* x, int64_t m, const void* bias,
            uint8_t* y, int64_t width) {
  const Tensor rows = empty_bytes(kernels.rows_bytes(m, w.cols, w.block_cols));
  kernels.pack_rows(x, m, w.cols, w.block_cols, mutable_bytes(rows));
  const int64_t bytes = product_bytes(index.blocks() * w.block_rows * w.block_cols, m, width);
  const std::vector<int64_t> borders = split_lines(w, index.line_count(), w.block_cols, task_count(bytes));
  const int64_t count = border_count(borders);
  for_each_task(count, bytes / count, [&](int64_t task) {
    const size_t piece = static_cast<size_t>(task);
    kernels.stream(w, borders[piece], borders[piece + 1], const_bytes(rows), m, bias, y, scratch(kernels.scratch_bytes));
  });
}

// Rows [m, cols] repacked into tiles, in parallel where there is much of it.
Tensor pack_tiles(const BlockKernels& kernels, const uint8_t* x, int64_t m, int64_t cols, int64_t width) {
  const int64_t bytes = kernels.tiles_bytes(m, cols);
  const Tensor tiles = empty_bytes(bytes);
  const int64_t rows = bytes < kLeastPackBytes ? m : kernels.tile_rows, count = (m + rows - 1) / rows;
  const auto pack = [&](int64_t task) {
    const int64_t first = task * rows;
    kernels.pack_tiles(x + first * cols * width, std::min(rows, m - first), cols, mutable_bytes(tiles) + kernels.tiles_bytes(first, cols));
  };
  for_each_task(count, 2 * bytes / count, pack);
  return tiles;
}

// Runs body(lines begin, lines end, first row, rows) for tasks of about equal cost: by lines, and, where those are too few for the threads,
// by tiles of the m rows as well.
template <typename Body>
void for_each_part(const BlockKernels& kernels, const BlockMatrix& w, const BlockIndex& index, int64_t block_length, int64_t m,
                   int64_t width, const Body& body) {
  const int64_t bytes = product_bytes(index.blocks() * w.block_rows * w.block_cols, m, width);
  const int64_t tasks = std::max<int64_t>(task_count(bytes), 1);
  const std::vector<int64_t> borders = split_lines(w, index.line_count(), block_length, tasks);
  const int64_t line_parts = border_count(borders), tiles = (m + kernels.tile_rows - 1) / kernels.tile_rows;
  const int64_t wanted = std::min((tasks + line_parts - 1) / line_parts, tiles);
  const int64_t rows = (tiles + wanted - 1) / wanted * kernels.tile_rows, row_parts = (m + rows - 1) / rows;
  for_each_task(line_parts * row_parts, bytes / (line_parts * row_parts), [&](int64_t task) {
    const size_t piece = static_cast<size_t>(task / row_parts);
    const int64_t first = task % row_parts * rows;
    body(borders[piece], borders[piece + 1], first, std::min(rows, m - first));
  });
}

void multiply(const BlockKernels& kernels, const BlockMatrix& w, const BlockIndex& index, const uint8_t* x, int64_t m, const void* bias,
              uint8_t* y, int64_t width) {
  for_each_block(m, kernels.most_rows, kernels.tile_rows, [&](int64_t start, int64_t count) {
    const Tensor tiles = pack_tiles(kernels, x + start * w.cols * width, count, w.cols, width);
    for_each_part(kernels, w, index, w.block_cols, count, width, [&](int64_t begin, int64_t end, int64_t first, int64_t rows) {
      kernels.multiply(w, begin, end, const_bytes(tiles) + kernels.tiles_bytes(first, w.cols), rows, bias,
                       y + (start + first) * w.rows * width, scratch(kernels.scratch_bytes));
    });
  });
}

Tensor bsr_linear(const Tensor& x, const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices, int64_t out_features,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& ccol_indices, const std::optional<Tensor>& row_indices,
                  const std::optional<Tensor>& order) {
  const int32_t dtype = dtype_of(values);
  check_dtype("x", dtype_of(x), "the dtype of values", dtype);
  if (x.dim() == 0) fail("x: got size [], expected [..., in_features]");
  if (out_features < 0) fail("out_features: got ", out_features, ", expected no negative size");
  const BlockShape shape = shape_of(values, out_features, x.size(x.dim() - 1));
  if (bias) check_dtype("bias", dtype_of(*bias), "the dtype of values", dtype);
  if (bias) check_bias_size(bias->sizes(), out_features);
  const std::vector<int64_t> sizes = with_last_size(x, out_features);
  const BlockIndex index = index_of(kByRow, crow_indices, shape.row_lines(), col_indices, values.size(0), shape.col_lines());
  if (has_transposed(ccol_indices, row_indices, order)) {
    check_transposed(index, shape.col_lines(), *ccol_indices, *row_indices, *order);
  }

  const Tensor y = empty(sizes, dtype);
  const int64_t m = geometry(x.sizes()).rows, width = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  if (m == 0 || out_features == 0) return y;
  const Tensor rows = contiguous("x", x), blocks = contiguous("values", values), offset = bias ? contiguous("bias", *bias) : rows;
  const BlockMatrix w = block_matrix(index, const_bytes(blocks), {shape.rows, shape.cols}, shape.block_rows, shape.block_cols);
  const BlockKernels& kernels = kernels_for(dtype);
  const auto run = m <= kernels.streaming_rows ? stream : multiply;
  run(kernels, w, index, const_bytes(rows), m, bias ? const_bytes(offset) : nullptr, mutable_bytes(y), width);
  return y;
}

// -------------------------------------------------------------------------------------------------------------- y = g W

Tensor bsr_linear_backward_input(const Tensor& grad, const Tensor& values, const Tensor& ccol_indices, const Tensor& row_indices,
                                 const Tensor& order, int64_t in_features) {
  const int32_t dtype = dtype_of(values);
  check_dtype("grad", dtype_of(grad), "the dtype of values", dtype);
  if (grad.dim() == 0) fail("grad: got size [], expected [..., out_features]");
  if (in_features < 0) fail("in_features: got ", in_features, ", expected no negative size");
  const BlockShape shape = shape_of(values, grad.size(grad.dim() - 1), in_features);
  const std::vector<int64_t> sizes = with_last_size(grad, in_features);
  BlockIndex index = index_of(kByColumn, ccol_indices, shape.col_lines(), row_indices, values.size(0), shape.row_lines());
  check_entries_size("order", order.sizes(), index.blocks());
  const Tensor places = contiguous_index("order", order);
  add_order(index, const_entries(places));

  const Tensor y = empty(sizes, dtype);
  const int64_t m = geometry(grad.sizes()).rows, width = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  if (m == 0 || in_features == 0) return y;
  const Tensor g = contiguous("grad", grad), blocks = contiguous("values", values);
  const BlockMatrix w = block_matrix(index, const_bytes(blocks), {shape.rows, shape.cols}, shape.block_rows, shape.block_cols);
  const BlockKernels& kernels = kernels_for(dtype);
  for_each_block(m, kernels.most_rows, kernels.tile_rows, [&](int64_t start, int64_t count) {
    const Tensor tiles = pack_tiles(kernels, const_bytes(g) + start * w.rows * width, count, w.rows, width);
    for_each_part(kernels, w, index, w.block_rows, count, width, [&](int64_t begin, int64_t end, int64_t first, int64_t rows) {
      kernels.multiply_transposed(w, begin, end, const_bytes(tiles) + kernels.tiles_bytes(first, w.rows), rows,
                                  mutable_bytes(y) + (start + first) * w.cols * width, scratch(kernels.scratch_bytes));
    });
  });
  return y;
}

// ------------------------------------------------------------------------------------------- the kept blocks of g^T x

// Rows [m, cols] repacked by blocks of columns, in parallel where there is much of it.
Tensor pack_columns(const BlockKernels& kernels, const uint8_t* x, int64_t m, int64_t cols, int64_t block) {
  const int64_t bytes = kernels.columns_bytes(m, cols, block);
  const Tensor columns = empty_bytes(bytes);
  const int64_t lines = blocks_across(cols, block);
  const int64_t tasks = bytes < kLeastPackBytes ? 1 : std::min(lines, task_count(bytes));
  for_each_task(tasks, 2 * bytes / std::max<int64_t>(tasks, 1), [&](int64_t task) {
    kernels.pack_columns(x, m, cols, block, lines * task / tasks, lines * (task + 1) / tasks, mutable_bytes(columns));
  });
  return columns;
}

Tensor bsr_linear_backward_values(const Tensor& grad, const Tensor& x, const Tensor& crow_indices, const Tensor& col_indices,
                                  IntHeaderOnlyArrayRef block_shape) {
  const int32_t dtype = dtype_of(grad);
  by_linear_dtype(dtype, 0, 0, 0, 0);
  check_dtype("x", dtype_of(x), "the dtype of grad", dtype);
  if (grad.dim() == 0) fail("grad: got size [], expected [..., out_features]");
  std::vector<int64_t> leading(grad.sizes().begin(), grad.sizes().end() - 1), x_leading(x.sizes().begin(), x.sizes().end());
  if (!x_leading.empty()) x_leading.pop_back();
  if (x.dim() == 0 || leading != x_leading) {
    fail("x: got size ", to_text(x.sizes()), ", expected ", to_text(leading), " and in_features, as grad");
  }
  check_vector("col_indices", col_indices.sizes(), 0);
  std::vector<int64_t> sizes{col_indices.size(0)};
  sizes.insert(sizes.end(), block_shape.begin(), block_shape.end());
  check_block_values(sizes);
  const BlockShape shape{grad.size(grad.dim() - 1), x.size(x.dim() - 1), sizes[1], sizes[2]};
  const BlockIndex index = index_of(kByRow, crow_indices, shape.row_lines(), col_indices, sizes[0], shape.col_lines());

  const Tensor values = empty(sizes, dtype);
  if (index.blocks() == 0) return values;
  const Tensor g = contiguous("grad", grad), rows = contiguous("x", x);
  const int64_t m = geometry(x.sizes()).rows, width = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  const BlockMatrix w = block_matrix(index, nullptr, {shape.rows, shape.cols}, shape.block_rows, shape.block_cols);
  const BlockKernels& kernels = kernels_for(dtype);
  const int64_t elements = values.numel();
  const bool one_chunk = m <= kernels.sampled_rows;
  const Tensor sums = empty_bytes(one_chunk ? 0 : elements * kernels.sum_bytes);
  const auto sample = [&](int64_t first, int64_t count) {
    const Tensor g_columns = pack_columns(kernels, const_bytes(g) + first * w.rows * width, count, w.rows, w.block_rows);
    const Tensor x_columns = pack_columns(kernels, const_bytes(rows) + first * w.cols * width, count, w.cols, w.block_cols);
    const void* const earlier = first == 0 ? nullptr : const_bytes(sums);
    void* const unrounded = first + count == m ? nullptr : mutable_bytes(sums);
    const int64_t bytes = product_bytes(elements, count, width);
    const int64_t tasks = std::clamp<int64_t>(task_count(bytes), 1, index.blocks());
    for_each_task(tasks, bytes / tasks, [&](int64_t task) {
      kernels.sample(w, index.blocks() * task / tasks, index.blocks() * (task + 1) / tasks, const_bytes(g_columns), const_bytes(x_columns),
                     count, earlier, unrounded, mutable_bytes(values), scratch(kernels.scratch_bytes));
    });
  };
  for_each_block(m, kernels.sampled_rows, 1, sample);
  if (m == 0) sample(0, 0);
  return values;
}

// ------------------------------------------------------------------------------------------------------------- the index

std::tuple<Tensor, Tensor, Tensor> bsr_transpose(const Tensor& crow_indices, const Tensor& col_indices, int64_t block_cols) {
  if (block_cols < 0 || block_cols == INT64_MAX) fail("block_cols: got ", block_cols, ", expected 0 to 2^63 - 2");
  check_vector("crow_indices", crow_indices.sizes(), 1);
  check_vector("col_indices", col_indices.sizes(), 0);
  const BlockIndex index = index_of(kByRow, crow_indices, crow_indices.size(0) - 1, col_indices, col_indices.size(0), block_cols);
  const int32_t int64 = aoti_torch_dtype_int64();
  const Tensor starts = empty(std::vector<int64_t>{block_cols + 1}, int64);
  const BlockIndex transposed = transpose(index, block_cols);
  const auto copy = [&](const std::vector<int64_t>& entries) {
    const Tensor tensor = empty(std::vector<int64_t>{static_cast<int64_t>(entries.size())}, int64);
    std::copy(entries.begin(), entries.end(), static_cast<int64_t*>(tensor.mutable_data_ptr()));
    return tensor;
  };
  return {copy(transposed.line_starts), copy(transposed.positions), copy(transposed.order)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("bsr_linear", TORCH_BOX(&bsr_linear));
  m.impl("bsr_linear_backward_input", TORCH_BOX(&bsr_linear_backward_input));
  m.impl("bsr_linear_backward_values", TORCH_BOX(&bsr_linear_backward_values));
  m.impl("bsr_transpose", TORCH_BOX(&bsr_transpose));
}

}  // namespace bitmask
