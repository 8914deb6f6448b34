// y = x W^T + bias for some rows of x: tensor cores, W expanded in registers (linear_multiply.cuh).
//
// A block takes tiles of kTileRows rows of W, a stage of kStageColumns columns at a time: while one stage is multiplied, the values and x
// of the next one and the bitmask of the one after that are on their way to shared memory. The stages of all tiles, one tile after the
// other, are dealt to as many blocks as the GPU holds, equally:
//
//   tile         0               1               2            blocks that share a tile each write their sums to the workspace; the last
//   stages   |---------------|---------------|---------------|   one to do so adds them, in the order of the blocks. Where a block begins
//   blocks   0         1         2         3         4           inside of a tile, its rows' values begin where `count` has counted to.
//
#include "linear_multiply.cuh"

#include <cuda_runtime.h>

#include <cstdint>

#include "linear_multiply.h"

namespace bitmask::cuda {
namespace {

constexpr int kTileRows = 128;
constexpr int kStageColumns = 128;
constexpr int kStageBytes = kStageColumns / 8;  // of a row's bitmask
constexpr int kWidth = 2;                       // bytes of an element
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kLeastStages = 2;  // that are worth a block

// ---------------------------------------------------------------------------------------------------------------- the work, dealt

// The stages of all tiles, dealt to blocks.
struct Deal {
  int64_t stages;  // of a tile
  int64_t units;   // of all tiles
  int64_t blocks;

  __host__ __device__ int64_t begin(int64_t block) const {
    const int64_t longer = units % blocks;  // blocks, the first ones, that have one unit more
    return block * (units / blocks) + (block < longer ? block : longer);
  }
  __host__ __device__ int64_t block_of(int64_t unit) const {
    const int64_t share = units / blocks, longer = units % blocks;
    return unit < longer * (share + 1) ? unit / (share + 1) : longer + (unit - longer * (share + 1)) / share;
  }
  __host__ __device__ bool whole_tiles() const { return units % blocks == 0 && units / blocks % stages == 0; }
};

// Stages of one tile.
struct Segment {
  int64_t tile, begin, end;
};

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fffffff); }

// An array that is copied in pieces of 16 bytes, aligned. Its first one may begin before the array: places are bytes from there.
struct Pieces {
  uintptr_t base;
  uint64_t begin, end;  // of the array
  uint64_t inner;       // places, from `begin` on, after which there are at least as many bytes as are copied at a time
};

// What the kernels are told.
struct Product {
  BitmaskMatrix w;
  int64_t row_bytes;  // of its bitmask
  Pieces values, bitmasks;
  const uint8_t* x;
  const uint16_t* bias;
  uint16_t* y;
  int64_t m;
  bool x_aligned;  // its rows, to 16 bytes
  Deal deal;
  uint32_t* arrived;  // [blocks]: how many blocks have written their sums of the tile that this block is the first of
  int64_t* counts;    // [blocks][kTileRows]: values in the stages of the tile that this block does not end
  float4* partials;   // [blocks][2][sums of a tile]: of the tile that the block begins, and of the one that it does not begin
};

// ---------------------------------------------------------------------------------------------------------------- counting

// Bits set in bytes [begin, end), of which the four lanes of a row take every fourth 16.
__device__ int64_t count_bits(const uint8_t* begin, const uint8_t* end, int t) {
  int64_t count = 0;
  const uint8_t* piece = begin - reinterpret_cast<uintptr_t>(begin) % 16 + 16 * t;
  for (; piece < end; piece += 64) {
    if (piece >= begin && end - piece >= 16) {
      const uint4 bits = *reinterpret_cast<const uint4*>(piece);
      count += __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
    } else {
      for (int i = 0; i < 16; ++i) {
        if (piece + i >= begin && piece + i < end) count += __popc(piece[i]);
      }
    }
  }
  return count;
}

