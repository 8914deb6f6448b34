// What the kernels of codec.cu and two_four_codec.cu are made of: elements, tiles of a bitmask, and spans of elements on their way between
// global and shared memory.
#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "../layout.h"
#include "scan.cuh"

namespace bitmask::cuda::codec {

using scan::kLanes;
using scan::kThreads;

// ---------------------------------------------------------------------------------------------------------------- elements

// An element of W bytes.
template <int W>
struct ElementOf;
template <>
struct ElementOf<1> {
  using Type = uint8_t;
};
template <>
struct ElementOf<2> {
  using Type = uint16_t;
};
template <>
struct ElementOf<4> {
  using Type = uint32_t;
};
template <>
struct ElementOf<8> {
  using Type = uint2;
};
template <>
struct ElementOf<16> {
  using Type = uint4;
};
template <int W>
using Element = typename ElementOf<W>::Type;

// The 8 elements of a byte of the bitmask.
template <int W>
struct alignas(W == 1 ? 8 : 16) Octet {
  uint32_t words[2 * W];
};

// Element e of registers that elements of W bytes lie in one after the other.
template <int W>
__device__ __forceinline__ Element<W> get(const uint32_t* words, int e) {
  if constexpr (W == 16) {
    return make_uint4(words[4 * e], words[4 * e + 1], words[4 * e + 2], words[4 * e + 3]);
  } else if constexpr (W == 8) {
    return make_uint2(words[2 * e], words[2 * e + 1]);
  } else {
    return static_cast<Element<W>>(words[e * W / 4] >> (e * W % 4 * 8));
  }
}
template <int W>
__device__ __forceinline__ Element<W> get(const Octet<W>& octet, int e) {
  return get<W>(octet.words, e);
}

// Element e, which is zero so far, becomes `element`.
template <int W>
__device__ __forceinline__ void set(uint32_t* words, int e, const Element<W>& element) {
  if constexpr (W == 16) {
    words[4 * e] = element.x, words[4 * e + 1] = element.y;
    words[4 * e + 2] = element.z, words[4 * e + 3] = element.w;
  } else if constexpr (W == 8) {
    words[2 * e] = element.x, words[2 * e + 1] = element.y;
  } else {
    words[e * W / 4] |= static_cast<uint32_t>(element) << (e * W % 4 * 8);
  }
}
template <int W>
__device__ __forceinline__ void set(Octet<W>& octet, int e, const Element<W>& element) {
  set<W>(octet.words, e, element);
}

// ZeroTest, as words.
struct ZeroWords {
  uint32_t words[4];
};

// Bit e: element e is not zero.
template <int W>
__device__ __forceinline__ uint32_t nonzero_bits(const Octet<W>& octet, const ZeroWords& test) {
  uint32_t bits = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    uint32_t set = 0;
    if constexpr (W < 4) {
      const uint32_t mask = (1u << (8 * W)) - 1;
      set = octet.words[e * W / 4] & (test.words[0] & mask << (e * W % 4 * 8));
    } else {
#pragma unroll
      for (int i = 0; i < W / 4; ++i) set |= octet.words[e * W / 4 + i] & test.words[i];
    }
    bits |= set != 0 ? 1u << e : 0;
  }
  return bits;
}

// Bytes that registers and global memory, or shared and global memory, exchange at a time.
constexpr int kVector = 16;

// The same for elements of which so many are aligned together.
template <int W, int kElements>
constexpr int kVectorBytes = kElements < 1             ? W
                             : kElements * W < kVector ? kElements * W
                                                       : kVector;

// Reads kBytes bytes into registers that are zero, in vectors of V bytes; the second half only if it is `whole`.
template <int V, int kBytes>
__device__ __forceinline__ void load_vectors(const uint8_t* from, bool whole, uint32_t* words) {
#pragma unroll
  for (int i = 0; i < kBytes / V; ++i) {
    if (whole || i < kBytes / V / 2) set<V>(words, i, reinterpret_cast<const Element<V>*>(from)[i]);
  }
}

template <int V, int kBytes>
__device__ __forceinline__ void store_vectors(const uint32_t* words, bool whole, uint8_t* to) {
#pragma unroll
  for (int i = 0; i < kBytes / V; ++i) {
    if (whole || i < kBytes / V / 2) reinterpret_cast<Element<V>*>(to)[i] = get<V>(words, i);
  }
}

// ---------------------------------------------------------------------------------------------------------------- tiles

// Where the bytes of a bitmask lie in rows, and their elements in a contiguous matrix.
struct Bytes {
  int64_t rows, cols;
  int64_t row_bytes, count;
  uint64_t reciprocal;  // floor((2^64 - 1) / row_bytes): makes a multiplication of the division, which GPUs do slowly

