// What the kernels of every device need to know of a dtype: its width and its zero rule (FORMAT.md).
#pragma once

#include "checks.h"
#include "layout.h"
#include "tensors.h"

namespace bitmask {

// What the kernels need to know of a dtype.
struct Element {
  int32_t dtype;
  int width;  // bytes
  ZeroTest zero_test;
};

// A test that looks at all bits of an element but the sign bit of each of its `real_width`-byte numbers.
inline ZeroTest ignore_sign(int real_width) {
  ZeroTest test;
  for (int i = 0; i < 16; ++i) test.bytes[i] = i % real_width == real_width - 1 ? 0x7f : 0xff;
  return test;
}

inline ZeroTest test_all_bits() {
  ZeroTest test;
  for (uint8_t& byte : test.bytes) byte = 0xff;
  return test;
}

// The default zero rule of a dtype. The float8 *fnuz kinds have no -0.0 (its bits are NaN) and float8_e8m0fnu has no sign.
inline ZeroTest zero_test_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
      return ignore_sign(1);
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::ComplexHalf:
      return ignore_sign(2);
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return ignore_sign(4);
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return ignore_sign(8);
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e8m0fnu:
      return test_all_bits();
    default:
      fail("dtype: got torch scalar type ", static_cast<int>(type), ", expected bool, an integer, a float or a complex dtype");
  }
}

inline Element element_of(const Tensor& tensor, bool keep_negative_zero) {
  const int32_t dtype = dtype_of(tensor);
  const ZeroTest by_value = zero_test_of(static_cast<ScalarType>(dtype));
  return {dtype, static_cast<int>(aoti_torch_dtype_element_size(dtype)), keep_negative_zero ? test_all_bits() : by_value};
}

// How the magnitudes of a dtype compare that has a 2:4 layout: real ones that have a zero.
inline Magnitude magnitude_of(const char* name, int32_t dtype) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2:
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float:
    case ScalarType::Double:
      return Magnitude::kSignMagnitude;
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e5m2fnuz:
      return Magnitude::kNoNegativeZero;
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return Magnitude::kSigned;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::UInt16:
    case ScalarType::UInt32:
    case ScalarType::UInt64:
      return Magnitude::kUnsigned;
    default:
      fail(name, ": got torch scalar type ", dtype, ", expected bool, an integer or a real float dtype that has a zero");
  }
}

// Whether all bits set is NaN for every number of this dtype: so it is where numbers have a sign and infinities or NaNs by IEEE's rules.
inline bool all_ones_is_nan(const Element& element) {
  const ZeroTest by_value = zero_test_of(static_cast<ScalarType>(element.dtype));
  return by_value.bytes[element.width - 1] != 0xff;
}

// The one of four that belongs to a dtype, that of `name`, which has linear kernels.
template <typename T>
T by_linear_dtype(int32_t dtype, T float32, T bfloat16, T float16, T float64, const char* name = "values") {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::Float:
      return float32;
    case ScalarType::BFloat16:
      return bfloat16;
    case ScalarType::Half:
      return float16;
    case ScalarType::Double:
      return float64;
    default:
      fail(name, ": got torch scalar type ", dtype, ", expected float32, bfloat16, float16 or float64");
  }
}

}  // namespace bitmask
