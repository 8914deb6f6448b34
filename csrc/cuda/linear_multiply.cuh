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
  uint32_t reach;       // byte i: its top bit tells whether the values of the two pairs may reach into a third word
};

__device__ __forceinline__ Nibbles nibbles_of(uint32_t word0, uint32_t word1, int t) {
  const uint32_t turn = static_cast<uint32_t>(4 * t - 2);  // brings the nibbles to the bits 2 to 5 of the bytes 0 and 2
  const uint32_t bits = __byte_perm(__funnelshift_r(word0, word0, turn), __funnelshift_r(word1, word1, turn), 0x6420);
  // 0, 8, 16 or 24, then 8 more, and down to a multiple of 16: 16 for each of the two bits
  const uint32_t shift = ((bits & 0x18181818) + 0x08080808) & 0x30303030;
  return {{bits << 5, bits << 4, bits << 3, bits << 2}, shift, bits << 4 & bits << 3 & bits << 2};
}

// All ones in each half whose column, `first` or first + 1, has an element.
template <int kStep>
__device__ __forceinline__ uint32_t pair_mask(const Nibbles& nibbles, int first) {
  constexpr uint32_t kTopBits = (8 + kStep) * 0x11 + (12 + kStep) * 0x1100;
  return ptx::permute(nibbles.columns[first], nibbles.columns[first + 1], kTopBits);
}

// The four elements of a lane in one step. Value c - 1 is `place` bits past the beginning of `shared`.
template <int kStep>
__device__ __forceinline__ void expand(const uint32_t* shared, uint32_t place, const Nibbles& nibbles, uint32_t* first, uint32_t* second) {
  const uint32_t* const words = shared + place / 32;
  const uint32_t word1 = words[1];
  uint32_t word2 = word1;  // anything
  if ((nibbles.reach & 0x80u << 8 * kStep) != 0) word2 = words[2];
  const uint32_t low = __funnelshift_r(words[0], word1, place), high = __funnelshift_r(word1, word2, place);
  *first = low & pair_mask<kStep>(nibbles, 0);
  *second = __funnelshift_rc(low, high, __byte_perm(nibbles.shift, 0, 0x4440 + kStep)) & pair_mask<kStep>(nibbles, 2);
}

}  // namespace bitmask::cuda
