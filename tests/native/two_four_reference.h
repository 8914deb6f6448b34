// 2:4 in its plainest form, groups of four looked at one by one: what packing, pruning and unpacking are to give, and data to try them
// with.
#pragma once

#include <algorithm>

#include "../../csrc/layout.h"
#include "testing.h"

namespace bitmask::testing::two_four {

// ---------------------------------------------------------------------------------------------------------------- references

struct Kind {
  const char* name;
  int width_log2;
  Magnitude magnitude;
  bool sign_counts;  // the zero rule looks at the topmost bit
  bool floating;     // float or double, which the host can compare

  int width() const { return 1 << width_log2; }
};

constexpr Kind kKinds[] = {
    {"uint8", 0, Magnitude::kUnsigned, true, false},
    {"int8", 0, Magnitude::kSigned, true, false},
    {"float8", 0, Magnitude::kSignMagnitude, false, false},
    {"float8 with -0.0", 0, Magnitude::kSignMagnitude, true, false},
    {"float8 fnuz", 0, Magnitude::kNoNegativeZero, true, false},
    {"uint16", 1, Magnitude::kUnsigned, true, false},
    {"int16", 1, Magnitude::kSigned, true, false},
    {"float16", 1, Magnitude::kSignMagnitude, false, false},
    {"float16 with -0.0", 1, Magnitude::kSignMagnitude, true, false},
    {"uint32", 2, Magnitude::kUnsigned, true, false},
    {"int32", 2, Magnitude::kSigned, true, false},
    {"float32", 2, Magnitude::kSignMagnitude, false, true},
    {"float32 with -0.0", 2, Magnitude::kSignMagnitude, true, true},
    {"uint64", 3, Magnitude::kUnsigned, true, false},
    {"int64", 3, Magnitude::kSigned, true, false},
    {"float64", 3, Magnitude::kSignMagnitude, false, true},
    {"float64 with -0.0", 3, Magnitude::kSignMagnitude, true, true},
};

inline ZeroTest zero_test(const Kind& kind) {
  ZeroTest test;
  for (int i = 0; i < 16; ++i) test.bytes[i] = !kind.sign_counts && i % kind.width() == kind.width() - 1 ? 0x7f : 0xff;
  return test;
}

inline uint64_t bits_of(const uint8_t* element, const Kind& kind) {
  uint64_t bits = 0;
  std::memcpy(&bits, element, static_cast<size_t>(kind.width()));
  return bits;
}

inline uint64_t sign_of(const Kind& kind) { return uint64_t{1} << (8 * kind.width() - 1); }

inline bool is_zero(const uint8_t* element, const Kind& kind) {
  const uint64_t bits = bits_of(element, kind);
  return bits == 0 || (bits == sign_of(kind) && !kind.sign_counts);
}

inline bool is_larger(const uint8_t* a, const uint8_t* b, const Kind& kind) {
  const uint64_t sign = sign_of(kind), left = bits_of(a, kind), right = bits_of(b, kind);
  const bool a_nan = left == sign, b_nan = right == sign;  // of float8 fnuz
  switch (kind.magnitude) {
    case Magnitude::kUnsigned:
      return left > right;
    case Magnitude::kSigned:
      return (left < sign ? left : 2 * (sign - 1) + 2 - left) > (right < sign ? right : 2 * (sign - 1) + 2 - right);
    case Magnitude::kNoNegativeZero:
      return a_nan != b_nan ? a_nan : left % sign > right % sign;
    default:
      break;
  }
  if (kind.floating && kind.width() == 4) {
    float x, y;
    std::memcpy(&x, a, 4);
    std::memcpy(&y, b, 4);
    if (x == x && y == y) return __builtin_fabsf(x) > __builtin_fabsf(y);
    if (x == x || y == y) return y == y;
  }
  if (kind.floating && kind.width() == 8) {
    double x, y;
    std::memcpy(&x, a, 8);
    std::memcpy(&y, b, 8);
    if (x == x && y == y) return __builtin_fabs(x) > __builtin_fabs(y);
    if (x == x || y == y) return y == y;
  }
  return left % sign > right % sign;
}

// Which of four columns are stored, given those of the two largest that are not zero: FORMAT.md's table.
inline std::vector<int> stored_columns(const std::vector<int>& columns) {
  if (columns.size() == 2) return columns;
  if (columns.empty() || columns[0] >= 2) return {2, 3};
  return {columns[0], 2};
}

inline std::vector<int> nonzero_columns(const uint8_t* four, const Kind& kind) {
  std::vector<int> columns;
  for (int i = 0; i < 4; ++i) {
    if (!is_zero(four + i * kind.width(), kind)) columns.push_back(i);
  }
  return columns;
}

inline std::vector<int> largest_columns(const uint8_t* four, const Kind& kind) {
  std::vector<int> columns = nonzero_columns(four, kind);
  std::stable_sort(columns.begin(), columns.end(),
                   [&](int a, int b) { return is_larger(four + a * kind.width(), four + b * kind.width(), kind); });
  if (columns.size() > 2) columns.resize(2);
  std::sort(columns.begin(), columns.end());
  return columns;
}

struct Matrix {
  int64_t rows, cols;
  Bytes dense, values, metadata;
  Bytes pruned;         // what unpacking gives
  int64_t first_crowd;  // the first row that has more than two non-zeros in a group, or `rows`