// For the last tile of a block, if it ends in another one: the values of each row in the block's stages of it.
__global__ __launch_bounds__(4 * kTileRows) void count(const Product p) {
  const int64_t stages = p.deal.stages, begin = p.deal.begin(blockIdx.x), end = p.deal.begin(blockIdx.x + 1);
  if (threadIdx.x == 0) p.arrived[blockIdx.x] = 0;
  if (end % stages == 0) return;
  const int64_t tile = end / stages, first = begin > tile * stages ? begin % stages : 0;
  const int t = static_cast<int>(threadIdx.x % 4), tile_row = static_cast<int>(threadIdx.x / 4);
  const int64_t row = tile * kTileRows + tile_row;
  int64_t values = 0;
  if (row < p.w.rows) {
    const uint8_t* const bits = p.w.bitmasks + row * p.row_bytes;
    values = count_bits(bits + first * kStageBytes, bits + end % stages * kStageBytes, t);
  }
  values += __shfl_xor_sync(~0u, values, 1);
  values += __shfl_xor_sync(~0u, values, 2);
  if (t == 0) p.counts[blockIdx.x * kTileRows + tile_row] = values;
}

// ---------------------------------------------------------------------------------------------------------------- shared memory

constexpr int kSlotBytes = kStageColumns * kWidth + 16;
constexpr int kXStride = kStageColumns * kWidth + 32;

// A row's values in a stage begin in the first 16 bytes of its slot, as far from its start as they are from a multiple of 16 in global
// memory. Strides that are 4 (slots) or 8 (x) banks more than a multiple of 32 keep the eight rows of an operand in different banks.
struct Values {
  uint8_t before[16];  // slots are read up to 2 bytes before and 8 bytes after what they hold; this is masked
  uint8_t slots[kTileRows][kSlotBytes];
};

template <int kTiles>
struct Shared {
  Values values[2];
  uint8_t after[16];
  uint8_t bits[kTileRows][48];  // 16 bytes that begin in the first 16
  uint8_t x[2][8 * kTiles][kXStride];
};

// Is all that is copied at a time, from `place` on, in the array?
__device__ __forceinline__ bool inside(const Pieces& array, uint64_t place) { return place - array.begin < array.inner; }

__device__ __forceinline__ const uint8_t* address(const Pieces& array, uint64_t place) {
  return reinterpret_cast<const uint8_t*>(array.base + place);
}

