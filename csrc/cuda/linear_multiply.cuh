// Rows of a compressed W: copied to shared memory a stage at a time, and expanded there into operands of mma.m16n8k16.
//
// The order of the columns is free in a dot product, so a lane takes the 4 columns that follow each other, 4t ... 4t + 3 of 16, for the
// pairs (2t, 2t + 1) and (2t + 8, 2t + 9) of the instruction: one nibble of the bitmask, and x is read as it lies.
//
//   bitmask, 64 columns of a row     word 0: steps 0, 1          word 1: steps 2, 3
//   lane t of the row                |t=0|t=1|t=2|t=3|t=0 ...    a step is 16 columns, one mma
//
// Let c be the number of values before column 4t + 1. A pair of columns is the pair of values (c - 1, c), masked: either column's value
// lies there if it has one. The pair of columns 4t + 2 and 4t + 3 lies 0, 1 or 2 values on. So three words of shared memory, shifted into
// place, hold what a lane needs, whatever the bits are: no lookup, no branch, one population count for 4 elements.
#pragma once

#include <ptx.cuh>

#include <cstdint>

namespace bitmask::cuda {

constexpr int kWidth = 2;  // bytes of an element
constexpr int kStageColumns = 128;
constexpr int kStageBytes = kStageColumns / 8;  // of a row's bitmask
constexpr int kStageWords = kStageColumns / 32;

// ---------------------------------------------------------------------------------------------------------------- copying

// An array that is copied in pieces of 16 bytes, aligned. Places are bytes from the first piece that is whole.
struct Pieces {
  uintptr_t base;
  int64_t begin, end;  // of the array: up to 15 bytes are before its first whole piece
  int64_t inner;       // places, from 0 on, after which there are at least as many bytes as are copied at a time
};

// `run`: bytes that are copied at a time.
inline Pieces pieces_of(const void* array, int64_t bytes, int64_t run) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(array), base = (begin + 15) / 16 * 16;
  const int64_t before = static_cast<int64_t>(base - begin), inner = bytes - before - run + 1;
  return {base, -before, bytes - before, inner < 0 ? 0 : inner};
}

// Is all that is copied at a time, from `place` on, in the array?
__device__ __forceinline__ bool inside(const Pieces& array, int64_t place) {
  return static_cast<uint64_t>(place) < static_cast<uint64_t>(array.inner);
}

__device__ __forceinline__ const uint8_t* address(const Pieces& array, int64_t place) {
  return reinterpret_cast<const uint8_t*>(array.base + static_cast<uintptr_t>(place));
}

// Brings what the array has of the piece at `place`.
__device__ __forceinline__ void copy_edge(uint8_t* shared, const Pieces& array, int64_t place) {
  if (place >= array.begin && place < array.end) {
    ptx::copy_async_16(shared, address(array, place), static_cast<int>(array.end - place < 16 ? array.end - place : 16));
  } else {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      if (place + i >= array.begin && place + i < array.end) shared[i] = *address(array, place + i);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- a stage of a row

constexpr int kSlotBytes = kStageColumns * kWidth + 16;  // of a row's values
constexpr int kBitsBytes = 48;                           // of a row's bitmask: 32 are used

// A row of W as each of the four lanes that read it sees it.
struct Row {
  int64_t place;  // in values, of the first one of the stage
  int bytes;      // of the values of the stage
  uint32_t bits[kStageWords];
  uint32_t origin;  // of the value before the first one: bytes from the beginning of shared memory
};

// The bits of a stage, which begin `skew` bytes past the beginning of the slot. `columns` are left in the row.
__device__ __forceinline__ void read_bits(const uint8_t* slot, uint32_t skew, int64_t columns, uint32_t (&bits)[kStageWords]) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(slot + (skew & 12));
#pragma unroll
  for (int i = 0; i < kStageWords; ++i) bits[i] = __funnelshift_r(words[i], words[i + 1], 8 * skew);
  if (columns >= kStageColumns) return;
#pragma unroll
  for (int i = 0; i < kStageWords; ++i) {
    const int used = static_cast<int>(columns) - 32 * i;
    bits[i] = used <= 0 ? 0 : used < 32 ? bits[i] & ((1u << used) - 1) : bits[i];
  }
}

// Asks for the values of a row's stage, whose bits are known; lane t takes every fourth piece. `slot`: where they go, from the beginning of
// shared memory. They begin in its first 16 bytes, as far from its start as they are from a multiple of 16 in global memory.
__device__ __forceinline__ void copy_values(const Pieces& values, Row& row, int t, uint8_t* shared, uint32_t slot) {
  const int skew = static_cast<int>(row.place & 15);
  const int64_t first = row.place & ~int64_t{15};
  row.bytes = kWidth * (__popc(row.bits[0]) + __popc(row.bits[1]) + __popc(row.bits[2]) + __popc(row.bits[3]));
  row.origin = slot + static_cast<uint32_t>(skew - kWidth);
  const int left = skew + row.bytes - 16 * t;
  uint8_t* const dst = shared + slot + 16 * t;
  if (inside(values, first)) {
    const uint8_t* const src = address(values, first + 16 * t);
#pragma unroll
    for (int i = 0; i < kSlotBytes; i += 64) {
      if (i < left) ptx::copy_async_16(dst + i, src + i);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < left; i += 64) copy_edge(dst + i, values, first + 16 * t + i);
  }
}

// ---------------------------------------------------------------------------------------------------------------- expanding

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

// The four elements of a lane in one step. Value c - 1 is `place` bytes past the beginning of `shared`.
template <int kStep>
__device__ __forceinline__ void expand(const uint8_t* shared, uint32_t place, const Nibbles& nibbles, uint32_t* first, uint32_t* second) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(shared + (place & ~3u));
  const uint32_t word1 = words[1];
  uint32_t word2 = word1;  // anything
  if ((nibbles.reach & 0x80u << 8 * kStep) != 0) word2 = words[2];
  const uint32_t low = __funnelshift_r(words[0], word1, 8 * place), high = __funnelshift_r(word1, word2, 8 * place);
  *first = low & pair_mask<kStep>(nibbles, 0);
  *second = __funnelshift_rc(low, high, __byte_perm(nibbles.shift, 0, 0x4440 + kStep)) & pair_mask<kStep>(nibbles, 2);
}

}  // namespace bitmask::cuda
