// The CPU implementations of conversions between the bitmask layout and torch's sparse layouts, none of them by way of a dense copy: prove
// what is given, split it over threads, call the kernels. No arithmetic here.
//
// CSC and BSC are the CSR and BSR of the transposed matrix. Batches of matrices lie one after another.
//
// The floor is writing fresh memory, eight bytes for each index. Of a 4096 x 4096 fp32 matrix, half of it stored, two Zen 5 cores make CSR
// (100 MB) and BSR (67 MB in blocks of 16 x 16) in 7 ms each, as long as decompressing it takes; COO (168 MB) in 29 ms, CSC in 16 ms.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "block_index.h"
#include "checks.h"
#include "compress.h"
#include "cpu/kernels.h"
#include "layout.h"
#include "operands.h"
#include "parallel.h"
#include "products.h"
#include "proof.h"
#include "tensors.h"

namespace bitmask {
namespace {

using cpu::ConvertValueKernels;
using torch::headeronly::IntHeaderOnlyArrayRef;

constexpr const char* kChanged = "bitmasks: changed while they were read";
constexpr int64_t kIndexBytes = 8;

std::vector<int64_t> vector_of(IntHeaderOnlyArrayRef sizes) { return {sizes.begin(), sizes.end()}; }

const ConvertValueKernels& value_kernels(int64_t width) {
  return cpu::kernels().convert.values[__builtin_ctzll(static_cast<uint64_t>(width))];
}

Tensor empty_indices(std::vector<int64_t> sizes) { return empty(sizes, aoti_torch_dtype_int64()); }
int64_t* entries(const Tensor& indices) { return static_cast<int64_t*>(indices.mutable_data_ptr()); }
const int64_t* const_entries(const Tensor& indices) { return static_cast<const int64_t*>(indices.const_data_ptr()); }

constexpr int64_t kCopiedBytes = 1 << 20;  // by one task

// A copy that nobody else writes to.
Tensor copy_of(const char* name, const Tensor& tensor) {
  const Tensor source = contiguous(name, tensor), copy = empty(source.sizes(), dtype_of(source));
  const int64_t bytes = nbytes(source), count = blocks_across(bytes, kCopiedBytes);
  for_each_task(count, 2 * kCopiedBytes, [&](int64_t task) {
    const int64_t first = task * kCopiedBytes;
    std::memcpy(mutable_bytes(copy) + first, const_bytes(source) + first, static_cast<size_t>(std::min(kCopiedBytes, bytes - first)));
  });
  return copy;
}

// A batch of matrices, as the last two sizes of a shape say.
struct Matrices {
  int64_t count, rows, cols;