// Brings what the array has of the piece at `place`.
__device__ __forceinline__ void copy_edge(uint8_t* shared, const Pieces& array, uint64_t place) {
  if (place >= array.begin && place < array.end) {
    ptx::copy_async_16(shared, address(array, place), static_cast<int>(array.end - place < 16 ? array.end - place : 16));
  } else {
#pragma unroll 1
    for (uint64_t i = 0; i < 16; ++i) {
      if (place + i >= array.begin && place + i < array.end) shared[i] = *address(array, place + i);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- rows of W

// A row of W as each of its four lanes sees it.
struct Row {
  uint64_t place;  // in values, of the first one of the stage whose bits these are
  uint32_t bytes;  // of those values
  uint32_t bits[kStageColumns / 32];
  uint32_t origin;  // of the value before the first one: bits from the beginning of shared memory
};

// The bits of a stage, from the bytes that lie `skew` past the beginning of the slot. Those of the last stage end with the row.
__device__ __forceinline__ void read_bits(const uint8_t* slot, uint32_t skew, int64_t columns, uint32_t (&bits)[kStageColumns / 32]) {
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(slot + (skew & 12));
#pragma unroll
  for (int i = 0; i < kStageColumns / 32; ++i) bits[i] = __funnelshift_r(words[i], words[i + 1], 8 * skew);
  if (columns >= kStageColumns) return;
#pragma unroll
  for (int i = 0; i < kStageColumns / 32; ++i) {
    const int used = static_cast<int>(columns) - 32 * i;
    bits[i] = used <= 0 ? 0 : used < 32 ? bits[i] & ((1u << used) - 1) : bits[i];
  }
}

// Asks for the values of a row in a stage, of which lane t takes every fourth piece. `slot`: where the row's go, from the beginning of
// shared memory.
__device__ __forceinline__ void copy_values(const Pieces& values, Row& row, int t, uint8_t* shared, uint32_t slot) {
  const uint32_t skew = static_cast<uint32_t>(row.place) % 16;
  const uint64_t first = row.place - skew;
  row.bytes = kWidth * static_cast<uint32_t>(__popc(row.bits[0]) + __popc(row.bits[1]) + __popc(row.bits[2]) + __popc(row.bits[3]));
  row.origin = 8 * (slot + skew - kWidth);
  const int left = static_cast<int>(skew + row.bytes) - 16 * t;
  uint8_t* const dst = shared + slot + 16 * t;
  if (inside(values, first)) {
    const uint8_t* const src = address(values, first + 16 * static_cast<uint32_t>(t));
#pragma unroll
    for (int i = 0; i < kSlotBytes; i += 64) {
      if (i < left) ptx::copy_async_16(dst + i, src + i);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < left; i += 64) copy_edge(dst + i, values, first + 16 * static_cast<uint32_t>(t) + static_cast<uint32_t>(i));
  }
}

__device__ __forceinline__ bool padding_is_zero(const Product& p, int64_t row) {
  const int used = static_cast<int>(p.w.cols % 8);
  return used == 0 || p.w.bitmasks[(row + 1) * p.row_bytes - 1] >> used == 0;
}

// Where the values of `row` begin; false if they cannot.
__device__ __forceinline__ bool find_row(const Product& p, int64_t row, int64_t* start) {
  *start = p.w.row_offsets[row];
  return *start >= 0 && *start <= p.w.nnz && (row > 0 || *start == 0);
}

// Do the values of `row`, which end at `position`, belong to it?
__device__ __forceinline__ bool row_holds(const Product& p, int64_t row, int64_t position) {
  int64_t start;
  const int64_t next = row + 1 < p.w.rows ? p.w.row_offsets[row + 1] : p.w.nnz;
  return find_row(p, row, &start) && position == next && next <= p.w.nnz && padding_is_zero(p, row);
}

// ---------------------------------------------------------------------------------------------------------------- the product

template <LinearDtype kDtype>
struct Element;

template <>
struct Element<kBfloat16> {
  __device__ static float widen(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  __device__ static uint16_t narrow(float value) { return ptx::float_to_bfloat16(value); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_bfloat16(d, a, b); }
};

template <>
struct Element<kFloat16> {
  __device__ static float widen(uint16_t bits) { return ptx::half_to_float(bits); }
  __device__ static uint16_t narrow(float value) { return ptx::float_to_half(value); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_float16(d, a, b); }
};

// kTiles      rows of x, in eights
// kFragments  rows of W that a warp multiplies them with, in sixteens: more rows use an operand of x more often
template <int kTiles, int kFragments, LinearDtype kDtype>
struct Multiply {
  static constexpr int kRows = 2 * kFragments;  // of W in which a lane takes part: g + 8 i of the warp's, with g = lane / 4
  static constexpr int kThreads = kTileRows / (16 * kFragments) * 32;
  static constexpr int64_t kPartial = int64_t{kFragments} * kTiles * kThreads;  // sums of a tile, in fours
  using Sums = float[kFragments][kTiles][4];
  using Memory = Shared<kTiles>;

  static constexpr int kPieces = kStageColumns * kWidth / 16;  // of a row of x in a stage
  static constexpr int kXRows = kThreads / kPieces;            // of x that the threads copy at a time

  const Product& p;
  Memory& shared;
  const Segment segment;
  const int t;  // which of the four lanes of its rows a lane is
  Row rows[kRows];
  uint32_t skews[kRows];            // how far past the beginning of their slots the rows' bits begin: bytes
  uint64_t bits_place[kFragments];  // in bitmasks, of the piece that the lane copies next: lanes 0 and 1 for the upper row of a fragment
  bool copies_bits[kFragments];     // that the lane has in it, lanes 2 and 3 for the lower one; whether these need the piece
  const uint8_t* x_next;            // what the thread copies next for the first of its rows of x
  int x_rows;                       // rows of x from that one on

  // Slots for the stage to come, by turns: bytes from the beginning of shared memory.
  uint32_t values_slot;  // of the lane's first row
  uint32_t x_slot;       // of the thread's first piece of x

  __device__ __forceinline__ Multiply(const Product& product, Memory& memory, const Segment& stages)
      : p(product), shared(memory), segment(stages), t(static_cast<int>(threadIdx.x % 4)) {}

  __device__ __forceinline__ uint8_t* memory() const { return reinterpret_cast<uint8_t*>(&shared); }

  // The lane's row i in a tile.
  static __device__ __forceinline__ int tile_row(int i) {
    return static_cast<int>(threadIdx.x / 32 * 16 * kFragments + threadIdx.x % 32 / 4) + 8 * i;
  }

  // The lane's row i of W; the last one instead of those that are not there.
  __device__ __forceinline__ int64_t row_of(int i) const {
    const int64_t row = segment.tile * kTileRows + tile_row(i);
    return row < p.w.rows ? row : p.w.rows - 1;
  }

  // Finds where the rows begin in the segment.
  __device__ __forceinline__ void open_rows() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = row_of(i);
      int64_t position;
      if (!find_row(p, row, &position)) position = 0;  // row_holds will tell
      if (segment.begin > 0) {
        for (int64_t block = p.deal.block_of(segment.tile * p.deal.stages); block < blockIdx.x; ++block) {
          position += p.counts[block * kTileRows + row % kTileRows];
        }
      }
      rows[i] = {p.values.begin + static_cast<uint64_t>(position * kWidth), 0, {}, 0};
      skews[i] = static_cast<uint32_t>(p.bitmasks.begin + static_cast<uint64_t>(row * p.row_bytes)) % 16;
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const int64_t bytes = row_of(2 * i + t / 2) * p.row_bytes + segment.begin * kStageBytes;
      const uint64_t place = p.bitmasks.begin + static_cast<uint64_t>(bytes);
      copies_bits[i] = t % 2 == 0 || place % 16 != 0;
      bits_place[i] = place - place % 16 + 16 * (static_cast<uint32_t>(t) % 2);
    }
  }

  __device__ __forceinline__ void open_x() {
    const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
    x_next = p.x + (row * p.w.cols + segment.begin * kStageColumns + 8 * piece) * kWidth;
    x_rows = static_cast<int>(p.m < 8 * kTiles ? p.m : 8 * kTiles) - row;
    x_slot = static_cast<uint32_t>(&shared.x[0][0][0] - memory() + row * kXStride + 16 * piece);
  }

  // Asks for the bits of the stage that follows those that have been asked for.
  __device__ __forceinline__ void copy_bits() {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      uint8_t* const dst = shared.bits[tile_row(2 * i + t / 2)] + 16 * (t % 2);
      if (copies_bits[i]) {
        if (inside(p.bitmasks, bits_place[i])) {
          ptx::copy_async_16(dst, address(p.bitmasks, bits_place[i]));
        } else {
          copy_edge(dst, p.bitmasks, bits_place[i]);
        }
      }
      bits_place[i] += kStageBytes;
    }
  }

  // Asks for x where `columns` are left; where there is no column there are zeros, where there is no row there is anything.
  __device__ __forceinline__ void copy_x(int64_t columns) {
    if (p.x_aligned && columns >= kStageColumns) {
#pragma unroll
      for (int i = 0; i < 8 * kTiles; i += kXRows) {
        if (i < x_rows) ptx::copy_async_16(memory() + x_slot + i * kXStride, x_next + i * p.w.cols * kWidth);
      }
    } else {
      const int first = 8 * (static_cast<int>(threadIdx.x) % kPieces);
#pragma unroll 1
      for (int i = 0; i < 8 * x_rows; i += i % 8 == 7 ? 8 * kXRows - 7 : 1) {
        const bool there = first + i % 8 < columns;
        const uint8_t* const src = x_next + (i / 8 * p.w.cols + i % 8) * kWidth;
        uint8_t* const dst = memory() + x_slot + i / 8 * kXStride + i % 8 * kWidth;
        *reinterpret_cast<uint16_t*>(dst) = there ? *reinterpret_cast<const uint16_t*>(src) : uint16_t{0};
      }
    }
    x_next += kStageColumns * kWidth;
  }

  // Takes the bits of a stage, which are there, and asks for all else that it needs, and for the bits of the next one, if any.
  __device__ __forceinline__ void copy_stage(int64_t columns, bool last) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) read_bits(shared.bits[tile_row(i)], skews[i], columns, rows[i].bits);
    __syncwarp();
    if (!last) copy_bits();
#pragma unroll
    for (int i = 0; i < kRows; ++i) copy_values(p.values, rows[i], t, memory(), values_slot + static_cast<uint32_t>(8 * i * kSlotBytes));
    copy_x(columns);
  }

  // 16 columns of all rows. `x` is where the lane's elements of the first tile of x are.
  template <int kStep>
  __device__ __forceinline__ void step(const uint32_t* memory, const Nibbles (&nibbles)[kRows], const uint32_t (&words)[kRows],
                                              const uint32_t (&places)[kRows], const uint8_t* x, Sums& sums) {
    const uint32_t to_first = __brev(1u << (4 * t + 16 * (kStep % 2)));  // times a word: leaves the bits up to the first column's
    uint32_t a[kFragments][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t place = places[i] + 8 * kWidth * static_cast<uint32_t>(__popc(words[i] * to_first));
      expand<kStep>(memory, place, nibbles[i], &a[i / 2][i % 2], &a[i / 2][i % 2 + 2]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint2 pairs = *reinterpret_cast<const uint2*>(x + tile * 8 * kXStride + kStep * 16 * kWidth);
      const uint32_t b[2] = {pairs.x, pairs.y};
#pragma unroll
      for (int i = 0; i < kFragments; ++i) Element<kDtype>::multiply(sums[i][tile], a[i], b);
    }
  }

  __device__ __forceinline__ void multiply_stage(const uint32_t* memory, const Row (&current)[kRows], const uint8_t* x, Sums& sums) {
    uint32_t places[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) places[i] = current[i].origin;
#pragma unroll
    for (int half = 0; half < 2; ++half, x += kStageColumns / 2 * kWidth) {
      uint32_t words[2][kRows];
      Nibbles nibbles[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        words[0][i] = current[i].bits[2 * half];
        words[1][i] = current[i].bits[2 * half + 1];
        nibbles[i] = nibbles_of(words[0][i], words[1][i], t);
      }
      step<0>(memory, nibbles, words[0], places, x, sums);
      step<1>(memory, nibbles, words[0], places, x, sums);
#pragma unroll
      for (int i = 0; i < kRows; ++i) places[i] += 8 * kWidth * static_cast<uint32_t>(__popc(words[0][i]));
      step<2>(memory, nibbles, words[1], places, x, sums);
      step<3>(memory, nibbles, words[1], places, x, sums);
#pragma unroll
      for (int i = 0; i < kRows; ++i) places[i] += 8 * kWidth * static_cast<uint32_t>(__popc(words[1][i]));
    }
  }

  // The sums of a segment. Where it ends its tile, its rows are proven: those of a faulty one become NaN.
  __device__ __forceinline__ void run(Sums& sums) {
    open_rows();
    open_x();
    values_slot = static_cast<uint32_t>(&shared.values[0].slots[tile_row(0)][0] - memory());
    uint32_t x_read = static_cast<uint32_t>(&shared.x[1][threadIdx.x % 32 / 4][0] - memory() + t * 4 * kWidth);
    const uint32_t values_turn = 2 * values_slot + sizeof(Values), x_turn = 2 * x_slot + sizeof(shared.x[0]);
    const uint32_t x_read_turn = 2 * x_read - sizeof(shared.x[0]);
    __syncthreads();  // the segment before is done with the memory
    copy_bits();
    ptx::copy_async_commit();
    const int64_t stages = segment.end - segment.begin;
    int64_t columns = p.w.cols - segment.begin * kStageColumns;
    for (int64_t left = stages; left >= 0; --left) {  // stages to ask for; the one before is multiplied meanwhile
      ptx::copy_async_wait<0>();
      __syncthreads();
      Row current[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        current[i] = rows[i];
        rows[i].place += rows[i].bytes;
      }
      if (left > 0) copy_stage(columns, left == 1);
      ptx::copy_async_commit();
      if (left < stages) multiply_stage(reinterpret_cast<const uint32_t*>(memory()), current, memory() + x_read, sums);
      columns -= kStageColumns;
      values_slot = values_turn - values_slot;
      x_slot = x_turn - x_slot;
      x_read = x_read_turn - x_read;
    }
    if (segment.end < p.deal.stages) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row_holds(p, row_of(i), static_cast<int64_t>((rows[i].place - p.values.begin) / kWidth))) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) sums[i / 2][tile][i % 2 * 2] = sums[i / 2][tile][i % 2 * 2 + 1] = quiet_nan();
    }
  }

  // Adds the bias, rounds and stores.
  static __device__ __forceinline__ void store(const Product& p, int64_t tile_of_w, const Sums& sums) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = tile_of_w * kTileRows + tile_row(i);
      if (row >= p.w.rows) continue;
      const float bias = p.bias == nullptr ? 0 : Element<kDtype>::widen(p.bias[row]);
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        const int64_t x_row = 8 * (j / 2) + 2 * static_cast<int>(threadIdx.x % 4) + j % 2;
        if (x_row < p.m) p.y[x_row * p.w.rows + row] = Element<kDtype>::narrow(sums[i / 2][j / 2][i % 2 * 2 + j % 2] + bias);
      }
    }
  }

  // Writes the sums of a segment that shares its tile with others. The block that comes last gets the sums of all of them, and true.
  static __device__ bool join(const Product& p, const Segment& s, Sums& sums) {
    const int64_t first = p.deal.block_of(s.tile * p.deal.stages), last = p.deal.block_of((s.tile + 1) * p.deal.stages - 1);
    float4* const own = p.partials + (2 * blockIdx.x + (s.begin > 0)) * kPartial + threadIdx.x;
    float (&flat)[kFragments * kTiles][4] = reinterpret_cast<float (&)[kFragments * kTiles][4]>(sums);
#pragma unroll
    for (int i = 0; i < kFragments * kTiles; ++i) own[i * kThreads] = make_float4(flat[i][0], flat[i][1], flat[i][2], flat[i][3]);
    __threadfence();
    __syncthreads();
    const bool comes_last = threadIdx.x == 0 && atomicAdd(p.arrived + first, 1u) == static_cast<uint32_t>(last - first);
    if (__syncthreads_or(comes_last) == 0) return false;
    __threadfence();
#pragma unroll
    for (auto& four : flat) four[0] = four[1] = four[2] = four[3] = 0;
    for (int64_t block = first; block <= last; ++block) {
      const float4* const part = p.partials + (2 * block + (block > first)) * kPartial + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kFragments * kTiles; ++i) {
        const float4 four = part[i * kThreads];
        flat[i][0] += four.x;
        flat[i][1] += four.y;
        flat[i][2] += four.z;
        flat[i][3] += four.w;
      }
    }
    return true;
  }

  // All segments of a block.
  static __device__ __forceinline__ void run_block(const Product& p) {
    const int64_t last = p.deal.begin(blockIdx.x + 1);
    for (int64_t unit = p.deal.begin(blockIdx.x); unit < last;) {
      const int64_t tile = unit / p.deal.stages, begin = unit % p.deal.stages, left = begin + last - unit;
      const Segment s{tile, begin, left < p.deal.stages ? left : p.deal.stages};
      Sums sums = {};
      Multiply(p, *ptx::dynamic_shared<Memory>(), s).run(sums);
      const bool whole = s.begin == 0 && s.end == p.deal.stages;
      if (whole || join(p, s, sums)) store(p, s.tile, sums);
      unit += s.end - s.begin;
    }
  }
};

