// y = x W^T + bias for few rows of x: bound by the bytes of W, and next to that by how many instructions expand an element.
//
//   block   some rows of W, two side by side; they share what is read of x
//   unit    1024 columns of such a pair: one word of each bitmask a lane. The units of a block are dealt to its warps in order, so that
//           each warp reads two streams of values, ahead by a stage of shared memory
//   step    128 columns of a unit: lane l takes columns 4l ... 4l + 3, so that the values of a warp lie next to each other, in banks of
//           shared memory that do not conflict
//
// Where a unit begins among the values is known from the bitmask of the row before it, which a warp that starts inside of a row counts.
// Sums are kept by lane, added up by warp, then by block in the order of the units: they depend on the sizes alone. Elements that are not
// stored are multiplied as zeros, as in a dense product. Nothing in W is trusted: see Reader.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <ptx.cuh>
#include <type_traits>

#include "kernels.h"
#include "launch.cuh"

namespace bitmask::cuda {
namespace {

constexpr int kLanes = 32;
constexpr unsigned int kAllLanes = 0xffffffff;
constexpr int kPair = 2;             // rows of W side by side
constexpr int kUnitColumns = 1024;   // 32 lanes of 32 bits
constexpr int kStepColumns = 128;    // 32 lanes of 4 bits
constexpr int kStages = 2;           // units of a warp that are in shared memory
constexpr int kMostWarps = 16;       // of a block
constexpr int kMostBlockRows = 512;  // of W
constexpr int64_t kMostStreamColumns = INT32_MAX - kUnitColumns;
constexpr int kMostProductRows = 4;     // of x that one launch takes
constexpr int64_t kSparseElements = 4;  // for each value, from which on bits are looked for instead of at

// ---------------------------------------------------------------------------------------------------------------- elements

// The products of 16-bit elements are those of tensor cores, which cost no conversion: row g of A is what the lanes 4g ... 4g + 3 have of
// one row of W, row g + 8 what they have of the other, and column g of B what they have of x. So element (g, g) of the product is a sum
// that is wanted, and so is (g + 8, g); the others are left alone.
struct Element16 {
  using Bits = uint16_t;
  using X = uint2;                 // 4 elements of x
  static constexpr int kBias = 2;  // bytes by which a place in a stage is less than where the value is

  struct Four {
    uint32_t pairs[2];
  };

  // The elements of a lane in one step. Let c be the number of values before its second column: the first two columns are the values
  // (c - 1, c), masked, since either column's value is there if it has one; the other two lie 0, 1 or 2 values on.
  static __device__ __forceinline__ Four expand(const uint8_t* values, uint32_t entry, int quarter) {
    const uint32_t bits = entry >> (4 * quarter) & 15;
    const uint32_t place = (entry >> 16) + 2 * __popc(entry & ((2u << (4 * quarter)) - 1));
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(values + (place & ~3u));
    const uint32_t low = __funnelshift_r(words[0], words[1], 8 * place), high = __funnelshift_r(words[1], words[2], 8 * place);
    const uint32_t tops = bits * 0x10204080;                  // the top bit of byte i is bit i
    const uint32_t further = ((4 * bits & 0x18) + 8) & 0x30;  // 16 bits for each of the middle columns' values
    return {{low & ptx::permute(tops, 0, 0x9988), __funnelshift_rc(low, high, further) & ptx::permute(tops, 0, 0xbbaa)}};
  }

