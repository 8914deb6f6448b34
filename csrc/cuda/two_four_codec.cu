// 2:4 packed, unpacked and pruned, in one pass over memory: where values lie is known before anything is read.
//
//   metadata  [ byte | byte | ... ]                 two groups of four columns; byte i of a warp's share of a tile is lane i % 32's
//   dense     [ octet: 8 elements | ... ]           contiguous: bytes in order are elements in order
//   values    [ 4 elements | ... ]                  the same
//
// Rows are no border, but that the last byte of each has one group where cols % 8 is 4. All is done in registers: which elements are stored
// by comparisons without branches, and where memory is aligned, octets and their values go to and from it in vectors of up to 16 bytes.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>
#include <type_traits>

#include "codec_launch.cuh"
#include "codec_tile.cuh"
#include "kernels.h"

namespace bitmask::cuda {
namespace {

using namespace codec;

// ---------------------------------------------------------------------------------------------------------------- masks

// Of a byte of the mask, set bits of each nibble, in that nibble.
__device__ __forceinline__ uint32_t count_groups(uint32_t mask) {
  const uint32_t pairs = mask - (mask >> 1 & 0x55);
  return (pairs & 0x33) + (pairs >> 2 & 0x33);
}

// Whether a group has more than two bits set: adding 5 to 3 or 4 carries into the topmost bit.
__device__ __forceinline__ bool is_crowded(uint32_t mask) { return ((count_groups(mask) + 0x55) & 0x88) != 0; }

// Whether each group has two bits set, and where there is no second one, none.
__device__ __forceinline__ bool is_sound(uint32_t mask, bool whole) { return count_groups(mask) == (whole ? 0x22 : 0x02); }

// Of groups with at most two bits set, those with fewer mark zeros as well (FORMAT.md, rule 3): column 2 is always among them, and column 3
// where neither 0 nor 1 is.
__device__ __forceinline__ uint32_t complete(uint32_t mask, bool whole) {
  const uint32_t few = ~(count_groups(mask) >> 1) & (whole ? 0x11 : 0x01);
  const uint32_t neither = few & ~(mask | mask >> 1);
  return mask | few << 2 | neither << 3;
}

// ---------------------------------------------------------------------------------------------------------------- the largest two

template <int W>
using Key = std::conditional_t<W == 8, int64_t, int32_t>;
template <int W>
using Bits = std::make_unsigned_t<Key<W>>;

template <int W>
__device__ __forceinline__ Bits<W> bits_of(const Element<W>& element) {
  if constexpr (W == 8) {
    return static_cast<uint64_t>(element.y) << 32 | element.x;
  } else {
    return element;
  }
}

// Numbers that compare as the magnitudes of elements do; of zeros, the least.
template <int W>
__device__ __forceinline__ void keys_of(const Octet<W>& octet, uint32_t nonzero, Magnitude magnitude, Key<W> (&keys)[8]) {
  constexpr int kTop = 8 * sizeof(Key<W>) - 1, kBeyond = kTop + 1 - 8 * W;
  constexpr Bits<W> kLeast = Bits<W>{1} << kTop, kOthers = (Bits<W>{1} << (8 * W - 1)) - 1;  // all bits of an element but the sign
  const auto fill = [&](const auto& key_of) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      keys[e] = static_cast<Key<W>>((nonzero >> e & 1) != 0 ? key_of(bits_of<W>(get(octet, e))) : kLeast);
    }
  };
  switch (magnitude) {
    case Magnitude::kSigned:
      return fill([](Bits<W> bits) {
        const Key<W> number = static_cast<Key<W>>(bits << kBeyond) >> kBeyond;
        const Bits<W> negative = static_cast<Bits<W>>(number >> kTop);
        return (static_cast<Bits<W>>(number) ^ negative) - negative - 1;  // less one, so that the least number does not wrap around
      });
    case Magnitude::kSignMagnitude:
      return fill([](Bits<W> bits) { return bits & kOthers; });
    case Magnitude::kNoNegativeZero:
      return fill([](Bits<W> bits) { return (bits - 1) & kOthers; });
    default:
      return fill([](Bits<W> bits) { return bits ^ kLeast; });
  }
}

__device__ __forceinline__ bool two_of(bool a, bool b, bool c) { return (a && b) || (c && (a || b)); }