template <int kTiles, int kFragments, LinearDtype kDtype>
__global__ __launch_bounds__(Multiply<kTiles, kFragments, kDtype>::kThreads, kBlocksPerMultiprocessor) void multiply(const Product p) {
  Multiply<kTiles, kFragments, kDtype>::run_block(p);
}

// ---------------------------------------------------------------------------------------------------------------- launching

constexpr int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

int64_t shared_bytes_of(int tiles) {
  return tiles == 1 ? sizeof(Shared<1>) : tiles == 2 ? sizeof(Shared<2>) : tiles == 4 ? sizeof(Shared<4>) : sizeof(Shared<8>);
}

// `run`: bytes that are copied at a time.
Pieces pieces_of(const void* array, int64_t bytes, int64_t run) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(array);
  const uint64_t skew = begin % 16;
  return {begin - skew, skew, skew + static_cast<uint64_t>(bytes), static_cast<uint64_t>(bytes < run ? 0 : bytes - run + 1)};
}

struct Plan {
  int tiles;  // rows of x that a launch takes, in eights
  Deal deal;
  int64_t arrived_bytes, counts_bytes, partials_bytes;  // parts of the workspace
};

Plan plan(const LinearParams& params, const Device& device) {
  Plan plan;
  plan.tiles = 1;
  while (plan.tiles < 8 && 8 * plan.tiles < params.m && shared_bytes_of(2 * plan.tiles) <= device.shared_bytes) plan.tiles *= 2;
  const int64_t reserved = 1024;  // bytes that every block takes besides
  const int64_t fit = (device.shared_bytes + reserved) / (shared_bytes_of(plan.tiles) + reserved);
  const int64_t resident = device.multiprocessors * (fit < kBlocksPerMultiprocessor ? fit : kBlocksPerMultiprocessor);
  const int64_t stages = params.w.cols == 0 ? 1 : params.w.cols / kStageColumns + (params.w.cols % kStageColumns != 0);
  const int64_t units = (params.w.rows / kTileRows + (params.w.rows % kTileRows != 0)) * stages;
  const int64_t worth = units / kLeastStages > 0 ? units / kLeastStages : 1;
  plan.deal = {stages, units, worth < resident ? worth : resident};
  const bool whole = plan.deal.whole_tiles();
  plan.arrived_bytes = whole ? 0 : round_up(plan.deal.blocks * sizeof(uint32_t), 16);
  plan.counts_bytes = whole ? 0 : plan.deal.blocks * kTileRows * sizeof(int64_t);
  plan.partials_bytes = whole ? 0 : plan.deal.blocks * 2 * kTileRows * 8 * plan.tiles * sizeof(float);
  return plan;
}

