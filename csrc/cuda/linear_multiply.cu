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

// What the kernels are told.
struct Product {
  BitmaskMatrix w;
  int64_t row_bytes;  // of its bitmask
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
  uint8_t masks[kTileRows][48];  // 16 bytes that begin in the first 16
  uint8_t x[2][8 * kTiles][kXStride];
};

// Brings what an array [begin, end) has of the 16 bytes at the address `piece`, which is aligned.
__device__ __forceinline__ void copy_piece(uint8_t* shared, uintptr_t piece, uintptr_t begin, uintptr_t end) {
  const uint8_t* const src = reinterpret_cast<const uint8_t*>(piece);
  if (piece >= end) return;
  if (piece >= begin) {
    ptx::copy_async_16(shared, src, static_cast<int>(end - piece < 16 ? end - piece : 16));
  } else {
    for (uintptr_t i = begin - piece; i < 16 && piece + i < end; ++i) shared[i] = src[i];
  }
}

// x, columns of `stage`; zero outside of x.
template <int kTiles>
__device__ __forceinline__ void copy_x(const Product& p, int64_t stage, Shared<kTiles>& shared) {
  constexpr int kPieces = kStageColumns * kWidth / 16;
  const int64_t cols = p.w.cols;
  for (int i = static_cast<int>(threadIdx.x); i < 8 * kTiles * kPieces; i += static_cast<int>(blockDim.x)) {
    const int row = i / kPieces, piece = i % kPieces;
    const int64_t column = stage * kStageColumns + 8 * piece;
    const int64_t src = (row * cols + column) * kWidth;
    uint8_t* const dst = shared.x[stage % 2][row] + 16 * piece;
    if (p.x_aligned) {
      const bool there = row < p.m && column < cols;
      ptx::copy_async_16(dst, there ? p.x + src : p.x, there ? 16 : 0);
    } else {
      for (int j = 0; j < 8; ++j) {
        const bool there = row < p.m && column + j < cols;
        reinterpret_cast<uint16_t*>(dst)[j] = there ? reinterpret_cast<const uint16_t*>(p.x + src)[j] : uint16_t{0};
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- rows of W

// A row of W as each of its four lanes sees it.
struct Row {
  int64_t position;  // of the first value of the stage whose bits these are
  uint32_t bits[kStageColumns / 32];
  uint32_t place;  // of the value before the first one of the stage: bits from the beginning of shared memory

  __device__ __forceinline__ int count() const { return __popc(bits[0]) + __popc(bits[1]) + __popc(bits[2]) + __popc(bits[3]); }
};

// Asks for the bitmask of a row in `stage`: lanes 0 and 1 of two for each row.
__device__ __forceinline__ void copy_mask(const Product& p, int64_t row, int64_t stage, int piece, uint8_t* slot) {
  if (row >= p.w.rows || stage * kStageBytes >= p.row_bytes) return;
  const uintptr_t bitmasks = reinterpret_cast<uintptr_t>(p.w.bitmasks);
  const uintptr_t first = bitmasks + static_cast<uintptr_t>(row * p.row_bytes + stage * kStageBytes);
  copy_piece(slot + 16 * piece, first - first % 16 + 16 * piece, bitmasks, bitmasks + static_cast<uintptr_t>(p.w.rows * p.row_bytes));
}

// The bits of a row in `stage`, from what copy_mask has brought.
__device__ __forceinline__ void read_mask(const Product& p, int64_t row, int64_t stage, const uint8_t* slot,
                                          uint32_t (&bits)[kStageColumns / 32]) {
  const uint32_t skew = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p.w.bitmasks) + row * p.row_bytes) % 16;
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(slot + (skew & 12));
  const int64_t columns = row < p.w.rows ? p.w.cols - stage * kStageColumns : 0;
  for (int i = 0; i < kStageColumns / 32; ++i) bits[i] = __funnelshift_r(words[i], words[i + 1], 8 * skew);
  if (columns >= kStageColumns) return;
  for (int i = 0; i < kStageColumns / 32; ++i) {
    const int64_t used = columns - 32 * i;
    bits[i] = used <= 0 ? 0 : used < 32 ? bits[i] & ((1u << used) - 1) : bits[i];
  }
}

// Asks for the values of a row in a stage, where its bits and its position are known.
__device__ __forceinline__ void copy_values(const Product& p, Row& row, int t, uint8_t* slot, const uint8_t* shared) {
  const uintptr_t values = reinterpret_cast<uintptr_t>(p.w.values), end = values + static_cast<uintptr_t>(p.w.nnz * kWidth);
  const uintptr_t first = values + static_cast<uintptr_t>(row.position * kWidth);
  const int skew = static_cast<int>(first % 16), bytes = skew + row.count() * kWidth;
  row.place = 8 * static_cast<uint32_t>(slot - shared + skew - kWidth);
  for (int i = 16 * t; i < bytes; i += 64) copy_piece(slot + i, first - skew + i, values, end);
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

  static __device__ __forceinline__ int lane_of_row() { return static_cast<int>(threadIdx.x % 4); }

  // The lane's row i in a tile.
  static __device__ __forceinline__ int tile_row(int i) {
    return static_cast<int>(threadIdx.x / 32 * 16 * kFragments + threadIdx.x % 32 / 4) + 8 * i;
  }

  // Finds where the values of the rows begin in a segment.
  static __device__ __forceinline__ void open(const Product& p, const Segment& s, Row (&rows)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = s.tile * kTileRows + tile_row(i);
      rows[i].position = 0;
      if (row < p.w.rows && !find_row(p, row, &rows[i].position)) rows[i].position = 0;  // row_holds will tell
      if (s.begin == 0) continue;
      for (int64_t block = p.deal.block_of(s.tile * p.deal.stages); block < blockIdx.x; ++block) {
        rows[i].position += p.counts[block * kTileRows + tile_row(i)];
      }
    }
  }

  static __device__ __forceinline__ void copy_masks(const Product& p, const Segment& s, int64_t stage, Memory& shared) {
    if (stage >= s.end) return;
    for (int i = lane_of_row() / 2; i < kRows; i += 2) {
      copy_mask(p, s.tile * kTileRows + tile_row(i), stage, lane_of_row() % 2, shared.masks[tile_row(i)]);
    }
  }

  // Takes the bits of `stage` and asks for all else that it needs, and for the bits of the next one.
  static __device__ __forceinline__ void copy_stage(const Product& p, const Segment& s, int64_t stage, Memory& shared, Row (&rows)[kRows]) {
    if (stage < s.end) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        read_mask(p, s.tile * kTileRows + tile_row(i), stage, shared.masks[tile_row(i)], rows[i].bits);
      }
      __syncwarp();
      copy_masks(p, s, stage + 1, shared);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        copy_values(p, rows[i], lane_of_row(), shared.values[stage % 2].slots[tile_row(i)], reinterpret_cast<const uint8_t*>(&shared));
      }
      copy_x(p, stage, shared);
    }
    ptx::copy_async_commit();
  }

  // 16 columns of all rows. `x` is where the lane's elements of the first tile of x are.
  template <int kStep>
  static __device__ __forceinline__ void step(const uint32_t* shared, const Nibbles (&nibbles)[kRows], const uint32_t (&words)[kRows],
                                              const uint32_t (&places)[kRows], const uint8_t* x, Sums& sums) {
    const uint32_t to_first = (2u << (4 * lane_of_row() + 16 * (kStep % 2))) - 1;
    uint32_t a[kFragments][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t place = places[i] + 8 * kWidth * static_cast<uint32_t>(__popc(words[i] & to_first));
      expand<kStep>(shared, place, nibbles[i], &a[i / 2][i % 2], &a[i / 2][i % 2 + 2]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint2 pairs = *reinterpret_cast<const uint2*>(x + tile * 8 * kXStride + kStep * 16 * kWidth);
      const uint32_t b[2] = {pairs.x, pairs.y};
#pragma unroll
      for (int i = 0; i < kFragments; ++i) Element<kDtype>::multiply(sums[i][tile], a[i], b);
    }
  }

  static __device__ __forceinline__ void multiply_stage(const uint32_t* shared, const Row (&rows)[kRows], const uint8_t* x, Sums& sums) {
    uint32_t places[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) places[i] = rows[i].place;
#pragma unroll
    for (int half = 0; half < 2; ++half, x += kStageColumns / 2 * kWidth) {
      uint32_t words[2][kRows];
      Nibbles nibbles[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        words[0][i] = rows[i].bits[2 * half];
        words[1][i] = rows[i].bits[2 * half + 1];
        nibbles[i] = nibbles_of(words[0][i], words[1][i], lane_of_row());
      }
      step<0>(shared, nibbles, words[0], places, x, sums);
      step<1>(shared, nibbles, words[0], places, x, sums);
#pragma unroll
      for (int i = 0; i < kRows; ++i) places[i] += 8 * kWidth * static_cast<uint32_t>(__popc(words[0][i]));
      step<2>(shared, nibbles, words[1], places, x, sums);
      step<3>(shared, nibbles, words[1], places, x, sums);
#pragma unroll
      for (int i = 0; i < kRows; ++i) places[i] += 8 * kWidth * static_cast<uint32_t>(__popc(words[1][i]));
    }
  }

  // The sums of a segment. Where it ends its tile, its rows are proven: those of a faulty one become NaN.
  static __device__ __forceinline__ void multiply_segment(const Product& p, const Segment& s, Sums& sums) {
    Memory& shared = *ptx::dynamic_shared<Memory>();
    Row rows[kRows];
    open(p, s, rows);
    __syncthreads();  // the segment before is done with the memory
    copy_masks(p, s, s.begin, shared);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
    __syncwarp();
    copy_stage(p, s, s.begin, shared, rows);
    for (int64_t stage = s.begin; stage < s.end; ++stage) {
      ptx::copy_async_wait<0>();
      __syncthreads();
      Row current[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        current[i] = rows[i];
        rows[i].position += rows[i].count();
      }
      copy_stage(p, s, stage + 1, shared, rows);
      const uint8_t* const x = shared.x[stage % 2][threadIdx.x % 32 / 4] + lane_of_row() * 4 * kWidth;
      multiply_stage(reinterpret_cast<const uint32_t*>(&shared), current, x, sums);
    }
    if (s.end < p.deal.stages) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = s.tile * kTileRows + tile_row(i);
      if (row >= p.w.rows || row_holds(p, row, rows[i].position)) continue;
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
        const int64_t x_row = 8 * (j / 2) + 2 * lane_of_row() + j % 2;
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

  static __device__ __forceinline__ void run(const Product& p) {
    const int64_t last = p.deal.begin(blockIdx.x + 1);
    for (int64_t unit = p.deal.begin(blockIdx.x); unit < last;) {
      const int64_t tile = unit / p.deal.stages, begin = unit % p.deal.stages, left = begin + last - unit;
      const Segment s{tile, begin, left < p.deal.stages ? left : p.deal.stages};
      Sums sums = {};
      multiply_segment(p, s, sums);
      const bool whole = s.begin == 0 && s.end == p.deal.stages;
      if (whole || join(p, s, sums)) store(p, s.tile, sums);
      unit += s.end - s.begin;
    }
  }
};

template <int kTiles, int kFragments, LinearDtype kDtype>
__global__ __launch_bounds__(Multiply<kTiles, kFragments, kDtype>::kThreads, kBlocksPerMultiprocessor) void multiply(const Product p) {
  Multiply<kTiles, kFragments, kDtype>::run(p);
}

// ---------------------------------------------------------------------------------------------------------------- launching

constexpr int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

int64_t shared_bytes_of(int tiles) {
  return tiles == 1 ? sizeof(Shared<1>) : tiles == 2 ? sizeof(Shared<2>) : tiles == 4 ? sizeof(Shared<4>) : sizeof(Shared<8>);
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