// The mask of the two largest magnitudes of each group, less those that are zero. Of equal ones the first come first. Each of the six pairs
// is compared once, the earlier one winning a tie; who wins at least two of three comparisons stays.
template <int W>
__device__ __forceinline__ uint32_t largest_two(const Octet<W>& octet, uint32_t nonzero, Magnitude magnitude) {
  Key<W> keys[8];
  keys_of(octet, nonzero, magnitude, keys);
  uint32_t mask = 0;
#pragma unroll
  for (int e = 0; e < 8; e += 4) {
    const bool over1 = keys[e] >= keys[e + 1], over2 = keys[e] >= keys[e + 2], over3 = keys[e] >= keys[e + 3];
    const bool second_over2 = keys[e + 1] >= keys[e + 2], second_over3 = keys[e + 1] >= keys[e + 3];
    const bool third_over3 = keys[e + 2] >= keys[e + 3];
    mask |= two_of(over1, over2, over3) ? 1u << e : 0;
    mask |= two_of(!over1, second_over2, second_over3) ? 2u << e : 0;
    mask |= two_of(!over2, !second_over2, third_over3) ? 4u << e : 0;
    mask |= two_of(!over3, !second_over3, !third_over3) ? 8u << e : 0;
  }
  return mask & nonzero;
}

// ---------------------------------------------------------------------------------------------------------------- memory

// Where the octet of a byte begins, and whether it has a second group. kTogether: elements that are aligned together; 8 means that all
// octets are whole and in vectors, 4 that groups are.
struct Place {
  int64_t element;
  bool whole;
};
template <int kTogether>
__device__ __forceinline__ Place place_of(const Bytes& bytes, int64_t byte) {
  if constexpr (kTogether == 8) {
    return {byte * 8, true};
  } else {
    const int64_t row = bytes.row_of(byte), column = (byte - row * bytes.row_bytes) * 8;
    return {row * bytes.cols + column, column + 8 <= bytes.cols};
  }
}

// The octets of a thread; what lies past the matrix is zero.
template <int W, int kTogether>
__device__ __forceinline__ void load_octets(const uint8_t* dense, const Tile<W>& tile, const Bytes& bytes, Octet<W> (&octets)[kBytes<W>]) {
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
    octets[i] = Octet<W>{};
    if (tile.byte(i) >= tile.count) continue;
    const Place place = place_of<kTogether>(bytes, tile.begin + tile.byte(i));
    load_vectors<kVectorBytes<W, kTogether>, 8 * W>(dense + place.element * W, place.whole, octets[i].words);
  }
}

// The lowest faulty row stays. Most of many find a lower one there already.
__device__ __forceinline__ void report(Fault* fault, int64_t faulty_row) {
  const Fault row = static_cast<Fault>(faulty_row);
  if (ptx::load_relaxed(reinterpret_cast<const uint64_t*>(fault)) > row) atomicMin(fault, row);
}

// ---------------------------------------------------------------------------------------------------------------- pack, prune
//
// A thread has 64 bytes of dense memory, as in codec.cu. The model, for an H100 (3.0 TB/s, 1.7 GHz), in elements per clock and
// multiprocessor; a copy of the dense bytes does 3.4 of 16 bits and 6.7 of 8. Instructions (SASS, sm_90a) are those of floats. Not timed.
//
//                      16 bits: memory   instructions   integer ones (64 lanes)      8 bits: memory   integer ones
//   pack, pruning       4.3 (3.125 B)     6.9 (18.5)     4.4 (14.7 an element)        8.2 (1.625 B)    4.4 (14.6)
//   pack                4.3              11   (11.5)     10                            8.2             8
//   unpack              4.3              12   (10.5)     11                            8.2             9
//   prune, in place     3.4 (4 B)         6.6 (19.5)     4.3 (15)                      6.7 (2 B)       4.2 (15)
//
// So all are bound by memory but those that compare 8-bit elements, which take 1.5 times as long as a copy. Of elements of 32 and 64 bits,
// half a sector of 32 bytes is written at a time.

struct PackParams {
  uint8_t* dense;  // written to by prune alone
  Bytes bytes;
  ZeroWords zero_test;
  Magnitude magnitude;
  bool prune;
  uint8_t* values;
  uint8_t* metadata;
  Fault* fault;
};

