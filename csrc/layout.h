// Constants and plain structs of the layouts (FORMAT.md has the bytes). No torch header, no STL: every kernel, fuzzer and
// cross-compiled test includes this file.
#pragma once

#include <cstdint>

namespace bitmask {

// Columns that kernels take at a time: one 64-bit word of the bitmask.
constexpr int64_t kGroup = 64;

// Element widths in bytes that kernels are compiled for: 1 << 0 ... 1 << 4.
constexpr int kWidths = 5;

// Blocks that cover `size` >= 0 rows or columns: size / block, rounded up without overflow.
constexpr int64_t blocks_across(int64_t size, int64_t block) { return size / block + (size % block != 0); }

// Bytes of one bitmask row: ceil(cols / 8), without overflow for any cols >= 0.
constexpr int64_t bitmask_bytes(int64_t cols) { return blocks_across(cols, 8); }

// The zero rule. An element is zero iff all its bits that are set here are clear; the pattern of one element is repeated to 16 bytes so
// that every vector unit can load it whole. All ones tests bits; floating-point kinds leave the sign out, so that -0.0 is zero too.
struct ZeroTest {
  uint8_t bytes[16];
};

// A [rows, cols] matrix, rows being every dimension but the last, flattened.
struct Geometry {
  int64_t rows;
  int64_t cols;
};

// A compressed [rows, cols] weight. Nothing in it is trusted: kernels prove a row while they walk it, and read nothing outside of
// bitmasks [rows, bitmask_bytes(cols)], row_offsets [rows] and values [nnz], whatever these say.
struct BitmaskMatrix {
  const void* values;
  const uint8_t* bitmasks;
  const int64_t* row_offsets;
  int64_t rows;
  int64_t cols;
  int64_t nnz;
};

// A 2:4 [rows, cols] matrix, cols a multiple of 4: of each group of four columns exactly two are stored. Kernels do not trust the metadata:
// each row of it is proven while it is walked. Where values lie does not depend on it.
struct TwoFourMatrix {
  const void* values;       // [rows, cols / 2]
  const uint8_t* metadata;  // [rows, bitmask_bytes(cols)]: a bitmask, two bits set in every four, padding zero
  int64_t rows;
  int64_t cols;
};

// How the magnitudes of a dtype compare, told by the bits of its elements. NaN is larger than all others.
enum class Magnitude {
  kUnsigned,       // as they are
  kSigned,         // two's complement
  kSignMagnitude,  // all bits but the sign, the topmost one
  kNoNegativeZero  // the same, but the sign alone is NaN: the float8 *fnuz kinds
};

// A block-sparse [rows, cols] weight, as kernels walk it: line by line, a line being the kept blocks of one block row or, transposed, of
// one block column. Unlike a bitmask it is proven before a kernel sees it: indices are copies that nobody else writes to.
struct BlockMatrix {
  const void* values;  // [blocks][block_rows][block_cols]
  int64_t rows;        // of W; the last block row may reach past them, with elements that count for nothing
  int64_t cols;        // the same
  int64_t block_rows;
  int64_t block_cols;
  const int64_t* line_starts;  // [lines + 1]: the first block of each line, as torch's crow_indices or ccol_indices
  const int64_t* positions;    // [blocks]: the block column (transposed: block row) of each block, ascending in each line
  const int64_t* lines;        // [blocks]: the line of each block
  const int64_t* order;        // [blocks]: where each block lies in values; null where they lie in the order of the lines
};

}  // namespace bitmask