cudaError_t launch(void (*kernel)(Product), const Product& product, int threads, int64_t shared_bytes, cudaStream_t stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(product.deal.blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, product);
}

template <int kTiles, int kFragments>
cudaError_t launch_multiply(const Product& product, LinearDtype dtype, cudaStream_t stream) {
  const bool half = dtype == kFloat16;
  return launch(half ? multiply<kTiles, kFragments, kFloat16> : multiply<kTiles, kFragments, kBfloat16>, product,
                Multiply<kTiles, kFragments, kBfloat16>::kThreads, sizeof(Shared<kTiles>), stream);
}

}  // namespace

int64_t linear_multiply_workspace_bytes(const LinearParams& params, const Device& device) {
  if (params.m == 0 || params.w.rows == 0) return 0;
  const Plan p = plan(params, device);
  return p.arrived_bytes + p.counts_bytes + p.partials_bytes;
}

cudaError_t linear_multiply(const LinearParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (params.dtype != kBfloat16 && params.dtype != kFloat16) return cudaErrorInvalidValue;
  if (params.m == 0 || params.w.rows == 0) return cudaSuccess;
  const Plan plan = cuda::plan(params, device);
  uint8_t* const scratch = static_cast<uint8_t*>(workspace);
  Product product = {};
  product.w = params.w;
  product.row_bytes = bitmask_bytes(params.w.cols);
  product.values = pieces_of(params.w.values, params.w.nnz * kWidth, kSlotBytes);
  product.bitmasks = pieces_of(params.w.bitmasks, params.w.rows * product.row_bytes, 16);
  product.bias = static_cast<const uint16_t*>(params.bias);
  product.deal = plan.deal;
  product.arrived = reinterpret_cast<uint32_t*>(scratch);
  product.counts = reinterpret_cast<int64_t*>(scratch + plan.arrived_bytes);
  product.partials = reinterpret_cast<float4*>(scratch + plan.arrived_bytes + plan.counts_bytes);
  product.x_aligned = params.w.cols > 0 && reinterpret_cast<uintptr_t>(params.x) % 16 == 0 && params.w.cols * kWidth % 16 == 0;
  for (int64_t first = 0; first < params.m; first += 8 * plan.tiles) {
    product.x = static_cast<const uint8_t*>(params.x) + first * params.w.cols * kWidth;
    product.y = static_cast<uint16_t*>(params.y) + first * params.w.rows;
    product.m = params.m - first;
    if (!plan.deal.whole_tiles()) {
      const cudaError_t error = launch(count, product, 4 * kTileRows, 0, stream);
      if (error != cudaSuccess) return error;
    }
    const auto run = plan.tiles == 1   ? launch_multiply<1, 1>
                     : plan.tiles == 2 ? launch_multiply<2, 1>
                     : plan.tiles == 4 ? launch_multiply<4, 2>
                                       : launch_multiply<8, 2>;
    const cudaError_t error = run(product, params.dtype, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace bitmask::cuda
