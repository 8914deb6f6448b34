// Validation shared by the implementations of every device: shapes, the three parts of a bitmask tensor, what 2:4 asks. No torch header.
// Throws std::invalid_argument; messages say what, where, got, expected.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace bitmask {

// What every message of fail() begins with: torch decides, by version, as which Python exception it comes out.
constexpr const char* kInvalid = "bitmask: invalid input: ";

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << kInvalid;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// What the message begins with when a GPU has no memory left: comes out as torch.OutOfMemoryError.
constexpr const char* kOutOfMemory = "bitmask: out of memory: ";

// A list of sizes as "[2, 3]". Sizes: anything with size() and operator[].
template <typename Sizes>
std::string to_text(const Sizes& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

// Rows and columns of a shape: the last dimension, and all the others flattened; a scalar is one element. Fails on negative sizes and on
// more elements than fit an int64, sizes of zero left out of the product, so that no later size or stride can overflow either.
template <typename Sizes>
Geometry geometry(const Sizes& shape) {
  int64_t span = 1;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0) fail("shape: got ", to_text(shape), ", expected no negative size");
    if (shape[i] != 0 && __builtin_mul_overflow(span, static_cast<int64_t>(shape[i]), &span)) {
      fail("shape: got ", to_text(shape), ", expected fewer than 2^63 elements");
    }
  }
  Geometry g{1, shape.size() == 0 ? 1 : static_cast<int64_t>(shape[shape.size() - 1])};
  for (size_t i = 0; i + 1 < shape.size(); ++i) g.rows *= shape[i];
  return g;
}

// Fails unless a part has the dtype it must have (torch's scalar type numbers).
inline void check_dtype(const char* name, int32_t got, const char* expected_name, int32_t expected) {
  if (got != expected) fail(name, ": got torch scalar type ", got, ", expected ", expected_name);
}

// Fails unless bitmasks have the size [rows, row bytes], or the leading dimensions of the shape for its rows, and row_offsets [rows].
template <typename Sizes, typename Shape>
void check_index_sizes(const Sizes& bitmasks, const Sizes& row_offsets, const Shape& shape, const Geometry& g) {
  const int64_t row_bytes = bitmask_bytes(g.cols);
  const bool flat = bitmasks.size() == 2 && bitmasks[0] == g.rows && bitmasks[1] == row_bytes;
  bool leading = bitmasks.size() == (shape.size() == 0 ? 1 : shape.size()) && bitmasks[bitmasks.size() - 1] == row_bytes;
  for (size_t i = 0; leading && i + 1 < bitmasks.size(); ++i) leading = bitmasks[i] == shape[i];
  if (!flat && !leading) {
    fail("bitmasks: got size ", to_text(bitmasks), ", expected [", g.rows, ", ", row_bytes, "] (rows, ceil(cols / 8)) for shape ",
         to_text(shape));
  }
  if (row_offsets.size() != 1 || row_offsets[0] != g.rows) {
    fail("row_offsets: got size ", to_text(row_offsets), ", expected [", g.rows, "] (one per row)");
  }
}

template <typename Sizes>
void check_values_size(const Sizes& values) {
  if (values.size() != 1) fail("values: got ", values.size(), " dimensions, expected 1");
}

// Fails unless the sizes of the parts fit each other and the shape.
template <typename Sizes, typename Shape>
void check_part_sizes(const Sizes& values, const Sizes& bitmasks, const Sizes& row_offsets, const Shape& shape, const Geometry& g) {
  check_values_size(values);
  check_index_sizes(bitmasks, row_offsets, shape, g);
  if (g.rows == 0 && values[0] != 0) fail("values: got ", values[0], " elements, expected 0 for a tensor without rows");
}

// Fails unless the last dimension has the size that the weight asks for; `feature` names it.
template <typename Sizes>
void check_last_size(const char* name, const Sizes& sizes, int64_t expected, const char* feature) {
  if (sizes.size() == 0 || sizes[sizes.size() - 1] != expected) {
    fail(name, ": got size ", to_text(sizes), ", expected [..., ", expected, "] (", feature, ")");
  }
}

template <typename Sizes>
void check_bias_size(const Sizes& sizes, int64_t rows) {
  if (sizes.size() != 1 || sizes[0] != rows) fail("bias: got size ", to_text(sizes), ", expected [", rows, "] (out_features)");
}