  int64_t all_rows() const { return count * rows; }
};

// Fails unless the shape has at least two sizes.
Matrices matrices(const std::vector<int64_t>& shape) {
  const Geometry g = geometry(shape);
  if (shape.size() < 2) fail("shape: got ", to_text(shape), ", expected at least two dimensions");
  const int64_t rows = shape[shape.size() - 2];
  int64_t count = 1;
  for (size_t i = 0; i + 2 < shape.size(); ++i) count *= shape[i];
  return {count, rows, g.cols};
}

// The sizes of a batch and, behind them, `last`.
std::vector<int64_t> batch_sizes(const std::vector<int64_t>& shape, std::initializer_list<int64_t> last) {
  std::vector<int64_t> sizes(shape.begin(), shape.end() - 2);
  sizes.insert(sizes.end(), last);
  return sizes;
}

// ------------------------------------------------------------------------------------------------- from the bitmask layout

// Rows of a bitmask in tasks, and where the stored elements of each task begin: [tasks + 1].
struct MarkedRows {
  const uint8_t* masks;
  Geometry g;
  const Tasks& tasks;
  const std::vector<int64_t>& starts;
};

// Lists the column of every stored element in `columns`, and where each row begins in row_starts [rows + 1]. Then calls
// body(task, first, end) for rows or a part of a row, whose elements are [first, end).
template <typename Body>
void list_columns(const MarkedRows& marked, int64_t* columns, int64_t* row_starts, const Body& body) {
  std::atomic<bool> changed{false};
  for_each_task(marked.tasks.count(), marked.tasks.bytes(kIndexBytes), [&](int64_t index) {
    const Slice s = slice_of(marked.tasks, index, marked.g);
    const int64_t start = marked.starts[static_cast<size_t>(index)], end = marked.starts[static_cast<size_t>(index) + 1];
    int64_t* const own_starts = marked.tasks.whole_rows() || s.task.col == 0 ? row_starts + s.task.row : nullptr;
    const int64_t found = cpu::kernels().convert.list_columns(marked.masks + s.mask_byte, s.task.rows, s.task.cols, s.task.col, start,
                                                              columns + start, end - start, own_starts);
    if (found != end - start) {
      changed = true;
    } else {
      body(s.task, start, end);
    }
  });
  if (changed) fail(kChanged);
  row_starts[marked.g.rows] = marked.starts.back();
}

// Where the elements of each row begin, and the end, and the column of each.
std::tuple<Tensor, Tensor> row_starts_and_columns(const Proof& proof) {
  check_feature_count("shape", proof.g.rows);
  const Tensor row_starts = empty_indices({proof.g.rows + 1}), columns = empty_indices({proof.nnz()});
  list_columns({proof.masks(), proof.g, proof.tasks, proof.starts}, entries(columns), entries(row_starts),
               [](const Tasks::Task&, int64_t, int64_t) {});
  return {row_starts, columns};
}

std::tuple<Tensor, Tensor, Tensor> to_csr(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                                          IntHeaderOnlyArrayRef shape) {
  const Proof proof = prove(values, bitmasks, row_offsets, vector_of(shape));
  const auto [crow_indices, col_indices] = row_starts_and_columns(proof);
  return {crow_indices, col_indices, copy_of("values", proof.parts.values)};
}

std::tuple<Tensor, Tensor> to_coo(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets, IntHeaderOnlyArrayRef shape) {
  const Proof proof = prove(values, bitmasks, row_offsets, vector_of(shape));
  const int64_t nnz = proof.nnz(), dims = static_cast<int64_t>(shape.size());
  const Tensor indices = empty_indices({dims, nnz}), copy = copy_of("values", proof.parts.values);
  if (dims == 0) return {indices, copy};
  int64_t* const data = entries(indices);
  std::vector<int64_t> row_starts(static_cast<size_t>(proof.g.rows) + 1);
  const MarkedRows marked{proof.masks(), proof.g, proof.tasks, proof.starts};
  list_columns(marked, data + (dims - 1) * nnz, row_starts.data(), [&](const Tasks::Task& task, int64_t first, int64_t end) {
    for (int64_t row = task.row; row < task.row + task.rows; ++row) {
      const bool last = row + 1 == task.row + task.rows;
      const int64_t begin = row == task.row ? first : row_starts[static_cast<size_t>(row)];
      const int64_t next = last ? end : row_starts[static_cast<size_t>(row) + 1];
      int64_t rest = row;
      for (int64_t dim = dims - 2; dim >= 0; rest /= shape[static_cast<size_t>(dim)], --dim) {
        std::fill(data + dim * nnz + begin, data + dim * nnz + next, rest % shape[static_cast<size_t>(dim)]);
      }
    }
  });
  return {indices, copy};
}

// Sizes of blocks, and of a bitmask matrix of blocks.
struct Blocks {
  int64_t rows, cols;
  Geometry g;