  static __device__ __forceinline__ float own(const float (&sums)[4], int row, int lane) {
    const float sum = (lane >> 2 & 1) != 0 ? sums[2 * row + 1] : sums[2 * row];
    return lane % 4 == lane / 8 ? sum : 0;
  }
};

struct Bfloat16 : Element16 {
  static __device__ __forceinline__ float widen(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
  static __device__ __forceinline__ uint16_t narrow(float value) { return ptx::float_to_bfloat16(value); }
  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const Four& a, const Four& b, uint2 x) {
    ptx::mma_bfloat16(sums, {a.pairs[0], b.pairs[0], a.pairs[1], b.pairs[1]}, {x.x, x.y});
  }
};

struct Float16 : Element16 {
  static __device__ __forceinline__ float widen(uint16_t bits) { return ptx::half_to_float(bits); }
  static __device__ __forceinline__ uint16_t narrow(float value) { return ptx::float_to_half(value); }
  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const Four& a, const Four& b, uint2 x) {
    ptx::mma_float16(sums, {a.pairs[0], b.pairs[0], a.pairs[1], b.pairs[1]}, {x.x, x.y});
  }
};

struct Float32 {
  using Bits = float;
  using X = float4;
  static constexpr int kBias = 0;

  struct Four {
    float v[4];
  };

  static __device__ __forceinline__ float widen(float value) { return value; }
  static __device__ __forceinline__ float narrow(float value) { return value; }

  static __device__ __forceinline__ Four expand(const uint8_t* values, uint32_t entry, int quarter) {
    const uint32_t bits = entry >> (4 * quarter);
    const float* next = reinterpret_cast<const float*>(values + (entry >> 16)) + __popc(entry & ((1u << (4 * quarter)) - 1));
    Four four{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((bits >> i & 1) != 0) four.v[i] = *next++;
    }
    return four;
  }

  static __device__ __forceinline__ void multiply_add(float (&sums)[4], const Four& a, const Four& b, const float4& x) {
    const float operand[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[0] = fmaf(a.v[i], operand[i], sums[0]);
      sums[1] = fmaf(b.v[i], operand[i], sums[1]);
    }
  }

  static __device__ __forceinline__ float own(const float (&sums)[4], int row, int) { return sums[row]; }
};

// ---------------------------------------------------------------------------------------------------------------- shared memory

// What a warp has of one unit.
template <class Element>
struct Stage {
  static constexpr int kFront = 16;  // bytes before the values, which are as far from a multiple of 16 as in global memory
  static constexpr int kBytes = kFront + 16 + kUnitColumns * int{sizeof(typename Element::Bits)} + 16;

  uint8_t values[kPair][kBytes];
  // Looking at bits: 16 columns of both rows in each half, their bits below the place of their first value. Looking for bits: the columns
  // of a lane, {bits, place} of both rows.
  uint4 entries[kLanes];
  uint32_t faulty;  // bit r: row r of the pair
};

// kRows  rows of x
template <int kRows>
struct Sums {
  float parts[kMostBlockRows / kPair + kMostWarps][kPair][kRows];  // of warps: a warp's part of a pair at the sum of their numbers
  float rows[kMostBlockRows * kRows];                              // of the ranges of columns so far
};

// What the kernel is told.
struct Stream {
  BitmaskMatrix w;
  const void* x;
  const void* bias;
  void* y;
  int m;
  int row_bytes;    // of the bitmask
  int block_rows;   // of W
  int units;        // of a pair
  int range_units;  // of which x is in shared memory at a time
  bool words;       // bitmask rows are aligned to words
  bool sparse;      // bits are looked for, not at
};

// The rows of W and the columns that a block is at.
struct Range {
  int64_t first_row;
  int rows;
  int first_unit, units;  // of each pair
  int warp_units;         // that a warp takes, of all pairs

