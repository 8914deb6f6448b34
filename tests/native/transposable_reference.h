// Pruning to 2:4 in rows and columns in its plainest form: all choices of eight of sixteen elements that leave two in each row and column.
#pragma once

#include <algorithm>
#include <cmath>

#include "formats.h"
#include "testing.h"

namespace bitmask::testing::two_four {

// ---------------------------------------------------------------------------------------------------------------- references

// The patterns in the order of the kernel: element i is in digit i / 4 of four bits, the first row being the topmost digit, at bit i % 4.
inline std::vector<int> patterns() {
  std::vector<int> found;
  for (int pattern = 0; pattern < 1 << 16; ++pattern) {
    int in_row[4] = {}, in_col[4] = {};
    for (int i = 0; i < 16; ++i) {
      const int kept = pattern >> (12 - i / 4 * 4 + i % 4) & 1;
      in_row[i / 4] += kept;
      in_col[i % 4] += kept;
    }
    const auto two = [](int kept) { return kept == 2; };
    if (std::all_of(in_row, in_row + 4, two) && std::all_of(in_col, in_col + 4, two)) found.push_back(pattern);
  }
  return found;
}

inline bool keeps(int pattern, int i) { return (pattern >> (12 - i / 4 * 4 + i % 4) & 1) != 0; }

// What a pattern keeps of a block. Finite magnitudes are summed up in double precision, in the order that the kernels promise: those of
// each row, then row 0 and row 1, row 2 and row 3, then both. `scale` is less than one where the sum might not be finite.
struct Kept {
  int nans = 0, infinities = 0;
  double sum = 0;
};

inline Kept kept_by(int pattern, const double (&block)[16], double scale) {
  Kept kept;
  double rows[4] = {};
  for (int i = 0; i < 16; ++i) {
    if (!keeps(pattern, i)) continue;
    kept.nans += std::isnan(block[i]);
    kept.infinities += std::isinf(block[i]);
    if (std::isfinite(block[i])) rows[i / 4] += std::fabs(block[i]) * scale;
  }
  kept.sum = (rows[0] + rows[1]) + (rows[2] + rows[3]);
  return kept;
}

inline bool is_better(const Kept& a, const Kept& b) {
  if (a.nans != b.nans) return a.nans > b.nans;
  if (a.infinities != b.infinities) return a.infinities > b.infinities;
  return a.sum > b.sum;
}

// ---------------------------------------------------------------------------------------------------------------- data

enum Numbers { kFew, kReals, kWide, kExtreme, kHuge, kTiny, kZeros, kNumbers };

constexpr const char* kNumbersNames[] = {"few", "reals", "wide", "extreme", "huge", "tiny", "zeros"};

inline uint64_t random_element(const Format& format, Numbers numbers) {
  const uint64_t sign = random_word() & format.sign(), any = random_word() & (2 * (format.sign() - 1) + 1);
  const uint64_t one = format.encode(1), step = uint64_t{1} << format.mantissa;
  switch (numbers) {
    case kFew:
      return format.encode(static_cast<double>(random_below(3))) | sign;
    case kReals:  // from 1 to 16, of 24 bits of mantissa at most
      return (one + random_word() % (4 * step) / (format.width == 8 ? step >> 20 : 1) * (format.width == 8 ? step >> 20 : 1)) | sign;
    case kWide:
      return any % format.infinity() | sign;
    case kExtreme:
      return random_below(3) == 0 ? any : format.infinity() | sign | (random_below(4) == 0 ? uint64_t{1} : 0);
    case kHuge:
      return (format.infinity() - 1 - random_word() % step) | sign;
    case kTiny:
      return random_word() % 1000 | sign;
    default:
      return sign;
  }
}

// ---------------------------------------------------------------------------------------------------------------- checks

inline void test_block(const Format& format, const uint64_t (&before)[16], const uint64_t (&after)[16]) {
  static const std::vector<int> all = patterns();
  double block[16], scale = 1;
  for (int i = 0; i < 16; ++i) {
    block[i] = format.decode(before[i]);
    if (std::isfinite(block[i]) && std::fabs(block[i]) >= 0x1p1000) scale = 0x1p-8;
  }
  const int* best = &all[0];
  for (const int& pattern : all) {
    if (is_better(kept_by(pattern, block, scale), kept_by(*best, block, scale))) best = &pattern;
  }
  bool same = true;
  for (int i = 0; i < 16; ++i) same = same && after[i] == (keeps(*best, i) ? before[i] : 0);
  check(same, "keeps another pattern than the best one, or not the first of the best");
}

inline Bytes random_elements(const Format& format, Numbers numbers, int64_t rows, int64_t cols) {
  Bytes elements(static_cast<size_t>(rows * cols * format.width));
  for (int64_t at = 0; at < rows * cols; ++at) {
    format.store(random_element(format, numbers), &elements[static_cast<size_t>(at * format.width)]);
  }
  return elements;
}

inline void test_pruned(const Format& format, int64_t rows, int64_t cols, const Bytes& elements, const Bytes& pruned) {
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t col = 0; col < cols; col += 4) {
      uint64_t before[16], after[16];
      for (int i = 0; i < 16; ++i) {
        const size_t at = static_cast<size_t>(((row + i / 4) * cols + col + i % 4) * format.width);
        before[i] = format.load(&elements[at]);
        after[i] = format.load(&pruned[at]);
      }
      test_block(format, before, after);
    }
  }
}

}  // namespace bitmask::testing::two_four