// Fails unless there is a last dimension, and it is of whole groups of four.
template <typename Sizes>
void check_groups_of_four(const char* name, const Sizes& sizes) {
  if (sizes.size() == 0) fail(name, ": got size [], expected at least one dimension");
  if (sizes[sizes.size() - 1] % 4 != 0) {
    fail(name, ": got size ", to_text(sizes), ", expected a last size that is a multiple of 4, for groups of four columns");
  }
}

// Fails with the first group of a dense row that has more than two non-zeros, given elements of `width` bytes.
[[noreturn]] inline void fail_dense(const uint8_t* elements, int64_t row, int64_t cols, const ZeroTest& zero_test, int width) {
  const auto is_zero = [&](const uint8_t* element) {
    for (int i = 0; i < width; ++i) {
      if ((element[i] & zero_test.bytes[i]) != 0) return false;
    }
    return true;
  };
  for (int64_t col = 0; col < cols; col += 4) {
    int count = 0;
    for (int64_t i = col; i < col + 4; ++i) count += is_zero(elements + i * width) ? 0 : 1;
    if (count > 2) fail("dense: row ", row, ", columns ", col, " to ", col + 3, ": got ", count, " non-zeros, expected at most 2");
  }
  fail("dense: row ", row, " changed while it was read");
}

// Fails with what is wrong in a row of 2:4 metadata that a kernel found faulty, given the row and its name.
[[noreturn]] inline void fail_metadata(const uint8_t* bits, const std::string& row, int64_t cols) {
  for (int64_t col = 0; col < cols; col += 4) {
    const int count = __builtin_popcount(bits[col / 8] >> (col % 8) & 0xf);
    if (count != 2) fail("metadata: ", row, ", columns ", col, " to ", col + 3, ": got ", count, " bits set, expected 2");
  }
  if (cols % 8 != 0 && bits[cols / 8] >> 4 != 0) {
    fail("metadata: ", row, " has padding bits set past column ", cols, ", expected zeros");
  }
  fail("metadata: ", row, " changed while it was read");
}
[[noreturn]] inline void fail_metadata(const uint8_t* bits, int64_t row, int64_t cols) {
  fail_metadata(bits, "row " + std::to_string(row), cols);
}

// Fails with what is wrong in a row that a kernel found faulty, given its bitmask and its offset. `end` is the next row's offset, or nnz
// after the last row.
[[noreturn]] inline void fail_row(const uint8_t* bits, int64_t start, int64_t end, int64_t row, const Geometry& g, int64_t nnz) {
  const bool last = row + 1 == g.rows;
  const std::string where = "row_offsets[" + std::to_string(row) + "]";
  if (start < 0 || start > nnz) fail(where, ": got ", start, ", expected 0 to ", nnz, " (the number of values)");
  if (end > nnz) fail("row_offsets[", row + 1, "]: got ", end, ", expected 0 to ", nnz, " (the number of values)");
  if (row == 0 && start != 0) fail(where, ": got ", start, ", expected 0");
  if (end < start) fail("row_offsets[", row + 1, "]: got ", end, ", expected no less than ", where, " = ", start);

  const int64_t row_bytes = bitmask_bytes(g.cols);
  int64_t count = 0;
  for (int64_t i = 0; i < row_bytes; ++i) count += __builtin_popcount(bits[i]);
  if (g.cols % 8 != 0 && bits[row_bytes - 1] >> (g.cols % 8) != 0) {
    fail("bitmasks: row ", row, " has padding bits set past column ", g.cols, ", expected zeros");
  }
  if (last) {
    fail("values: got ", nnz, " elements, expected ", start + count, " (row_offsets[", row, "] = ", start, " and ", count,
         " bits set in the last row)");
  }
  fail("row_offsets[", row + 1, "]: got ", end, ", expected ", start + count, " (", where, " = ", start, " and ", count,
       " bits set in that row)");
}

// The same for a row of whole bitmasks and row_offsets.
[[noreturn]] inline void fail_row(const uint8_t* bitmasks, const int64_t* row_offsets, int64_t row, const Geometry& g, int64_t nnz) {
  fail_row(bitmasks + row * bitmask_bytes(g.cols), row_offsets[row], row + 1 == g.rows ? nnz : row_offsets[row + 1], row, g, nnz);
}

}  // namespace bitmask