  int64_t row_bytes() const { return (cols + 7) / 8; }
};

inline Matrix pack_reference(const Kind& kind, int64_t rows, int64_t cols, const Bytes& dense) {
  Matrix matrix{rows, cols, dense, {}, Bytes(static_cast<size_t>(rows * ((cols + 7) / 8)), 0), Bytes(dense.size(), 0), rows};
  for (int64_t row = rows - 1; row >= 0; --row) {
    for (int64_t col = cols - 4; col >= 0; col -= 4) {
      const int64_t at = (row * cols + col) * kind.width();
      const uint8_t* const four = dense.data() + at;
      if (nonzero_columns(four, kind).size() > 2) matrix.first_crowd = row;
      const std::vector<int> stored = stored_columns(largest_columns(four, kind));
      for (auto column = stored.rbegin(); column != stored.rend(); ++column) {
        const uint8_t* const element = four + *column * kind.width();
        std::copy_n(element, kind.width(), matrix.pruned.data() + at + *column * kind.width());
        matrix.values.insert(matrix.values.end(), std::reverse_iterator<const uint8_t*>(element + kind.width()),
                             std::reverse_iterator<const uint8_t*>(element));
        uint8_t& byte = matrix.metadata[static_cast<size_t>(row * matrix.row_bytes() + col / 8)];
        byte = static_cast<uint8_t>(byte | 1 << (col % 8 + *column));
      }
    }
  }
  std::reverse(matrix.values.begin(), matrix.values.end());
  return matrix;
}

inline int64_t first_faulty_reference(const Bytes& metadata, int64_t rows, int64_t cols) {
  const int64_t row_bytes = (cols + 7) / 8;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < row_bytes * 8; col += 4) {
      int64_t marked = 0;
      for (int64_t i = col; i < col + 4; ++i) marked += bit(metadata.data() + row * row_bytes, i);
      if (marked != (col < cols ? 2 : 0)) return row;
    }
  }
  return rows;
}

// ---------------------------------------------------------------------------------------------------------------- data

// A non-zero element. Few numbers make ties; the others are of random bits, or of the ends of the ranges, signs and NaNs with a payload.
inline void fill_element(uint8_t* element, const Kind& kind, bool few_numbers) {
  const uint64_t sign = sign_of(kind), ends[] = {1, sign - 1, sign, sign + 1, ~uint64_t{0}, sign - sign / 64, sign - sign / 64 + 1};
  do {
    uint64_t bits = random_word();
    if (few_numbers) bits = (bits >> 8 & 3) | (bits & sign);
    if (!few_numbers && random_below(3) == 0) bits = ends[random_below(7)] ^ (random_word() & sign);
    std::memcpy(element, &bits, static_cast<size_t>(kind.width()));
  } while (is_zero(element, kind));
}

// A zero element, of either sign if both are zero.
inline void fill_zero(uint8_t* element, const Kind& kind) {
  const uint64_t bits = kind.sign_counts || random_below(2) == 0 ? 0 : sign_of(kind);
  std::memcpy(element, &bits, static_cast<size_t>(kind.width()));
}

inline void fill_four(uint8_t* four, const Kind& kind, int nonzero, bool few_numbers) {
  for (int i = 0; i < 4; ++i) {
    uint8_t* const element = four + i * kind.width();
    (nonzero >> i & 1) != 0 ? fill_element(element, kind, few_numbers) : fill_zero(element, kind);
  }
}

constexpr int kAtMostTwo[] = {0, 1, 2, 4, 8, 3, 5, 6, 9, 10, 12};
constexpr int kTwo[] = {3, 5, 6, 9, 10, 12};

inline Bytes random_dense(const Kind& kind, int64_t rows, int64_t cols, bool crowded) {
  Bytes dense(static_cast<size_t>(rows * cols * kind.width()));
  const bool few_numbers = random_below(2) == 0;
  for (size_t at = 0; at < dense.size(); at += static_cast<size_t>(4 * kind.width())) {
    const int64_t nonzero = crowded ? random_below(16) : kAtMostTwo[random_below(11)];
    fill_four(&dense[at], kind, static_cast<int>(nonzero), few_numbers);
  }
  return dense;
}

// All groups of eight numbers, among them both zeros, NaNs and the ends of the range.
inline Bytes every_four(const Kind& kind) {
  const uint64_t sign = sign_of(kind), numbers[] = {0, sign, 1, sign + 1, 2, sign - 1, ~uint64_t{0}, sign - 2};
  Bytes dense;
  for (int four = 0; four < 8 * 8 * 8 * 8; ++four) {
    for (int i = 0; i < 4; ++i) {
      uint8_t element[8];
      std::memcpy(element, &numbers[four >> (3 * i) & 7], 8);
      dense.insert(dense.end(), element, element + kind.width());
    }
  }
  return dense;
}

inline void set_nibble(Bytes& metadata, int64_t at, int nibble) {
  uint8_t& byte = metadata[static_cast<size_t>(at / 2)];
  byte = static_cast<uint8_t>(at % 2 == 0 ? (byte & 0xf0) | nibble : (byte & 0x0f) | nibble << 4);
}

}  // namespace bitmask::testing::two_four