  __device__ __forceinline__ int pairs() const { return (rows + 1) / kPair; }
};

// A unit of a block, by its pair of rows and its number in these.
struct Place {
  int pair, unit;
};

// ---------------------------------------------------------------------------------------------------------------- reading W

// Up to four bytes of a bitmask row that may begin anywhere.
__device__ __forceinline__ uint32_t load_bytes(const uint8_t* bits, int count) {
  uint32_t word = 0;
#pragma unroll 1
  for (int i = 0; i < 4 && i < count; ++i) word |= uint32_t{bits[i]} << (8 * i);
  return word;
}

// What the reading of a unit waits for longest, asked for a unit before.
struct Request {
  uint32_t words[kPair];       // the lane's columns
  int64_t offsets[kPair + 1];  // where the values of both rows begin and end, if the unit is the first of them that the warp reads
};

// A warp's way through its units, ahead of the products. Each row is proven as it is read: its offsets lie in order inside of the values,
// its bits never need more values than there are between them, and in the end as many. From where that fails it has no bits, and is faulty.
template <class Element, bool kSparse>
struct Reader {
  static constexpr int kWidth = sizeof(typename Element::Bits);

  const Stream& p;
  const Range& range;
  const uint8_t* bits;  // of the block's first row
  int lane;
  uintptr_t pieces[kPair];  // address of 16 bytes for each lane, of which the first begin at or before the next value
  int past[kPair];          // bytes from there to it
  int left[kPair];          // values, to the end of the row
  uint32_t faulty;          // bit r: row r of the pair
  bool inner;               // bit r: so are the pieces of 16 bytes that hold any of its values

  __device__ __forceinline__ Reader(const Stream& params, const Range& of_block)
      : p(params),
        range(of_block),
        bits(params.w.bitmasks + of_block.first_row * params.row_bytes),
        lane(static_cast<int>(threadIdx.x) % kLanes),
        pieces{},
        past{},
        left{},
        faulty(0),
        inner(false) {}

  // The lane's columns of a row of the block and of the next one, or of that one twice; zeros past their end.
  __device__ __forceinline__ void load_words(int row, int unit, uint32_t (&words)[kPair]) const {
    const int at = kUnitColumns / 8 * unit + 4 * lane;
    words[0] = words[1] = 0;
    if (at >= p.row_bytes) return;
    const uint64_t row_bytes = static_cast<uint32_t>(p.row_bytes);
    const uint8_t* const first = bits + static_cast<uint32_t>(row) * row_bytes + at;
    const uint8_t* const second = first + (row + 1 < range.rows ? p.row_bytes : 0);
    if (p.words) {
      words[0] = __ldg(reinterpret_cast<const uint32_t*>(first));
      words[1] = __ldg(reinterpret_cast<const uint32_t*>(second));
    } else {
      words[0] = load_bytes(first, p.row_bytes - at);
      words[1] = load_bytes(second, p.row_bytes - at);
    }
  }

  // A pair that lacks its second row has the first one twice, until it is read.
  __device__ __forceinline__ Request request(Place place, bool opens) const {
    Request request{};
    const int row = kPair * place.pair;
    load_words(row, place.unit, request.words);
    if (!opens) return request;
    const int64_t* const offsets = p.w.row_offsets + range.first_row + row;
#pragma unroll
    for (int r = 0; r <= kPair; ++r) {
      if (row + r <= range.rows) request.offsets[r] = range.first_row + row + r < p.w.rows ? offsets[r] : p.w.nnz;
    }
    return request;
  }

