// The dtypes that products are of, as kernels meet them: stored, summed, and multiplied by tensor cores.
#pragma once

#include <ptx.cuh>

#include <cstdint>

#include "kernels.h"

namespace bitmask::cuda {

// Stored: how an element lies in memory. Sum: what products of them are summed in.
template <LinearDtype kDtype>
struct Element;

// One that is summed as it is.
template <typename Number>
struct WideElement {
  using Stored = Number;
  using Sum = Number;
  __device__ static Number widen(Number value) { return value; }
  __device__ static Number narrow(Number value) { return value; }
};

template <>
struct Element<kFloat32> : WideElement<float> {};

template <>
struct Element<kFloat64> : WideElement<double> {};

template <>
struct Element<kBfloat16> {
  using Stored = uint16_t;
  using Sum = float;
  __device__ static float widen(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __device__ static uint16_t narrow(float value) { return ptx::float_to_bfloat16(value); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bfloat16(d, a, b); }
  template <int kSelector>
  __device__ static void multiply_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t codes) {
    ptx::mma_sparse_bfloat16<kSelector>(d, a, b, codes);
  }
};

template <>
struct Element<kFloat16> {
  using Stored = uint16_t;
  using Sum = float;
  __device__ static float widen(uint16_t bits) { return ptx::half_to_float(bits); }
  __device__ static uint16_t narrow(float value) { return ptx::float_to_half(value); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_float16(d, a, b); }
  template <int kSelector>
  __device__ static void multiply_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t codes) {
    ptx::mma_sparse_float16<kSelector>(d, a, b, codes);
  }
};

// A NaN in every float dtype that has one; all bits but the sign.
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffff); }

}  // namespace bitmask::cuda