  int64_t elements() const { return rows * cols; }
};

// Fails unless blocks of such sides divide matrices; `name` is what tells the sides.
template <typename Sizes>
Blocks blocks_of(const char* name, const Sizes& sizes, int64_t rows, int64_t cols, const Matrices& m) {
  check_block_shape(name, sizes, rows, cols);
  if (m.rows % rows != 0 || m.cols % cols != 0) {
    fail(name, ": got blocks of [", rows, ", ", cols, "], expected sizes that divide those of a matrix, [", m.rows, ", ", m.cols, "]");
  }
  return {rows, cols, {m.count * (m.rows / rows), m.cols / cols}};
}

std::tuple<Tensor, Tensor, Tensor> to_bsr(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                                          IntHeaderOnlyArrayRef shape, IntHeaderOnlyArrayRef block_shape) {
  if (block_shape.size() != 2) fail("block_shape: got ", to_text(block_shape), ", expected block rows and block columns");
  const std::vector<int64_t> sizes = vector_of(shape);
  const Matrices m = matrices(sizes);
  const Blocks blocks = blocks_of("block_shape", block_shape, block_shape[0], block_shape[1], m);
  // Read twice, so a copy is proven.
  const Tensor masks = copy_of("bitmasks", bitmasks), offsets = copy_of("row_offsets", row_offsets);
  const Proof proof = prove(values, masks, offsets, sizes);
  const Element& element = proof.parts.element;
  const int64_t row_bytes = bitmask_bytes(m.cols), mark_bytes = bitmask_bytes(blocks.g.cols);

  const Tensor marks = empty_bytes(blocks.g.rows * mark_bytes);
  for_each_task(blocks.g.rows, blocks.rows * row_bytes, [&](int64_t line) {
    cpu::kernels().convert.mark_blocks(proof.masks() + line * blocks.rows * row_bytes, blocks.rows, m.cols, blocks.cols,
                                       mutable_bytes(marks) + line * mark_bytes);
  });
  const Tasks tasks(blocks.g);
  std::vector<int64_t> starts(static_cast<size_t>(tasks.count()) + 1);
  for_each_task(tasks.count(), tasks.bytes(1), [&](int64_t index) {
    const Slice s = slice_of(tasks, index, blocks.g);
    const int64_t bytes = tasks.whole_rows() ? s.task.rows * mark_bytes : bitmask_bytes(s.task.cols);
    starts[static_cast<size_t>(index)] = cpu::kernels().count_bits(const_bytes(marks) + s.mask_byte, bytes);
  });
  const int64_t count = exclusive_prefix_sums(starts.data(), tasks.count(), 0);
  starts.back() = count;

  const Tensor crow_indices = empty_indices({blocks.g.rows + 1}), col_indices = empty_indices({count});
  list_columns({const_bytes(marks), blocks.g, tasks, starts}, entries(col_indices), entries(crow_indices),
               [](const Tasks::Task&, int64_t, int64_t) {});

  const std::vector<int64_t> block_sizes{count, blocks.rows, blocks.cols};
  geometry(block_sizes);
  const Tensor block_values = empty(block_sizes, element.dtype);
  const int64_t* const crow = const_entries(crow_indices);
  const int64_t* const first_values = const_entries(offsets);
  for_each_task(blocks.g.rows, blocks.rows * m.cols * element.width, [&](int64_t line) {
    const int64_t row = line * blocks.rows, start = first_values[row];
    const int64_t end = row + blocks.rows < proof.g.rows ? first_values[row + blocks.rows] : proof.nnz();
    const cpu::BlockLine blocks_here{const_entries(col_indices) + crow[line], crow[line + 1] - crow[line], blocks.rows, blocks.cols,
                                     m.cols};
    value_kernels(element.width)
        .expand_blocks(const_bytes(proof.parts.values) + start * element.width, end - start, proof.masks() + row * row_bytes, blocks_here,
                       mutable_bytes(block_values) + crow[line] * blocks.elements() * element.width);
  });
  return {crow_indices, col_indices, block_values};
}

// ------------------------------------------------------------------------------------------------------------ transposed

// Rows, or columns, of a tile of a matrix to transpose: whole groups, enough of them that counting the bits before a tile costs little.
constexpr int64_t kLeastTileSide = 1024;
constexpr int64_t kTilesAcross = 8;

// Tiles that a batch of matrices is cut into.
struct Tiling {
  explicit Tiling(const Matrices& matrices)
      : m(matrices),
        tile_rows(side(m.rows)),
        tile_cols(side(m.cols)),
        down(blocks_across(m.rows, tile_rows)),
        across(blocks_across(m.cols, tile_cols)) {}

  static int64_t side(int64_t size) { return std::max(blocks_across(blocks_across(size, kTilesAcross), kGroup) * kGroup, kLeastTileSide); }

  struct Tile {
    int64_t matrix, row, col, rows, cols;
  };

  int64_t count() const { return m.count * down * across; }
  Tile operator[](int64_t index) const {
    const int64_t row = index / across % down * tile_rows, col = index % across * tile_cols;
    return {index / across / down, row, col, std::min(tile_rows, m.rows - row), std::min(tile_cols, m.cols - col)};
  }
  int64_t bytes(int64_t width) const { return std::min(tile_rows, m.rows) * std::min(tile_cols, m.cols) * width; }