  // Begins a pair of rows, at its first unit or at another one.
  __device__ __forceinline__ void open(Place place, const Request& request) {
    faulty = 0;
    inner = true;
    uint32_t counts[kPair] = {};  // of the units before
    for (int unit = 0; unit < place.unit; ++unit) {
      uint32_t words[kPair];
      load_words(kPair * place.pair, unit, words);
      counts[0] += __popc(words[0]);
      counts[1] += __popc(words[1]);
    }
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      const int row = kPair * place.pair + r;
      const int64_t begin = request.offsets[r], end = row < range.rows ? request.offsets[r + 1] : begin;
      const bool first = row == 0 && range.first_row == 0;
      bool possible = begin >= 0 && begin <= end && end <= p.w.nnz && end - begin <= p.w.cols && !(first && begin != 0);
      left[r] = possible ? static_cast<int>(end - begin) : 0;
      const uint32_t before = r == 0 || row < range.rows ? __reduce_add_sync(kAllLanes, counts[r]) : 0;
      if (static_cast<int>(before) > left[r]) possible = false;
      left[r] = possible ? left[r] - static_cast<int>(before) : 0;
      const int64_t next = possible ? begin + before : 0;
      const uintptr_t source = reinterpret_cast<uintptr_t>(p.w.values) + static_cast<uintptr_t>(next * kWidth);
      past[r] = static_cast<int>(source % 16);
      pieces[r] = source - static_cast<uintptr_t>(past[r]) + 16 * static_cast<uintptr_t>(lane);
      const int64_t bytes = past[r] + int64_t{left[r]} * kWidth;
      inner &= next * kWidth >= past[r] && next * kWidth - past[r] + (bytes + 15) / 16 * 16 <= p.w.nnz * kWidth;
      if (!possible) faulty |= 1u << r;
    }
  }

  // Copies the next values of both rows; `stage` is 16 bytes further on for each lane, so that every address is a constant away from it.
  __device__ __forceinline__ void copy(const int (&count)[kPair], Stage<Element>& stage) {
    constexpr int kPieces = (kUnitColumns * kWidth + 16) / 16;
    if (inner) {
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        const int bytes = past[r] + count[r] * kWidth - 16 * lane;
#pragma unroll
        for (int i = 0; i < kPieces; i += kLanes) {
          if (bytes > 16 * i)
            ptx::copy_async_16(stage.values[r] + Stage<Element>::kFront + 16 * i, reinterpret_cast<const uint8_t*>(pieces[r]) + 16 * i);
        }
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < kPair; ++r)
        copy_elements(r == 0 ? past[0] : past[1], r == 0 ? count[0] : count[1], r == 0 ? pieces[0] : pieces[1], stage.values[r]);
    }
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      const uint32_t end = static_cast<uint32_t>(past[r] + count[r] * kWidth);
      pieces[r] += end & ~15u;
      past[r] = static_cast<int>(end & 15);
      left[r] -= count[r];
    }
  }

  __device__ __forceinline__ void copy_elements(int skipped, int count, uintptr_t source, uint8_t* target) const {
    using Bits = typename Element::Bits;
#pragma unroll 1
    for (int i = lane; i < count; i += kLanes) {
      const int at = skipped + i * kWidth - 16 * lane;
      *reinterpret_cast<Bits*>(target + Stage<Element>::kFront + at) = *reinterpret_cast<const Bits*>(source + static_cast<uintptr_t>(at));
    }
  }

  // The bits of a lane past the last column.
  __device__ __forceinline__ uint32_t padding(int unit) const {
    const int columns = static_cast<int>(p.w.cols - int64_t{kUnitColumns} * unit) - kLanes * lane;
    return columns >= kLanes ? 0 : columns <= 0 ? ~0u : ~0u << columns;
  }

  // Proves a unit and fills its stage.
  __device__ __forceinline__ void read(Place place, bool opens, Request request, Stage<Element>& stage) {
    if (opens) open(place, request);
    if (kPair * place.pair + 1 >= range.rows) request.words[1] = 0;
    const uint32_t counts = __popc(request.words[0]) | __popc(request.words[1]) << 16;
    uint32_t through = counts;
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, through, distance);
      if (lane >= distance) through += below;
    }
    const uint32_t total = __shfl_sync(kAllLanes, through, kLanes - 1);
    int count[kPair] = {static_cast<int>(total & 0xffff), static_cast<int>(total >> 16)};
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      if (count[r] > left[r]) faulty |= 1u << r;
    }
    if (place.unit == p.units - 1) {
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        if (count[r] != left[r] || __any_sync(kAllLanes, (request.words[r] & padding(place.unit)) != 0)) faulty |= 1u << r;
      }
    }
    if (faulty != 0) {
#pragma unroll
      for (int r = 0; r < kPair; ++r) {
        if ((faulty >> r & 1) == 0) continue;
        request.words[r] = 0;
        count[r] = 0;
      }
    }
    uint32_t entries[kPair][2];
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      const uint32_t bits = request.words[r];
      const uint32_t before =
          ((through - counts) >> (16 * r) & 0xffff) * kWidth + static_cast<uint32_t>(Stage<Element>::kFront + past[r] - Element::kBias);
      entries[r][0] = kSparse ? bits : (bits & 0xffff) | before << 16;
      entries[r][1] = kSparse ? before : bits >> 16 | (before + kWidth * __popc(bits & 0xffff)) << 16;
    }
    copy(count, stage);
    stage.entries[0] = kSparse ? uint4{entries[0][0], entries[0][1], entries[1][0], entries[1][1]}
                               : uint4{entries[0][0], entries[1][0], entries[0][1], entries[1][1]};
    if (lane == 0) stage.faulty = faulty;
  }
};

