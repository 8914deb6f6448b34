// What the CPU implementations of products with a block-sparse weight share: the proof of its index, and the way from rows to tasks for
// the kernels. No arithmetic here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "block_index.h"
#include "block_operands.h"
#include "cpu/kernels.h"
#include "dtypes.h"
#include "layout.h"
#include "parallel.h"
#include "products.h"
#include "tensors.h"

namespace bitmask {

using cpu::BlockKernels;

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

inline const BlockKernels& kernels_for(int32_t dtype) {
  return cpu::kernels().block[by_linear_dtype(dtype, cpu::kFloat32, cpu::kBfloat16, cpu::kFloat16, cpu::kFloat64)];
}

// A copy, with the order if there is one; throws unless the index contradicts nothing.
inline BlockIndex prove(const BlockParts& parts) {
  BlockIndex index =
      copy_block_index(parts.fields, data_of(parts.starts), parts.lines, data_of(parts.positions), parts.blocks(), parts.limit);
  if (parts.order) add_order(index, data_of(*parts.order));
  return index;
}

inline BlockWeight weight_of(const BlockOperands& operands, const Tensor& values) {
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
inline Split split_lines(const BlockWeight& weight, int64_t m) {
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
inline Split split_lines_and_rows(const BlockWeight& weight, int64_t m) {
  Split split = split_lines(weight, m);
  const int64_t tile = weight.kernels.tile_rows, tiles = (m + tile - 1) / tile;
  const int64_t missing = (task_count(split.bytes) + split.line_ranges() - 1) / split.line_ranges();
  const int64_t least = (m + weight.kernels.most_rows - 1) / weight.kernels.most_rows;
  const int64_t ranges = std::clamp(std::max(missing, least), int64_t{1}, tiles);
  split.rows = (tiles + ranges - 1) / ranges * tile;
  split.row_ranges = (m + split.rows - 1) / split.rows;
  return split;
}

// Multiplies few rows [m, cols], 0 < m <= streaming_rows: body(begin, end, rows) does the lines [begin, end) of them, repacked.
template <typename Body>
void stream(const BlockWeight& weight, const uint8_t* x, int64_t m, const Body& body) {
  const BlockKernels& kernels = weight.kernels;
  const BlockSizes& sizes = weight.sizes;
  const Tensor rows = empty_bytes(kernels.rows_bytes(m, sizes.cols, sizes.block_cols));
  kernels.pack_rows(x, m, sizes.cols, sizes.block_cols, mutable_bytes(rows));
  const Split split = split_lines(weight, m);
  for_each_task(split.count(), split.task_bytes(), [&](int64_t task) {
    const size_t range = static_cast<size_t>(task);
    body(split.borders[range], split.borders[range + 1], const_bytes(rows));
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

}  // namespace bitmask