  __device__ __forceinline__ int64_t row_of(int64_t byte) const {
    const int64_t row = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(byte), reciprocal));  // or one less than it should be
    return byte - row * row_bytes < row_bytes ? row : row + 1;
  }
  __device__ __forceinline__ int64_t column_of(int64_t byte) const { return (byte - row_of(byte) * row_bytes) * 8; }
  __device__ __forceinline__ int64_t elements_before(int64_t byte) const { return row_of(byte) * cols + column_of(byte); }
};

inline Bytes bytes_of(const Geometry& g) {
  const int64_t row_bytes = bitmask_bytes(g.cols);
  return {g.rows, g.cols, row_bytes, g.rows * row_bytes, row_bytes == 0 ? 0 : ~uint64_t{0} / static_cast<uint64_t>(row_bytes)};
}

// Bytes of a thread, for 64 bytes of dense memory (one octet, should that be larger). The model, for 16-bit elements half of which are
// stored, so that 3.125 bytes move for each, in elements per clock (1.7 GHz) and multiprocessor:
//
//   memory                         4.3 on an H100 (3.0 TB/s), 6.1 on an H200 (4.3 TB/s)
//   instructions (SASS, sm_90a)    7.3 compress (17.6 an element; 128 lanes), 8.5 decompress (15.1)
//   integer instructions           7.6 compress (8.4 an element; 64 lanes), 9.8 decompress (6.5)
//   shared memory and shuffles     8.7 (29 cycles for 256 elements; 15 of them move single ones, about two to a bank)
//
// A tile (8192 elements) lives 5500 clocks by estimate, mostly waiting: for its number, its elements or bytes, two looks back, its values.
// That is hidden by 5 blocks compressing (48 registers, 80 KB on their way), which memory takes 6700 clocks or more to feed, and by 8
// decompressing (32 registers). Wider tiles would look back less often, at the price of registers.
template <int W>
constexpr int kBytes = W < 8 ? 8 / W : 1;
template <int W>
constexpr int kTileBytes = kThreads * kBytes<W>;
constexpr int kLeastTileBytes = kThreads;

template <int W>
struct TileMemory {
  alignas(kVector) uint8_t elements[kTileBytes<W> * 8 * W + kVector];  // of values or dense; they begin in the first vector
  uint16_t in_share[kTileBytes<W>];                                    // bits set in the warp's share before each byte
  scan::Memory scan;

  // Bits set in the tile before a byte; after scan_bits().
  __device__ __forceinline__ uint32_t before(int byte) const {
    return scan.warp_before[static_cast<unsigned int>(byte) / (kLanes * kBytes<W>)] + in_share[byte];
  }
};

// A tile's bytes, and which of them are this thread's.
template <int W>
struct Tile {
  uint32_t index;
  int64_t begin;  // its first byte
  int count;      // of its bytes; the last tile may have fewer than the others
  bool last;

  __device__ __forceinline__ Tile(uint32_t tile, const Bytes& bytes)
      : index(tile),
        begin(int64_t{tile} * kTileBytes<W>),
        count(static_cast<int>(min(bytes.count - begin, int64_t{kTileBytes<W>}))),
        last(begin + count == bytes.count) {}

  // Byte i of this thread, counted from `begin`. May be past the last tile's end.
  __device__ __forceinline__ int byte(int i) const {
    const unsigned int thread = threadIdx.x;
    return static_cast<int>(thread / kLanes * (kLanes * kBytes<W>)+thread % kLanes) + i * kLanes;
  }
};

// Sums up the bits that are set, into `memory`: registers are short while a tile looks back.
template <int W>
__device__ __forceinline__ void scan_bits(const Tile<W>& tile, const uint32_t (&bits)[kBytes<W>], scan::Workspace workspace, int64_t start,
                                          TileMemory<W>& memory) {
  uint32_t before[kBytes<W>];
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) before[i] = static_cast<uint32_t>(__popc(bits[i]));
  const uint32_t warp_sum = scan::scan_warp(before);
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) memory.in_share[tile.byte(i)] = static_cast<uint16_t>(before[i]);
  scan::scan_tiles(workspace, tile.index, warp_sum, start, memory.scan);
}

// Calls visit(row, bits set before it) for each row whose first byte the tile has, a thread at a time.
template <int W, typename Visit>
__device__ __forceinline__ void for_each_row(const Tile<W>& tile, const Bytes& bytes, const TileMemory<W>& memory, const Visit& visit) {
#pragma unroll 1
  for (int64_t row = bytes.row_of(tile.begin + bytes.row_bytes - 1) + threadIdx.x; row < bytes.rows; row += kThreads) {
    const int64_t ahead = row * bytes.row_bytes - tile.begin;
    if (ahead >= kTileBytes<W>) break;
    visit(row, memory.scan.before + memory.before(static_cast<int>(ahead)));
  }
}

