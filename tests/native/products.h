// What the tests of products share: numbers, the kernels under test, and whether what they wrote is what it must be.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../../csrc/cpu/kernels.h"
#include "formats.h"
#include "testing.h"

namespace bitmask::testing {

using cpu::Kernels;

// ---------------------------------------------------------------------------------------------------------------- numbers

inline std::vector<double> decode(const Format& format, const std::vector<uint64_t>& bits) {
  std::vector<double> values;
  for (const uint64_t element : bits) values.push_back(format.decode(element));
  return values;
}

// What the elements are.
enum Numbers {
  kIntegers,  // small ones: sums are exact
  kTiny,      // weights and bias are small multiples of the smallest subnormal
  kSpecials,  // integers, here and there infinity or NaN
  kReals,     // with every bit of the mantissa
};
constexpr const char* kNumberNames[] = {"integers", "tiny", "specials", "reals"};

inline uint64_t random_element(const Format& format, Numbers numbers, int64_t bound, bool x) {
  if (numbers == kSpecials && random_below(x ? 150 : 600) == 0) {
    return random_below(2) == 0 ? format.encode(NAN) : format.encode(INFINITY) | (random_below(2) == 0 ? format.sign() : 0);
  }
  if (numbers == kReals) return format.encode(std::ldexp(static_cast<double>(random_word() >> 11), -52) - 1);
  const double integer = static_cast<double>(random_below(2 * bound + 1) - bound);
  return format.encode(numbers == kTiny && !x ? std::ldexp(integer, format.least - format.mantissa) : integer);
}

inline std::string name_of(double density, Numbers numbers) {
  return "density " + std::to_string(density).substr(0, 4) + ", " + kNumberNames[numbers];
}

inline Bytes pack(const Format& format, const std::vector<uint64_t>& bits) {
  Bytes bytes(bits.size() * static_cast<size_t>(format.width));
  for (size_t i = 0; i < bits.size(); ++i) format.store(bits[i], bytes.data() + i * static_cast<size_t>(format.width));
  return bytes;
}

// ---------------------------------------------------------------------------------------------------------------- kernels

// The kernels under test: LinearKernels or BlockKernels for one dtype.
template <class Family>
struct SubjectOf {
  const char* isa;
  const Family& kernels;
  Format format;
  bool flushes;  // takes subnormals for zero
  Buffer scratch;

  SubjectOf(const char* isa, const Family& kernels, int dtype)
      : isa(isa),
        kernels(kernels),
        format(kFormats[dtype]),
        flushes(dtype == cpu::kBfloat16 && std::strstr(isa, "bf16") != nullptr),
        scratch(kernels.scratch_bytes) {}
};

template <class Family>
using SubjectsOf = std::vector<std::unique_ptr<SubjectOf<Family>>>;

// Those of every table that this machine can run.
template <class Family>
SubjectsOf<Family> runnable_subjects(const Family (Kernels::*family)[cpu::kLinearDtypes]) {
  SubjectsOf<Family> subjects;
  for (int i = 0; i < cpu::isa_count(); ++i) {
    cpu::force_isa(cpu::isa_name(i));
    const Kernels& table = cpu::kernels();
    for (int dtype = 0; dtype < cpu::kLinearDtypes; ++dtype) {
      subjects.push_back(std::make_unique<SubjectOf<Family>>(table.isa, (table.*family)[dtype], dtype));
    }
  }
  return subjects;
}

template <class Family>
void poison_scratch(SubjectOf<Family>& subject) {
  if (subject.kernels.scratch_bytes > 0) std::memset(subject.scratch.data(), 0xff, static_cast<size_t>(subject.kernels.scratch_bytes));
}

// ---------------------------------------------------------------------------------------------------------------- results

// Counts the elements that are not what they must be, and keeps the first.
struct Mismatches {
  int64_t count = 0, row = 0, col = 0;
  double got = 0, expected = 0;

  // The element must be `exact`, rounded, if there is no `slack`; else it may be that far off.
  void compare(const Format& format, const uint8_t* element, double exact, double slack, int64_t at_row, int64_t at_col) {
    const double value = format.decode(format.load(element));
    const double rounded = slack == 0 ? format.decode(format.encode(exact)) : exact;
    if (std::isnan(rounded) ? std::isnan(value) : value == rounded || std::fabs(value - rounded) <= slack) return;
    if (count++ == 0) {
      row = at_row;
      col = at_col;
      got = value;
      expected = exact;
    }
  }
};

// Whether `y`, rows of `row_bytes` bytes, has been written around itself, or in columns outside of the bytes [begin, end) of a row.
inline bool written_outside(const Buffer& y, int64_t row_bytes, int64_t begin, int64_t end) {
  const Bytes bytes = y.bytes();
  bool outside = !y.canaries_intact();
  for (size_t at = 0; at < bytes.size(); ++at) {
    const int64_t column = static_cast<int64_t>(at) % row_bytes;
    if ((column < begin || column >= end) && bytes[at] != Buffer::kCanaryByte) outside = true;
  }
  return outside;
}

}  // namespace bitmask::testing