  Matrices m;
  int64_t tile_rows, tile_cols, down, across;
};

// Where the values of the lines [first, first + count) begin from bit `bit` on, given where each line begins.
std::vector<int64_t> starts_in_lines(const uint8_t* masks, int64_t line_bytes, const int64_t* offsets, int64_t first, int64_t count,
                                     int64_t bit) {
  std::vector<int64_t> starts(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t line = first + i;
    starts[static_cast<size_t>(i)] = offsets[line] + cpu::kernels().count_bits(masks + line * line_bytes, bit / 8);
  }
  return starts;
}

// A shape with its last two sizes exchanged.
std::vector<int64_t> transposed_shape(IntHeaderOnlyArrayRef shape) {
  std::vector<int64_t> sizes = vector_of(shape);
  std::swap(sizes[sizes.size() - 2], sizes[sizes.size() - 1]);
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> transpose_parts(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                                                   IntHeaderOnlyArrayRef shape) {
  const std::vector<int64_t> sizes = vector_of(shape);
  const Matrices m = matrices(sizes);
  // Read twice, so a copy is proven.
  const Tensor own_masks = copy_of("bitmasks", bitmasks), own_offsets = copy_of("row_offsets", row_offsets);
  const Proof proof = prove(values, own_masks, own_offsets, sizes);
  const Element& element = proof.parts.element;
  const int64_t row_bytes = bitmask_bytes(m.cols), col_bytes = bitmask_bytes(m.rows), all_cols = m.count * m.cols;
  const Tensor transposed_masks = empty(bitmask_sizes(transposed_shape(shape)), aoti_torch_dtype_uint8());
  const Tensor transposed_offsets = empty_indices({all_cols});
  const Tensor transposed_values = empty(std::vector<int64_t>{proof.nnz()}, element.dtype);
  uint8_t* const columns = mutable_bytes(transposed_masks);
  int64_t* const offsets = entries(transposed_offsets);

  const Tiling tiles(m);
  for_each_task(tiles.count(), tiles.bytes(1), [&](int64_t index) {
    const Tiling::Tile t = tiles[index];
    cpu::kernels().convert.transpose_bits(proof.masks() + (t.matrix * m.rows + t.row) * row_bytes + t.col / 8, t.rows, t.cols, row_bytes,
                                          columns + (t.matrix * m.cols + t.col) * col_bytes + t.row / 8, col_bytes);
  });
  for_each_task(all_cols, col_bytes + kIndexBytes,
                [&](int64_t col) { offsets[col] = cpu::kernels().count_bits(columns + col * col_bytes, col_bytes); });
  exclusive_prefix_sums(offsets, all_cols, 0);
  for_each_task(tiles.count(), tiles.bytes(element.width), [&](int64_t index) {
    const Tiling::Tile t = tiles[index];
    const int64_t row = t.matrix * m.rows + t.row, col = t.matrix * m.cols + t.col;
    std::vector<int64_t> row_next = starts_in_lines(proof.masks(), row_bytes, proof.offsets(), row, t.rows, t.col);
    std::vector<int64_t> col_next = starts_in_lines(columns, col_bytes, offsets, col, t.cols, t.row);
    value_kernels(element.width)
        .transpose_values(const_bytes(proof.parts.values), proof.masks() + row * row_bytes + t.col / 8, t.rows, t.cols, row_bytes,
                          row_next.data(), col_next.data(), mutable_bytes(transposed_values));
  });
  return {transposed_values, transposed_masks, transposed_offsets};
}

std::tuple<Tensor, Tensor, Tensor> to_csc(const Tensor& values, const Tensor& bitmasks, const Tensor& row_offsets,
                                          IntHeaderOnlyArrayRef shape) {
  const auto [by_column, masks, offsets] = transpose_parts(values, bitmasks, row_offsets, shape);
  const auto [ccol_indices, row_indices] = row_starts_and_columns(prove(by_column, masks, offsets, transposed_shape(shape)));
  return {ccol_indices, row_indices, by_column};
}

// --------------------------------------------------------------------------------------------------- to the bitmask layout

template <typename Sizes>
void check_sizes(const char* name, const Sizes& sizes, const std::vector<int64_t>& expected, const char* what) {
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    fail(name, ": got size ", to_text(sizes), ", expected ", to_text(expected), " (", what, ")");
  }
}

// An index of rows of entries, or of blocks, that torch calls crow_indices and col_indices: contiguous, of the right sizes.
struct Index {
  Tensor crow, col;
  int64_t lines;    // rows of entries in each matrix
  int64_t entries;  // in each matrix
};

// Fails unless there are `lines` rows in each matrix of `shape` and the values are [batch, entries, behind...].
Index index_of(const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices, const std::vector<int64_t>& shape,
               int64_t lines, std::initializer_list<int64_t> behind) {
  check_feature_count("shape", lines);
  check_dtype("crow_indices", dtype_of(crow_indices), "torch.int64", aoti_torch_dtype_int64());
  check_dtype("col_indices", dtype_of(col_indices), "torch.int64", aoti_torch_dtype_int64());
  check_sizes("crow_indices", crow_indices.sizes(), batch_sizes(shape, {lines + 1}), "the sizes of the batch, and rows + 1");
  if (col_indices.dim() == 0) fail("col_indices: got size [], expected the sizes of the batch, and one per entry");
  const int64_t count = col_indices.size(col_indices.dim() - 1);
  check_sizes("col_indices", col_indices.sizes(), batch_sizes(shape, {count}), "the sizes of the batch, and one per entry");
  std::vector<int64_t> of_values = batch_sizes(shape, {count});
  of_values.insert(of_values.end(), behind);
  check_sizes("values", values.sizes(), of_values, "those of col_indices, then those of a block");
  return {contiguous("crow_indices", crow_indices), contiguous("col_indices", col_indices), lines, count};
}

// Where the entries of each row begin, for all matrices: a copy, proven to lead from 0 to the number of entries of each matrix.
std::vector<int64_t> copy_line_starts(const Index& index, int64_t matrices) {
  const int64_t* const from = const_entries(index.crow);
  std::vector<int64_t> starts(from, from + matrices * (index.lines + 1));
  for (int64_t matrix = 0; matrix < matrices; ++matrix) {
    const int64_t first = matrix * (index.lines + 1);
    const int64_t* const line = starts.data() + first;
    if (line[0] != 0) fail("crow_indices[", first, "]: got ", line[0], ", expected 0");
    for (int64_t i = 0; i < index.lines; ++i) {
      if (line[i + 1] >= line[i] && line[i + 1] <= index.entries) continue;
      fail("crow_indices[", first + i + 1, "]: got ", line[i + 1], ", expected ", line[i], " to ", index.entries,
           " (the number of entries)");
    }
    if (line[index.lines] != index.entries) {
      fail("crow_indices[", first + index.lines, "]: got ", line[index.lines], ", expected ", index.entries, " (the number of entries)");
    }
  }
  return starts;
}

// What is wrong with an entry of a row that begins with entry `first`, all counted from the first matrix on.
[[noreturn]] void fail_column(const int64_t* columns, int64_t entry, int64_t first, int64_t row, int64_t cols) {
  const int64_t got = columns[entry];
  if (got < 0 || got >= cols || entry == first) fail("col_indices[", entry, "]: got ", got, ", expected at least 0 and less than ", cols);
  fail("col_indices[", entry, "]: got ", got, ", expected more than ", columns[entry - 1], ", which comes before it in row ", row);
}

// Rows of all matrices in ranges that cost about the same: entries_before(row) entries come before a row, of entry_bytes each.
template <typename Before>
std::vector<int64_t> row_ranges(int64_t rows, int64_t row_bytes, int64_t entry_bytes, const Before& entries_before) {
  const auto bytes_before = [&](int64_t row) { return entries_before(row) * entry_bytes + row * (row_bytes + kIndexBytes); };
  return split_by_cost(rows, task_count(bytes_before(rows)), bytes_before);
}

std::tuple<Tensor, Tensor, Tensor> from_csr(const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices,
                                            IntHeaderOnlyArrayRef shape, bool keep_negative_zero) {
  const std::vector<int64_t> sizes = vector_of(shape);
  const Matrices m = matrices(sizes);
  const Index index = index_of(values, crow_indices, col_indices, sizes, m.rows, {});
  const std::vector<int64_t> starts = copy_line_starts(index, m.count);
  const int64_t rows = m.all_rows(), row_bytes = bitmask_bytes(m.cols), kept_bytes = bitmask_bytes(index.entries);
  // The codec drops zeros: what it keeps is marked in a bitmask of the entries.
  const auto parts = compress(values, keep_negative_zero);
  const Tensor &kept_values = std::get<0>(parts), &kept = std::get<1>(parts);
  const bool all_kept = kept_values.numel() == values.numel();
  const Tensor bitmasks = empty(bitmask_sizes(sizes), aoti_torch_dtype_uint8()), row_offsets = empty_indices({rows});
  const int64_t* const columns = const_entries(index.col);
  int64_t* const offsets = entries(row_offsets);

  const auto start_of = [&](int64_t row) {  // of a row, or of the end, counted from the first matrix on
    const int64_t matrix = row == rows ? m.count : row / m.rows;
    return matrix * index.entries + (row == rows ? 0 : starts[static_cast<size_t>(matrix * (m.rows + 1) + row % m.rows)]);
  };
  const std::vector<int64_t> borders = row_ranges(rows, row_bytes, kIndexBytes, start_of);
  const int64_t ranges = static_cast<int64_t>(borders.size()) - 1;
  std::vector<int64_t> faulty_rows(static_cast<size_t>(ranges), rows), faults(static_cast<size_t>(ranges));
  for_each_task(ranges, kMostTaskBytes, [&](int64_t range) {
    const size_t task = static_cast<size_t>(range);
    for (int64_t row = borders[task]; row < borders[task + 1]; ++row) {
      const int64_t matrix = row / m.rows, line = matrix * (m.rows + 1) + row % m.rows;
      const int64_t first = starts[static_cast<size_t>(line)], count = starts[static_cast<size_t>(line) + 1] - first;
      const int64_t entry = matrix * index.entries + first;
      uint8_t* const bits = mutable_bytes(bitmasks) + row * row_bytes;
      if (row_bytes > 0) std::memset(bits, 0, static_cast<size_t>(row_bytes));
      const int64_t done = cpu::kernels().convert.mark_columns(
          columns + entry, count, all_kept ? nullptr : const_bytes(kept) + matrix * kept_bytes, first, m.cols, bits, offsets + row);
      if (done == count) continue;
      faulty_rows[task] = row;
      faults[task] = entry + done;
      return;
    }
  });
  for (size_t task = 0; task < faults.size(); ++task) {
    const int64_t row = faulty_rows[task];
    if (row < rows) fail_column(columns, faults[task], start_of(row), row, m.cols);
  }
  exclusive_prefix_sums(offsets, rows, 0);
  return {kept_values, bitmasks, row_offsets};
}

std::tuple<Tensor, Tensor, Tensor> from_bsr(const Tensor& values, const Tensor& crow_indices, const Tensor& col_indices,
                                            IntHeaderOnlyArrayRef shape, bool keep_negative_zero) {
  const std::vector<int64_t> sizes = vector_of(shape);
  const Matrices m = matrices(sizes);
  if (values.dim() < 3) fail("values: got size ", to_text(values.sizes()), ", expected [..., blocks, block rows, block columns]");
  const Blocks blocks = blocks_of("values", values.sizes(), values.size(values.dim() - 2), values.size(values.dim() - 1), m);
  const int64_t lines = m.rows / blocks.rows, row_bytes = bitmask_bytes(m.cols);
  const Index index = index_of(values, crow_indices, col_indices, sizes, lines, {blocks.rows, blocks.cols});
  std::vector<BlockIndex> proven;
  for (int64_t matrix = 0; matrix < m.count; ++matrix) {
    const int64_t starts_before = matrix * (lines + 1), blocks_before = matrix * index.entries;
    proven.push_back(copy_block_index(kByRow, const_entries(index.crow) + starts_before, lines, const_entries(index.col) + blocks_before,
                                      index.entries, blocks.g.cols, starts_before, blocks_before));
  }
  const Element element = element_of(values, keep_negative_zero);
  const ConvertValueKernels& kernels = value_kernels(element.width);
  const Tensor source = contiguous("values", values);
  const Tensor bitmasks = empty(bitmask_sizes(sizes), aoti_torch_dtype_uint8()), row_offsets = empty_indices({m.all_rows()});
  const int64_t all_blocks = m.count * index.entries;
  int64_t* const offsets = entries(row_offsets);

  const auto start_of = [&](int64_t line) {  // of a line of blocks, or of the end, counted from the first matrix on
    if (line == blocks.g.rows) return all_blocks;
    return line / lines * index.entries + proven[static_cast<size_t>(line / lines)].line_starts[static_cast<size_t>(line % lines)];
  };
  const std::vector<int64_t> borders = row_ranges(blocks.g.rows, blocks.rows * row_bytes, blocks.elements() * element.width, start_of);
  // Calls body(first row, its bits, blocks, line) for every line of blocks.
  const auto for_each_line = [&](const auto& body) {
    for_each_task(static_cast<int64_t>(borders.size()) - 1, kMostTaskBytes, [&](int64_t range) {
      for (int64_t line = borders[static_cast<size_t>(range)]; line < borders[static_cast<size_t>(range) + 1]; ++line) {
        const int64_t matrix = line / lines, first = start_of(line);
        const int64_t* const positions = proven[static_cast<size_t>(matrix)].positions.data() + (first - matrix * index.entries);
        body(line * blocks.rows, mutable_bytes(bitmasks) + line * blocks.rows * row_bytes,
             const_bytes(source) + first * blocks.elements() * element.width,
             cpu::BlockLine{positions, start_of(line + 1) - first, blocks.rows, blocks.cols, m.cols});
      }
    });
  };
  for_each_line([&](int64_t row, uint8_t* bits, const uint8_t* from, const cpu::BlockLine& line) {
    kernels.build_bitmasks(from, line, element.zero_test, bits, offsets + row);
  });
  const int64_t nnz = exclusive_prefix_sums(offsets, m.all_rows(), 0);
  const Tensor packed = empty(std::vector<int64_t>{nnz}, element.dtype);
  for_each_line([&](int64_t row, const uint8_t* bits, const uint8_t* from, const cpu::BlockLine& line) {
    const int64_t start = offsets[row], end = row + blocks.rows < m.all_rows() ? offsets[row + blocks.rows] : nnz;
    kernels.pack_values(from, line, bits, mutable_bytes(packed) + start * element.width, end - start);
  });
  return {packed, bitmasks, row_offsets};
}

// Of a COO tensor's indices [dims, nnz], in order: where the entries of each row begin. What from_csr makes of them proves the rest.
Tensor coo_to_crow(const Tensor& indices, IntHeaderOnlyArrayRef shape) {
  const std::vector<int64_t> sizes = vector_of(shape);
  const int64_t rows = geometry(sizes).rows, dims = static_cast<int64_t>(sizes.size());
  check_dtype("indices", dtype_of(indices), "torch.int64", aoti_torch_dtype_int64());
  if (dims == 0 || indices.dim() != 2 || indices.size(0) != dims) {
    fail("indices: got size ", to_text(indices.sizes()), ", expected [", dims, ", entries], one row for each of one or more dimensions");
  }
  if (rows == INT64_MAX) fail("shape: got ", to_text(sizes), ", expected fewer than 2^63 - 1 rows");
  const Tensor source = contiguous("indices", indices), crow_indices = empty_indices({rows + 1});
  const int64_t nnz = source.size(1), count = std::max<int64_t>(task_count(nnz * kIndexBytes * dims), 1);
  int64_t* const crow = entries(crow_indices);
  std::vector<int64_t> faults(static_cast<size_t>(count), nnz);
  for_each_task(count, nnz * kIndexBytes * dims / count, [&](int64_t task) {
    const int64_t begin = nnz / count * task + std::min(task, nnz % count);
    const int64_t end = nnz / count * (task + 1) + std::min(task + 1, nnz % count);
    const int64_t done = cpu::kernels().convert.start_rows(const_entries(source), nnz, sizes.data(), dims - 1, rows, begin, end, crow);
    if (done < end) faults[static_cast<size_t>(task)] = done;
  });
  const int64_t faulty = *std::min_element(faults.begin(), faults.end());
  const auto entry_text = [&](int64_t entry) {
    std::vector<int64_t> entry_indices;
    for (int64_t dim = 0; dim < dims; ++dim) entry_indices.push_back(const_entries(source)[dim * nnz + entry]);
    return to_text(entry_indices);
  };
  if (faulty < nnz) {
    fail("indices[:, ", faulty, "]: got ", entry_text(faulty), ", expected at least 0, less than ", to_text(sizes),
         faulty > 0 ? " and more than " + entry_text(faulty - 1) + ", which comes before it" : "");
  }
  return crow_indices;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) {
  m.impl("coo_to_crow", TORCH_BOX(&coo_to_crow));
  m.impl("from_bsr", TORCH_BOX(&from_bsr));
  m.impl("from_csr", TORCH_BOX(&from_csr));
  m.impl("to_bsr", TORCH_BOX(&to_bsr));
  m.impl("to_coo", TORCH_BOX(&to_coo));
  m.impl("to_csc", TORCH_BOX(&to_csc));
  m.impl("to_csr", TORCH_BOX(&to_csr));
  m.impl("transpose", TORCH_BOX(&transpose_parts));
}

}  // namespace bitmask
