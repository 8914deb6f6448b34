// How codecs are launched: grids, alignment, the kernel for a width of elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "codec_tile.cuh"
#include "launch.cuh"

namespace bitmask::cuda::codec {

constexpr int64_t kMostTiles = 0x7fffffff;  // blocks of a grid

constexpr int64_t quotient_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Calls run(std::integral_constant<int, W>) with the width that W is to be, at most kWidest.
template <int kWidest, typename Run>
cudaError_t for_width(int width, const Run& run) {
  switch (width) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 8:
      return run(std::integral_constant<int, 8>{});
    case 16:
      if constexpr (kWidest >= 16) return run(std::integral_constant<int, 16>{});
      [[fallthrough]];
    default:
      return cudaErrorInvalidValue;
  }
}

inline ZeroWords words_of(const ZeroTest& test) {
  ZeroWords words;
  std::memcpy(words.words, test.bytes, sizeof(words.words));
  return words;
}

}  // namespace bitmask::cuda::codec
