// Tests pruning to 2:4 in rows and columns: every kernel table that this machine can run, every dtype, against all choices of eight of
// sixteen elements that leave two in each row and column.
#include <algorithm>
#include <cmath>

#include "../../csrc/cpu/kernels.h"
#include "formats.h"
#include "testing.h"

using namespace bitmask;
using namespace bitmask::testing;
using cpu::Kernels;

namespace {

// ---------------------------------------------------------------------------------------------------------------- references

// The patterns in the order of the kernel: element i is in digit i / 4 of four bits, the first row being the topmost digit, at bit i % 4.
std::vector<int> patterns() {
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

bool keeps(int pattern, int i) { return (pattern >> (12 - i / 4 * 4 + i % 4) & 1) != 0; }

// What a pattern keeps of a block. A sum of doubles from 2^-1074 on needs more bits than there are: it is added up from the smallest
// on, which is not what the kernels do.
struct Kept {
  int nans = 0, infinities = 0;
  long double sum = 0;
};

Kept kept_by(int pattern, const double (&block)[16]) {
  Kept kept;
  std::vector<long double> finite;
  for (int i = 0; i < 16; ++i) {
    if (!keeps(pattern, i)) continue;
    kept.nans += std::isnan(block[i]);
    kept.infinities += std::isinf(block[i]);
    if (std::isfinite(block[i])) finite.push_back(std::fabs(static_cast<long double>(block[i])));
  }
  std::sort(finite.begin(), finite.end());
  for (const long double magnitude : finite) kept.sum += magnitude;
  return kept;
}

bool is_better(const Kept& a, const Kept& b) {
  if (a.nans != b.nans) return a.nans > b.nans;
  if (a.infinities != b.infinities) return a.infinities > b.infinities;
  return a.sum > b.sum;
}

// ---------------------------------------------------------------------------------------------------------------- data

enum Numbers { kFew, kReals, kWide, kExtreme, kHuge, kTiny, kZeros, kNumbers };

constexpr const char* kNumbersNames[] = {"few", "reals", "wide", "extreme", "huge", "tiny", "zeros"};

// Sums of all but the wide, extreme and huge ones are exact in double precision.
bool is_exact(Numbers numbers) { return numbers != kWide && numbers != kExtreme && numbers != kHuge; }

uint64_t random_element(const Format& format, Numbers numbers) {
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

// ---------------------------------------------------------------------------------------------------------------- tests

void test_block(const Format& format, bool exact, const uint64_t (&before)[16], const uint64_t (&after)[16]) {
  static const std::vector<int> all = patterns();
  double block[16];
  for (int i = 0; i < 16; ++i) block[i] = format.decode(before[i]);
  const int* best = &all[0];
  for (const int& pattern : all) {
    if (is_better(kept_by(pattern, block), kept_by(*best, block))) best = &pattern;
  }
  // What has been kept, as far as it shows: of zeros it does not.
  const auto agrees = [&](int pattern) {
    bool same = true;
    for (int i = 0; i < 16; ++i) same = same && after[i] == (keeps(pattern, i) ? before[i] : 0);
    return same;
  };
  if (exact) {
    check(agrees(*best), "keeps another pattern than the best one, or not the first of the best");
    return;
  }
  const Kept optimum = kept_by(*best, block);
  bool good = false;
  for (const int pattern : all) {
    const Kept kept = kept_by(pattern, block);
    const bool same_rank = kept.nans == optimum.nans && kept.infinities == optimum.infinities;
    good = good || (agrees(pattern) && same_rank && kept.sum >= optimum.sum * (1 - 0x1p-50L));
  }
  check(good, "keeps a pattern that is not the best one");
}

void test_matrix(const Kernels& kernels, int dtype, Numbers numbers, int64_t rows, int64_t cols, int skew) {
  const Format& format = kFormats[dtype];
  Bytes elements(static_cast<size_t>(rows * cols * format.width));
  for (int64_t at = 0; at < rows * cols; ++at) {
    format.store(random_element(format, numbers), &elements[static_cast<size_t>(at * format.width)]);
  }
  Buffer weight(elements, skew);
  kernels.two_four_linear[dtype].prune_transposable(weight.data(), rows, cols);
  check(weight.canaries_intact(), "writes outside of its range");
  for (int64_t row = 0; row < rows; row += 4) {
    for (int64_t col = 0; col < cols; col += 4) {
      uint64_t before[16], after[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t at = ((row + i / 4) * cols + col + i % 4) * format.width;
        before[i] = format.load(elements.data() + at);
        after[i] = format.load(weight.data() + at);
      }
      test_block(format, is_exact(numbers), before, after);
    }
  }
}

}  // namespace

void bitmask::testing::test_two_four_prune(bool brief) {
  check(patterns().size() == 90, "there are other than 90 patterns");
  for (int isa = 0; isa < cpu::isa_count(); ++isa) {
    cpu::force_isa(cpu::isa_name(isa));
    for (int dtype = 0; dtype < cpu::kLinearDtypes; ++dtype) {
      for (int numbers = 0; numbers < kNumbers; ++numbers) {
        for (const int64_t cols : {0, 4, 8, 60, 64, 68, 132, 320}) {
          for (const int64_t rows : {0, 4, 8, 12}) {
            if ((brief || kSanitized) && rows * cols > 8 * 68) continue;
            place = std::string(cpu::isa_name(isa)) + " 2:4 in rows and columns, " + kFormats[dtype].name + " " + kNumbersNames[numbers] +
                    " [" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
            test_matrix(cpu::kernels(), dtype, static_cast<Numbers>(numbers), rows, cols, kSkews[random_below(3)]);
          }
        }
      }
    }
  }
}