// ---------------------------------------------------------------------------------------------------------------- shared and global memory

// Elements of W bytes that lie in global memory one after the other, and whose copy in shared memory is as far from a boundary of 16 bytes.
template <int W>
struct Span {
  uint8_t* global;  // of the vector that the first element is in
  int first;        // in that vector
  int end;          // past the last element, counted like `first`

  static constexpr int kElements = kVector / W;  // of a vector

  // `count` elements from number `skip` on. Of `elements` that are constant copy_to() alone is of use.
  __device__ __forceinline__ Span(const void* elements, int64_t skip, int count) {
    uint8_t* const address = static_cast<uint8_t*>(const_cast<void*>(elements)) + skip * W;
    first = static_cast<int>(reinterpret_cast<uintptr_t>(address) % kVector) / W;
    end = first + count;
    global = address - first * W;
  }

  // The first element in shared memory.
  __device__ __forceinline__ Element<W>* in(uint8_t* shared) const { return reinterpret_cast<Element<W>*>(shared) + first; }

  // Calls whole(bytes from `global`) for each vector that is whole and one(element) for each element of the others. No thread has two of
  // these elements: their latencies would add up.
  template <typename Whole, typename One>
  __device__ __forceinline__ void for_each(const Whole& whole, const One& one) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int begin = (first + kElements - 1) / kElements, past = max(begin, end / kElements);  // whole vectors
#pragma unroll 1
    for (int vector = begin + thread; vector < past; vector += kThreads) whole(vector * kVector);
    if (thread < kElements) {
      if (thread >= first && thread < min(begin * kElements, end)) one(thread);
    } else if (thread < 2 * kElements) {
      const int element = (past - 1) * kElements + thread;
      if (element < end) one(element);
    }
  }

  // The block's copy into shared memory: begins. Is there after finish_copy().
  __device__ __forceinline__ void copy_to(uint8_t* shared) const {
    for_each([&](int at) { ptx::copy_async_16(shared + at, global + at); },
             [&](int i) { reinterpret_cast<Element<W>*>(shared)[i] = reinterpret_cast<const Element<W>*>(global)[i]; });
    ptx::copy_async_commit();
  }
  __device__ __forceinline__ static void finish_copy() {
    ptx::copy_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void copy_from(const uint8_t* shared) const {
    for_each([&](int at) { *reinterpret_cast<uint4*>(global + at) = *reinterpret_cast<const uint4*>(shared + at); },
             [&](int i) { reinterpret_cast<Element<W>*>(global)[i] = reinterpret_cast<const Element<W>*>(shared)[i]; });
  }
};

// The values of a tile, as far as the `size` values that there are reach.
template <int W>
__device__ __forceinline__ Span<W> values_of(const scan::Memory& scan, const void* values, int64_t size) {
  const int64_t first = min(scan.before, size);
  return Span<W>(values, first, static_cast<int>(min(int64_t{scan.sum}, size - first)));
}

// Where the values of each byte of this thread lie in shared memory.
template <int W>
__device__ __forceinline__ void find_values(const Span<W>& values, const Tile<W>& tile, TileMemory<W>& memory,
                                            Element<W>* (&places)[kBytes<W>]) {
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) places[i] = values.in(memory.elements) + memory.before(tile.byte(i));
}

// The elements of a tile in dense memory, for matrices whose octets are not all whole and aligned.
template <int W>
struct DenseTile {
  int64_t begin;  // the first element
  Span<W> span;

  __device__ __forceinline__ DenseTile(const void* dense, const Tile<W>& tile, const Bytes& bytes)
      : begin(bytes.elements_before(tile.begin)),
        span(dense, begin, static_cast<int>(bytes.elements_before(tile.begin + tile.count) - begin)) {}

  // Calls visit(e, element) for each element e of the octet of `byte`, its place being in shared memory.
  template <typename Visit>
  __device__ __forceinline__ void for_octet(uint8_t* shared, int64_t byte, const Bytes& bytes, const Visit& visit) const {
    const int64_t column = bytes.column_of(byte);
    const int count = static_cast<int>(min(int64_t{8}, bytes.cols - column));
    Element<W>* const elements = span.in(shared) + (bytes.row_of(byte) * bytes.cols + column - begin);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) visit(e, elements[e]);
    }
  }
};

}  // namespace bitmask::cuda::codec