// ---------------------------------------------------------------------------------------------------------------- x

// Has x no infinity and no NaN in these columns? Only then can products with zeros be left out.
template <class Element>
__device__ bool all_finite(const Stream& p, const Range& range) {
  const int64_t begin = int64_t{range.first_unit} * kUnitColumns, end = min(begin + int64_t{range.units} * kUnitColumns, p.w.cols);
  bool finite = true;
  for (int i = 0; i < p.m; ++i) {
    const typename Element::Bits* const row = static_cast<const typename Element::Bits*>(p.x) + i * p.w.cols;
    for (int64_t col = begin + threadIdx.x; col < end; col += blockDim.x) finite &= fabsf(Element::widen(row[col])) <= 3.40282347e38f;
  }
  return __syncthreads_and(finite) != 0;
}

// The columns of the range, padded with zeros to whole units: [kRows][units][columns], or where bits are looked for, in float,
// [kRows][units][bit, the last one first][lane].
template <class Element, int kRows, bool kSparse>
__device__ __forceinline__ void fill_x(const Stream& p, const Range& range, void* x) {
  using Bits = typename Element::Bits;
  const int columns = range.units * kUnitColumns;
  const int64_t begin = int64_t{range.first_unit} * kUnitColumns;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const Bits* const row = static_cast<const Bits*>(p.x) + i * p.w.cols + begin;
#pragma unroll 4
    for (int at = static_cast<int>(threadIdx.x); at < columns; at += static_cast<int>(blockDim.x)) {
      const int col = kSparse ? at / kUnitColumns * kUnitColumns + at % kLanes * kLanes + 31 - at % kUnitColumns / kLanes : at;
      const Bits bits = i < p.m && begin + col < p.w.cols ? row[col] : Bits{0};
      if constexpr (kSparse) {
        static_cast<float*>(x)[i * columns + at] = Element::widen(bits);
      } else {
        static_cast<Bits*>(x)[i * columns + at] = bits;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- products

// What it costs (m = 1, 16 bits, sm_90a, counted in the machine code and not measured), for 32 elements, of which memory delivers the bytes
// in 2.7 cycles (H100) or 1.9 (H200) at 50%, 0.8 or 0.5 at 90%:
//
//                           instructions            cycles of shared memory
//   reading a unit          3.6, and 0.3 to 1.1     0.6
//                           for rows that begin
//   looking at bits         6.6                     1.4: 3 words of values for 4 elements, entries and x half of the time
//   looking for bits        2.7 at 90%, 5.5 at 70%  0.5 at 90%, 1.6 at 70%: a value and an x for each step of the fullest lane
//
// A multiprocessor issues 4 instructions a cycle. So at 50% it just keeps up with the memory of an H100; on an H200, and with sparser
// weights, instructions are the limit. Both ways cost the same at about 70%.

// A unit by looking at its bits. x is the lane's columns of the first step, rows of x being x_stride apart.
template <class Element, int kRows>
__device__ __forceinline__ void multiply_all(const Stage<Element>& stage, const typename Element::Bits* x, int x_stride, int lane,
                                             float (&sums)[kRows][4]) {
  const uint2* const entries = reinterpret_cast<const uint2*>(stage.entries) + lane / 4;
#pragma unroll
  for (int step = 0; step < kUnitColumns / kStepColumns; ++step) {
    const uint2 entry = entries[step * (kStepColumns / 16)];
    const typename Element::Four a = Element::expand(stage.values[0], entry.x, lane % 4);
    const typename Element::Four b = Element::expand(stage.values[1], entry.y, lane % 4);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const typename Element::Bits* const operand = x + i * x_stride + step * kStepColumns;
      Element::multiply_add(sums[i], a, b, *reinterpret_cast<const typename Element::X*>(operand));
    }
  }
}

// A unit by looking for the bits that are set, those of both rows by turns: each lane in 32 columns, for which x, 32 elements
// apart, lies in its own bank. A
// lane that is done goes on with the others, without adding; what it reads then is a few values further on in the stage.
template <class Element, int kRows>
__device__ __forceinline__ void multiply_set(const Stage<Element>& stage, const float* x, int x_stride, int lane, float (&sums)[kRows][4]) {
  using Bits = typename Element::Bits;
  const uint4 entry = stage.entries[lane];
  uint32_t bits[kPair] = {__brev(entry.x), __brev(entry.z)};
  const uint8_t* const next[kPair] = {stage.values[0] + entry.y + Element::kBias, stage.values[1] + entry.w + Element::kBias};
  const int most = static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<uint32_t>(max(__popc(bits[0]), __popc(bits[1])))));
#pragma unroll 4
  for (int step = 0; step < most; ++step) {
#pragma unroll
    for (int r = 0; r < kPair; ++r) {
      const bool any = bits[r] != 0;
      const uint32_t bit = static_cast<uint32_t>(31 - __clz(static_cast<int>(bits[r]))) % 32;
      bits[r] &= ~(1u << bit);
      const float value = Element::widen(reinterpret_cast<const Bits*>(next[r])[step]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float operand = x[i * x_stride + static_cast<int>(bit) * kLanes];
        if (any) sums[i][r] = fmaf(value, operand, sums[i][r]);
      }
    }
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// One warp's share of a range of columns. x is what multiply_all or multiply_set wants.
template <class Element, int kRows, bool kSparse>
__device__ __forceinline__ void stream_units(const Stream& p, const Range& range, Stage<Element>* stages, void* x, Sums<kRows>& shared) {
  using X = std::conditional_t<kSparse, float, typename Element::Bits>;
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const int begin = warp * range.warp_units, end = min(begin + range.warp_units, range.pairs() * range.units);
  const int last_unit = range.first_unit + range.units - 1;
  const auto advance = [&](Place& place) {
    if (place.unit++ == last_unit) place = {place.pair + 1, range.first_unit};
  };
  Place here{begin / range.units, range.first_unit + begin % range.units}, ahead = here;
  Reader<Element, kSparse> reader(p, range);
  Stage<Element>* const filled_first = reinterpret_cast<Stage<Element>*>(reinterpret_cast<uint8_t*>(stages) + 16 * lane);
  Stage<Element>* filled = filled_first;
  Request request{};
  bool opens = true;
  if (begin < end) request = reader.request(here, opens);  // on its way while x is filled
  fill_x<Element, kRows, kSparse>(p, range, x);
  __syncthreads();
  const X* const first_operand = static_cast<const X*>(x) + (kSparse ? lane : 4 * lane);  // the lane's part of x
  const X* operand = first_operand + (here.unit - range.first_unit) * kUnitColumns;
  float sums[kRows][4] = {};
  for (int unit = begin - (kStages - 1); unit < end; ++unit) {
    const int next = unit + kStages - 1;
    if (next < end) {
      const Request now = request;
      const Place place = ahead;
      const bool opened = opens;
      advance(ahead);
      opens = ahead.unit == range.first_unit;
      if (next + 1 < end) request = reader.request(ahead, opens);
      reader.read(place, opened, now, *filled);
      filled = filled == filled_first + kStages - 1 ? filled_first : filled + 1;
    }
    ptx::copy_async_commit();
    if (unit < begin) continue;
    ptx::copy_async_wait<kStages - 1>();
    __syncwarp();
    const Stage<Element>& stage = stages[(unit - begin) % kStages];
    if constexpr (kSparse) {
      multiply_set<Element, kRows>(stage, operand, range.units * kUnitColumns, lane, sums);
    } else {
      multiply_all<Element, kRows>(stage, operand, range.units * kUnitColumns, lane, sums);
    }
    if (here.unit == last_unit || unit == end - 1) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int r = 0; r < kPair; ++r) {
          const float sum = sum_of_warp(kSparse ? sums[i][r] : Element::own(sums[i], r, lane));
          if (lane == 0) shared.parts[here.pair + warp][r][i] = (stage.faulty >> r & 1) != 0 ? __int_as_float(0x7fffffff) : sum;
        }
        for (float& sum : sums[i]) sum = 0;
      }
    }
    __syncwarp();  // before the stage is filled again
    operand = here.unit == last_unit ? first_operand : operand + kUnitColumns;
    advance(here);
  }
}