// W: bytes of an element.
template <int W, int kTogether>
__global__ void __launch_bounds__(kThreads) pack(const PackParams p) {
  const Tile<W> tile(blockIdx.x, p.bytes);
  Octet<W> octets[kBytes<W>];
  load_octets<W, kTogether>(p.dense, tile, p.bytes, octets);
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
    if (tile.byte(i) >= tile.count) continue;
    const int64_t byte = tile.begin + tile.byte(i);
    const Place place = place_of<kTogether>(p.bytes, byte);
    uint32_t mask = nonzero_bits(octets[i], p.zero_test);
    if (p.prune) {
      mask = largest_two(octets[i], mask, p.magnitude);
    } else if (is_crowded(mask)) {
      report(p.fault, p.bytes.row_of(byte));
    }
    const uint32_t stored = complete(mask, place.whole);
    p.metadata[byte] = static_cast<uint8_t>(stored);

    uint32_t values[W] = {};
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
      const auto is_stored = [&](int column) { return (stored >> (e + column) & 1) != 0; };
      const auto element = [&](int column) { return get(octets[i], e + column); };
      set<W>(values, e / 2, is_stored(0) ? element(0) : is_stored(1) ? element(1) : element(2));
      set<W>(values, e / 2 + 1, is_stored(3) ? element(3) : is_stored(2) ? element(2) : element(1));
    }
    store_vectors<kVectorBytes<W, kTogether / 2>, 4 * W>(values, place.whole, p.values + place.element / 2 * W);
  }
}

template <int W, int kTogether>
__global__ void __launch_bounds__(kThreads) prune(const PackParams p) {
  const Tile<W> tile(blockIdx.x, p.bytes);
  Octet<W> octets[kBytes<W>];
  load_octets<W, kTogether>(p.dense, tile, p.bytes, octets);
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
    if (tile.byte(i) >= tile.count) continue;
    const Place place = place_of<kTogether>(p.bytes, tile.begin + tile.byte(i));
    const uint32_t stored = complete(largest_two(octets[i], nonzero_bits(octets[i], p.zero_test), p.magnitude), place.whole);
    Octet<W> pruned{};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if ((stored >> e & 1) != 0) set(pruned, e, get(octets[i], e));
    }
    store_vectors<kVectorBytes<W, kTogether>, 8 * W>(pruned.words, place.whole, p.dense + place.element * W);
  }
}

// ---------------------------------------------------------------------------------------------------------------- unpack

// A part of a weight: pointers to its first row.
struct UnpackParams {
  const uint8_t* values;
  const uint8_t* metadata;
  Bytes bytes;
  int64_t first_row;  // in the weight
  uint8_t* dense;
  Fault* fault;
};

template <int W, int kTogether>
__global__ void __launch_bounds__(kThreads) unpack(const UnpackParams p) {
  const Tile<W> tile(blockIdx.x, p.bytes);
  uint32_t masks[kBytes<W>], values[kBytes<W>][W];
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
#pragma unroll
    for (uint32_t& word : values[i]) word = 0;
    if (tile.byte(i) >= tile.count) continue;
    const int64_t byte = tile.begin + tile.byte(i);
    const Place place = place_of<kTogether>(p.bytes, byte);
    masks[i] = p.metadata[byte];
    load_vectors<kVectorBytes<W, kTogether / 2>, 4 * W>(p.values + place.element / 2 * W, place.whole, values[i]);
  }
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
    if (tile.byte(i) >= tile.count) continue;
    const int64_t byte = tile.begin + tile.byte(i);
    const Place place = place_of<kTogether>(p.bytes, byte);
    if (!is_sound(masks[i], place.whole)) report(p.fault, p.first_row + p.bytes.row_of(byte));
    Octet<W> octet{};
#pragma unroll
    for (int e = 0; e < 8; e += 4) {
      const auto is_stored = [&](int column) { return (masks[i] >> (e + column) & 1) != 0; };
      const Element<W> first = get<W>(values[i], e / 2), second = get<W>(values[i], e / 2 + 1);
      if (is_stored(0)) set(octet, e, first);
      if (is_stored(1)) set(octet, e + 1, is_stored(0) ? second : first);
      if (is_stored(2)) set(octet, e + 2, is_stored(3) ? first : second);
      if (is_stored(3)) set(octet, e + 3, second);
    }
    store_vectors<kVectorBytes<W, kTogether>, 8 * W>(octet.words, place.whole, p.dense + place.element * W);
  }
}

