// The floating-point formats of the linear kernels, read and rounded in double precision: slow, and without a trick of bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace bitmask::testing {

struct Format {
  const char* name;
  int width;         // bytes
  int mantissa;      // bits, less the leading one
  int least;         // exponent of the smallest normal number
  int sum_mantissa;  // of the type that products are summed in

  uint64_t infinity() const { return (uint64_t{1} << (8 * width - 1)) - (uint64_t{1} << mantissa); }
  uint64_t sign() const { return uint64_t{1} << (8 * width - 1); }

  // The distance from `value` to the next larger number; that of subnormals below them.
  double step(double value) const {
    return std::ldexp(1, (value == 0 || std::ilogb(value) < least ? least : std::ilogb(value)) - mantissa);
  }

  double decode(uint64_t bits) const {
    const uint64_t magnitude = bits & ~sign();
    if (magnitude > infinity()) return NAN;
    const int exponent = static_cast<int>(magnitude >> mantissa);
    const double fraction = static_cast<double>(magnitude & ((uint64_t{1} << mantissa) - 1));
    const double leading = exponent == 0 ? 0 : std::ldexp(1, mantissa);
    const double value =
        magnitude == infinity() ? INFINITY : std::ldexp(leading + fraction, (exponent > 0 ? exponent - 1 : 0) + least - mantissa);
    return (bits & sign()) != 0 ? -value : value;
  }

  // Rounded to nearest, ties to even.
  uint64_t encode(double value) const {
    if (std::isnan(value)) return infinity() + (uint64_t{1} << (mantissa - 1));
    const uint64_t minus = std::signbit(value) ? sign() : 0;
    if (std::isinf(value)) return infinity() | minus;
    const int exponent = value == 0 || std::ilogb(value) < least ? least : std::ilogb(value);
    const uint64_t steps = static_cast<uint64_t>(std::nearbyint(std::ldexp(std::fabs(value), mantissa - exponent)));
    const bool fits = exponent - least < static_cast<int>(infinity() >> mantissa);
    const uint64_t magnitude = fits ? (static_cast<uint64_t>(exponent - least) << mantissa) + steps : infinity();
    return (magnitude < infinity() ? magnitude : infinity()) | minus;
  }

  uint64_t load(const uint8_t* src) const {
    uint64_t bits = 0;
    std::memcpy(&bits, src, static_cast<std::size_t>(width));
    return bits;
  }
  void store(uint64_t bits, uint8_t* dst) const { std::memcpy(dst, &bits, static_cast<std::size_t>(width)); }
};

// In the order of cpu::LinearDtype.
constexpr Format kFormats[] = {
    {"float32", 4, 23, -126, 23}, {"bfloat16", 2, 7, -126, 23}, {"float16", 2, 10, -14, 23}, {"float64", 8, 52, -1022, 52}};

}  // namespace bitmask::testing