// ---------------------------------------------------------------------------------------------------------------- the kernel

// Adds up what the warps have of each row, in order, and writes y after the last range of columns.
template <class Element, int kRows>
__device__ void finish_range(const Stream& p, const Range& range, Sums<kRows>& shared) {
  using Bits = typename Element::Bits;
  for (int at = static_cast<int>(threadIdx.x); at < range.rows * kRows; at += static_cast<int>(blockDim.x)) {
    const int i = at / range.rows, row = at % range.rows, pair = row / kPair;
    const int first_warp = pair * range.units / range.warp_units, last_warp = ((pair + 1) * range.units - 1) / range.warp_units;
    float sum = range.first_unit == 0 ? 0 : shared.rows[at];
    for (int warp = first_warp; warp <= last_warp; ++warp) sum += shared.parts[pair + warp][row % kPair][i];
    shared.rows[at] = sum;
    if (range.first_unit + range.units < p.units || i >= p.m) continue;
    const int64_t column = range.first_row + row;
    if (p.bias != nullptr) sum += Element::widen(static_cast<const Bits*>(p.bias)[column]);
    static_cast<Bits*>(p.y)[i * p.w.rows + column] = Element::narrow(sum);
  }
}

// Element  of W, x and y
// kRows    rows of x, at least p.m
template <class Element, int kRows>
__global__ __launch_bounds__(kMostWarps* kLanes, 1) void stream(const __grid_constant__ Stream p) {
  Sums<kRows>& shared = *ptx::dynamic_shared<Sums<kRows>>();
  Stage<Element>* const stages = reinterpret_cast<Stage<Element>*>(&shared + 1);
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  Stage<Element>* const own = stages + static_cast<int>(threadIdx.x) / kLanes * kStages;
  void* const x = stages + warps * kStages;
  Range range{};
  range.first_row = int64_t{blockIdx.x} * p.block_rows;
  range.rows = static_cast<int>(min(int64_t{p.block_rows}, p.w.rows - range.first_row));
  for (; range.first_unit < p.units; range.first_unit += range.units) {
    range.units = min(p.range_units, p.units - range.first_unit);
    range.warp_units = (range.pairs() * range.units + warps - 1) / warps;
    if (p.sparse && all_finite<Element>(p, range)) {
      stream_units<Element, kRows, true>(p, range, own, x, shared);
    } else {
      stream_units<Element, kRows, false>(p, range, own, x, shared);
    }
    __syncthreads();
    finish_range<Element, kRows>(p, range, shared);
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------------------- launching

template <class Element, int kRows>
cudaError_t launch(Stream p, const Device& device, cudaStream_t stream_of_work) {
  using Bits = typename Element::Bits;
  const int64_t warp_bytes = kStages * int64_t{sizeof(Stage<Element>)};
  const int64_t unit_bytes = int64_t{kRows} * kUnitColumns * static_cast<int64_t>(p.sparse ? sizeof(float) : sizeof(Bits));
  const int64_t free_bytes = device.shared_bytes - int64_t{sizeof(Sums<kRows>)};
  const int64_t units = static_cast<int64_t>((p.block_rows + 1) / kPair) * p.units;
  const int64_t fit = (free_bytes - unit_bytes) / warp_bytes;
  int64_t warps = sizeof(Bits) == 2 ? kMostWarps : kMostWarps / 2;
  warps = warps < fit ? warps : fit;
  warps = warps < units ? warps : units;
  if (warps <= 0) return cudaErrorInvalidConfiguration;
  const int64_t range_units = (free_bytes - warps * warp_bytes) / unit_bytes;
  p.range_units = static_cast<int>(range_units < p.units ? range_units : p.units);
  const int64_t shared_bytes = static_cast<int64_t>(sizeof(Sums<kRows>)) + warps * warp_bytes + p.range_units * unit_bytes;
  const int64_t threadblocks = (p.w.rows + p.block_rows - 1) / p.block_rows;
  const LaunchSize size{threadblocks, static_cast<int>(warps * kLanes), shared_bytes, device.shared_bytes};
  return launch_kernel(stream<Element, kRows>, size, stream_of_work, p);
}

template <class Element>
cudaError_t launch(const Stream& p, const Device& device, cudaStream_t stream_of_work) {
  const auto run = p.m == 1 ? launch<Element, 1> : p.m == 2 ? launch<Element, 2> : launch<Element, 4>;
  return run(p, device, stream_of_work);
}

}  // namespace

cudaError_t linear_stream(const LinearParams& params, const Device& device, void*, cudaStream_t stream_of_work) {
  const BitmaskMatrix& w = params.w;
  const int64_t width = width_of(params.dtype);
  if (w.rows == 0 || params.m == 0) return cudaSuccess;
  if (w.cols > kMostStreamColumns) return cudaErrorInvalidValue;
  // As many rows for each block, and as many blocks for each multiprocessor, as come out even.
  const int64_t waves = (w.rows - 1) / (int64_t{device.multiprocessors} * kMostBlockRows) + 1;
  const int64_t blocks = waves * device.multiprocessors;
  Stream p{};
  p.w = w;
  p.row_bytes = static_cast<int>(bitmask_bytes(w.cols));
  p.bias = params.bias;
  p.block_rows = static_cast<int>((w.rows + blocks - 1) / blocks);
  p.units = static_cast<int>(w.cols == 0 ? 1 : (w.cols - 1) / kUnitColumns + 1);
  p.words = (reinterpret_cast<uintptr_t>(w.bitmasks) | static_cast<uintptr_t>(p.row_bytes)) % 4 == 0;
  p.sparse = w.nnz < w.rows * w.cols / kSparseElements;
  for (int64_t i = 0; i < params.m; i += kMostProductRows) {
    p.x = static_cast<const uint8_t*>(params.x) + i * w.cols * width;
    p.y = static_cast<uint8_t*>(params.y) + i * w.rows * width;
    p.m = static_cast<int>(params.m - i < kMostProductRows ? params.m - i : kMostProductRows);
    const auto run = params.dtype == kFloat32 ? launch<Float32> : params.dtype == kBfloat16 ? launch<Bfloat16> : launch<Float16>;
    const cudaError_t error = run(p, device, stream_of_work);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace bitmask::cuda