// Only proves the metadata, kBytes<1> bytes a thread.
__global__ void __launch_bounds__(kThreads) prove(const UnpackParams p) {
  const Tile<1> tile(blockIdx.x, p.bytes);
  const bool gapless = p.bytes.cols % 8 == 0;
#pragma unroll
  for (int i = 0; i < kBytes<1>; ++i) {
    if (tile.byte(i) >= tile.count) continue;
    const int64_t byte = tile.begin + tile.byte(i);
    if (!is_sound(p.metadata[byte], gapless || place_of<1>(p.bytes, byte).whole)) report(p.fault, p.first_row + p.bytes.row_of(byte));
  }
}

// ---------------------------------------------------------------------------------------------------------------- launching

template <int W, typename Params>
cudaError_t launch_tiles(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  const int64_t tiles = quotient_up(p.bytes.count, kTileBytes<W>);
  return tiles > kMostTiles ? cudaErrorInvalidValue : launch_kernel(kernel, {tiles, kThreads}, stream, p);
}

// Launches the one of three kernels, for 8, 4 or 1 elements together, that the alignment of dense elements and values allows.
template <int W, typename Params>
cudaError_t launch_aligned(void (*octets)(Params), void (*groups)(Params), void (*elements)(Params), const Params& p, cudaStream_t stream) {
  if (!aligned(p.dense, W) || !aligned(p.values, W)) return cudaErrorInvalidValue;
  const bool whole = p.bytes.cols % 8 == 0 && aligned(p.dense, kVectorBytes<W, 8>) && aligned(p.values, kVectorBytes<W, 4>);
  const bool in_groups = aligned(p.dense, kVectorBytes<W, 4>) && aligned(p.values, kVectorBytes<W, 2>);
  return launch_tiles<W>(whole ? octets : in_groups ? groups : elements, p, stream);
}

cudaError_t set_sound(Fault* fault, cudaStream_t stream) { return cudaMemsetAsync(fault, 0xff, sizeof(*fault), stream); }

}  // namespace

cudaError_t pack_24(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, Magnitude magnitude, bool prune,
                    void* values, uint8_t* metadata, Fault* fault, cudaStream_t stream) {
  const cudaError_t set = set_sound(fault, stream);
  if (set != cudaSuccess || g.rows == 0 || g.cols == 0) return set;
  const PackParams p{static_cast<uint8_t*>(const_cast<void*>(dense)),
                     bytes_of(g),
                     words_of(zero_test),
                     magnitude,
                     prune,
                     static_cast<uint8_t*>(values),
                     metadata,
                     fault};
  return for_width<8>(width, [&](auto bytes) { return launch_aligned<bytes>(pack<bytes, 8>, pack<bytes, 4>, pack<bytes, 1>, p, stream); });
}

cudaError_t unpack_24(const TwoFourMatrix& w, int64_t begin, int64_t end, int width, void* dense, bool first, Fault* fault,
                      cudaStream_t stream) {
  if (first) {
    const cudaError_t set = set_sound(fault, stream);
    if (set != cudaSuccess) return set;
  }
  if (begin == end || w.cols == 0) return cudaSuccess;
  const UnpackParams p{dense == nullptr ? nullptr : static_cast<const uint8_t*>(w.values) + begin * (w.cols / 2) * width,
                       w.metadata + begin * bitmask_bytes(w.cols),
                       bytes_of({end - begin, w.cols}),
                       begin,
                       static_cast<uint8_t*>(dense),
                       fault};
  if (dense == nullptr) return launch_tiles<1>(prove, p, stream);
  return for_width<8>(width,
                      [&](auto bytes) { return launch_aligned<bytes>(unpack<bytes, 8>, unpack<bytes, 4>, unpack<bytes, 1>, p, stream); });
}

cudaError_t prune_24(void* dense, const Geometry& g, int width, const ZeroTest& zero_test, Magnitude magnitude, cudaStream_t stream) {
  if (g.rows == 0 || g.cols == 0) return cudaSuccess;
  const PackParams p{static_cast<uint8_t*>(dense), bytes_of(g), words_of(zero_test), magnitude, true, nullptr, nullptr, nullptr};
  return for_width<8>(width,
                      [&](auto bytes) { return launch_aligned<bytes>(prune<bytes, 8>, prune<bytes, 4>, prune<bytes, 1>, p, stream); });
}

}  // namespace bitmask::cuda
