// The 90 patterns of two elements in every row and column of 4 x 4, in the order in which pruning tries them: that of their rows, the first
// row counting most, and rows in that of their last, then their first column. No torch header, no STL.
#pragma once

#include <cstdint>

namespace bitmask {

constexpr int kRowPatterns = 6;
constexpr int kHalfPatterns = kRowPatterns * kRowPatterns;  // of two rows: kRowPatterns * that of the first + that of the second
constexpr int kRowPattern[kRowPatterns] = {0x3, 0x5, 0x6, 0x9, 0xa, 0xc};

struct TransposablePatterns {
  static constexpr int kCount = 90;
  uint8_t upper[kCount], lower[kCount];  // patterns of the two halves

  constexpr TransposablePatterns() : upper(), lower() {
    int count = 0;
    for (int halves = 0; halves < kHalfPatterns * kHalfPatterns; ++halves) {
      const int high = halves / kHalfPatterns, low = halves % kHalfPatterns;
      if (in_columns(high) + in_columns(low) != 0x2222) continue;
      upper[count] = static_cast<uint8_t>(high);
      lower[count++] = static_cast<uint8_t>(low);
    }
  }

  // The columns that a row keeps, one to each bit.
  constexpr int row(int pattern, int row) const {
    const int half = row < 2 ? upper[pattern] : lower[pattern];
    return kRowPattern[row % 2 == 0 ? half / kRowPatterns : half % kRowPatterns];
  }

 private:
  // The elements that a half has in each column, a hexadecimal digit each.
  static constexpr int in_columns(int half) { return digits(kRowPattern[half / kRowPatterns]) + digits(kRowPattern[half % kRowPatterns]); }
  static constexpr int digits(int row) { return (row & 1) | (row & 2) << 3 | (row & 4) << 6 | (row & 8) << 9; }
};
constexpr TransposablePatterns kTransposable;

}  // namespace bitmask
