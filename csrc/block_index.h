// The index of a block-sparse weight: copied, then proven, so that nobody can change under a kernel what it walks by. No torch header.
// Throws std::invalid_argument; messages say what, where, got, expected.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "checks.h"
#include "layout.h"

namespace bitmask {

// The most rows, and columns, of a block: so that the bytes of one block, rounded up, do not overflow.
constexpr int64_t kMostBlockSide = int64_t{1} << 28;

// The parts of an index of blocks, line by line, as messages call them.
struct BlockFields {
  const char* starts;
  const char* positions;
};
constexpr BlockFields kByRow{"crow_indices", "col_indices"};
constexpr BlockFields kByColumn{"ccol_indices", "row_indices"};

// A proven index: the vectors behind BlockMatrix. The order is empty where blocks lie in the order of the lines.
struct BlockIndex {
  std::vector<int64_t> line_starts, positions, lines, order;

  int64_t line_count() const { return static_cast<int64_t>(line_starts.size()) - 1; }
  int64_t blocks() const { return static_cast<int64_t>(positions.size()); }
};

// Fails on sizes of a weight that cannot be. One more than the size still is an int64.
inline void check_feature_count(const char* name, int64_t count) {
  if (count < 0 || count == INT64_MAX) fail(name, ": got ", count, ", expected 0 or more, and less than 2^63 - 1");
}

// Fails unless a block of such sides can be.
template <typename Sizes>
void check_block_shape(const char* name, const Sizes& sizes, int64_t rows, int64_t cols) {
  if (std::min(rows, cols) < 1 || std::max(rows, cols) > kMostBlockSide) {
    fail(name, ": got ", to_text(sizes), ", expected block rows and block columns of 1 to ", kMostBlockSide);
  }
}

// Fails unless these are the sizes [blocks, block rows, block columns].
template <typename Sizes>
void check_block_values(const Sizes& sizes) {
  if (sizes.size() != 3) fail("values: got size ", to_text(sizes), ", expected [blocks, block rows, block columns]");
  check_block_shape("values", sizes, sizes[1], sizes[2]);
}

// Fails unless these are the sizes of a vector of at least so many entries.
template <typename Sizes>
void check_vector(const char* name, const Sizes& sizes, int64_t least) {
  if (sizes.size() != 1 || sizes[0] < least) fail(name, ": got size ", to_text(sizes), ", expected one dimension of at least ", least);
}

// Fails unless starts has one entry for each of the lines and one more. Nothing is allocated or added up for lines before this.
template <typename Sizes>
void check_starts_size(const char* name, const Sizes& sizes, int64_t lines) {
  if (sizes.size() != 1 || sizes[0] < 1 || sizes[0] - 1 != lines) {
    fail(name, ": got size ", to_text(sizes), ", expected [", lines, " + 1] (one for each line of blocks, and the end)");
  }
}

template <typename Sizes>
void check_entries_size(const char* name, const Sizes& sizes, int64_t blocks) {
  if (sizes.size() != 1 || sizes[0] != blocks) fail(name, ": got size ", to_text(sizes), ", expected [", blocks, "] (one per block)");
}

// Copies starts [lines + 1] and positions [blocks], and proves the copies: every line's positions ascend from 0 on, below `limit`. Errors
// count entries from those that come before, in the fields of a batch.
inline BlockIndex copy_block_index(const BlockFields& fields, const int64_t* starts, int64_t lines, const int64_t* positions,
                                   int64_t blocks, int64_t limit, int64_t starts_before = 0, int64_t blocks_before = 0) {
  BlockIndex index{{starts, starts + lines + 1}, {positions, positions + blocks}, std::vector<int64_t>(static_cast<size_t>(blocks)), {}};
  const int64_t* const from = index.line_starts.data();
  const int64_t* const at = index.positions.data();
  if (from[0] != 0) fail(fields.starts, "[", starts_before, "]: got ", from[0], ", expected 0");
  for (int64_t line = 0; line < lines; ++line) {
    if (from[line + 1] < from[line] || from[line + 1] > blocks) {
      fail(fields.starts, "[", starts_before + line + 1, "]: got ", from[line + 1], ", expected ", from[line], " to ", blocks,
           " (the number of blocks)");
    }
    for (int64_t i = from[line]; i < from[line + 1]; ++i) {
      if (at[i] < 0 || at[i] >= limit)
        fail(fields.positions, "[", blocks_before + i, "]: got ", at[i], ", expected at least 0 and less than ", limit);
      if (i > from[line] && at[i] <= at[i - 1]) {
        fail(fields.positions, "[", blocks_before + i, "]: got ", at[i], ", expected more than ", at[i - 1],
             ", which comes before it in line ", line);
      }
      index.lines[static_cast<size_t>(i)] = line;
    }
  }
  if (from[lines] != blocks)
    fail(fields.starts, "[", starts_before + lines, "]: got ", from[lines], ", expected ", blocks, " (the number of blocks)");
  return index;
}

// The same blocks by their positions, of which there are `limit`: lines become positions. The order says where each one lay before.
inline BlockIndex transpose(const BlockIndex& index, int64_t limit) {
  const size_t blocks = index.positions.size();
  const auto zeros = [&] { return std::vector<int64_t>(blocks); };
  BlockIndex result{std::vector<int64_t>(static_cast<size_t>(limit) + 1), zeros(), zeros(), zeros()};
  for (const int64_t position : index.positions) ++result.line_starts[static_cast<size_t>(position) + 1];
  std::partial_sum(result.line_starts.begin(), result.line_starts.end(), result.line_starts.begin());
  std::vector<int64_t> next(result.line_starts);
  for (size_t i = 0; i < blocks; ++i) {
    const size_t place = static_cast<size_t>(next[static_cast<size_t>(index.positions[i])]++);
    result.positions[place] = index.lines[i];
    result.lines[place] = index.positions[i];
    result.order[place] = static_cast<int64_t>(i);
  }
  return result;
}

// Fails unless the entries are the expected ones, which other parts of the index determine.
inline void check_entries(const char* name, const int64_t* got, const std::vector<int64_t>& expected, const char* determined_by) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t entry = got[i];
    if (entry != expected[i]) fail(name, "[", i, "]: got ", entry, ", expected ", expected[i], " as by ", determined_by);
  }
}

// Copies the order [blocks] of a transposed index and proves the copy: it must say where the blocks lie row by row, which the other parts
// determine.
inline void add_order(BlockIndex& index, const int64_t* order) {
  const int64_t blocks = index.blocks();
  index.order.assign(order, order + blocks);
  std::vector<int64_t> places(static_cast<size_t>(blocks), -1);  // in the index, of each block in values
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t block = index.order[static_cast<size_t>(i)];
    if (block < 0 || block >= blocks) fail("order[", i, "]: got ", block, ", expected at least 0 and less than ", blocks);
    const int64_t other = std::exchange(places[static_cast<size_t>(block)], i);
    if (other >= 0) fail("order[", i, "]: got ", block, ", which is order[", other, "] already, expected each block once");
  }
  for (int64_t block = 1; block < blocks; ++block) {
    const size_t before = static_cast<size_t>(places[static_cast<size_t>(block) - 1]),
                 here = static_cast<size_t>(places[static_cast<size_t>(block)]);
    const auto row_and_column = [&](size_t i) { return std::make_pair(index.positions[i], index.lines[i]); };
    if (row_and_column(here) < row_and_column(before)) {
      fail("order[", here, "]: got ", block, ", expected less than order[", before, "] = ", block - 1, ": blocks lie row by row");
    }
  }
}

}  // namespace bitmask
