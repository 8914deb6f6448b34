// Rows of a compressed W as operands of mma.m16n8k16, expanded in registers.
//
// The order of the columns is free in a dot product, so a lane takes the 4 columns that follow each other, 4t ... 4t + 3 of 16, for the
// pairs (2t, 2t + 1) and (2t + 8, 2t + 9) of the instruction: one nibble of the bitmask, and x is read as it lies.
//
//   bitmask, 64 columns of a row     word 0: steps 0, 1          word 1: steps 2, 3
//   lane t of the row                |t=0|t=1|t=2|t=3|t=0 ...    a step is 16 columns, one mma
//
// Let c be the number of values before column 4t + 1. A pair of columns is the pair of values (c - 1, c), masked: either column's value
// lies there if it has one. The pair of columns 4t + 2 and 4t + 3 lies 0, 1 or 2 values on. So 12 bytes, read as words of shared memory
// and shifted into place, hold what a lane needs, whatever the bits are: no lookup, no branch, one population count for 4 elements.
#pragma once

#include <ptx.cuh>

#include <cstdint>

namespace bitmask::cuda {

// The nibbles of a lane in 64 columns: byte i of each member is of step i.
struct Nibbles {
  uint32_t columns[4];  // byte i: its top bit is that of column 4t + (index) of the step
  uint32_t shift;       // byte i: bits from the first pair of values to the second
};

__device__ __forceinline__ Nibbles nibbles_of(uint32_t word0, uint32_t word1, int t) {
  const uint32_t turn = static_cast<uint32_t>(4 * t - 2);  // brings the nibbles to the bits 2 to 5 of the bytes 0 and 2
  const uint32_t bits = __byte_perm(__funnelshift_r(word0, word0, turn), __funnelshift_r(word1, word1, turn), 0x6420);
  return {{bits << 5, bits << 4, bits << 3, bits << 2}, ((bits & 0x08080808) << 1) + (bits & 0x10101010)};
}

// All bits of each half: is there an element in the columns `first` and first + 1?
template <int kStep>
__device__ __forceinline__ uint32_t pair_mask(const Nibbles& nibbles, int first) {
  constexpr uint32_t kSigns = (8 + kStep) * 0x11 + (12 + kStep) * 0x1100;
  return __byte_perm(nibbles.columns[first], nibbles.columns[first + 1], kSigns);
}

// The four elements of a lane in one step. `offset` is where in shared memory the value c - 1 lies.
template <int kStep>
__device__ __forceinline__ void expand(const uint8_t* shared, uint32_t offset, const Nibbles& nibbles, uint32_t* first, uint32_t* second) {
  const uint8_t* const words = shared + (offset & ~3u);
  const uint32_t w0 = *reinterpret_cast<const uint32_t*>(words), w1 = *reinterpret_cast<const uint32_t*>(words + 4);
  const uint32_t w2 = *reinterpret_cast<const uint32_t*>(words + 8);
  const uint32_t low = __funnelshift_r(w0, w1, 8 * offset), high = __funnelshift_r(w1, w2, 8 * offset);
  *first = low & pair_mask<kStep>(nibbles, 0);
  *second = __funnelshift_rc(low, high, nibbles.shift >> (8 * kStep) & 0xff) & pair_mask<kStep>(nibbles, 2);
}

}  // namespace bitmask::cuda
