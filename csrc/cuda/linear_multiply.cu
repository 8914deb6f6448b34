// y = x W^T + bias for some rows of x: tensor cores, W expanded in registers (linear_multiply.cuh).
//
// A block takes tiles of kTileRows rows of W, a stage of kStageColumns columns at a time: while one stage is multiplied, the values and x
// of the next one and the bitmask of the one after that are on their way to shared memory. The stages of all tiles are dealt to blocks
// (deal.cuh); where one begins inside of a tile, its rows' values begin where `count` has counted to.
#include "linear_multiply.cuh"

#include <cuda_runtime.h>

#include <cstdint>

#include "deal.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "linear_multiply.h"

namespace bitmask::cuda {
namespace {

constexpr int kTileRows = 128;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kLeastStages = 2;  // that are worth a block

// What the kernels are told.
struct Product {
  BitmaskMatrix w;
  int64_t row_bytes;  // of its bitmask
  Pieces values, bitmasks;
  uintptr_t x;  // address
  const uint16_t* bias;
  uint16_t* y;
  int64_t m;
  bool x_aligned;  // its rows, to 16 bytes
  Deal deal;
  Join join;
  int64_t* counts;  // [blocks][kTileRows]: values in the stages of the tile that this block does not end
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
  if (threadIdx.x == 0) p.join.arrived[blockIdx.x] = 0;
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

// Strides that are 4 banks (values, bits: 12) or 8 (x) more than a multiple of 32 keep the eight rows of an operand apart.
constexpr int kXStride = kStageColumns * kWidth + 32;

struct Values {
  uint8_t before[16];  // slots are read up to 4 bytes before and 8 bytes after what they hold; this is masked
  uint8_t slots[kTileRows][kSlotBytes];
};

template <int kTiles>
struct Shared {
  Values values[2];
  uint8_t after[16];
  uint8_t bits[kTileRows][kBitsBytes];
  uint8_t x[2][8 * kTiles][kXStride];
};

// An offset from the beginning of shared memory, in one of two buffers by turns. Carried from stage to stage, as compilers would otherwise
// compute it anew wherever it is used.
struct Turning {
  uint32_t offset, sum;

  // `first`: in the buffer that comes first; the other one is `distance` bytes on.
  __device__ __forceinline__ Turning(const void* memory, const void* first, int64_t distance) {
    offset = static_cast<uint32_t>(static_cast<const uint8_t*>(first) - static_cast<const uint8_t*>(memory));
    sum = 2 * offset + static_cast<uint32_t>(distance);
  }
  __device__ __forceinline__ void turn() { offset = sum - offset; }
};

// ---------------------------------------------------------------------------------------------------------------- rows of x

// What a thread copies of x: one piece of each of some rows.
template <int kTiles, int kThreads>
struct XCopier {
  static constexpr int kPieces = kStageColumns * kWidth / 16;  // of a row in a stage
  static constexpr int kRows = kThreads / kPieces;             // that the threads copy at a time

  uintptr_t next;  // address, in the first row
  int64_t stride;  // between rows
  int rows;        // from the first one on
  bool aligned;
  Turning slot;

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kPieces; }
  static __device__ __forceinline__ int piece() { return static_cast<int>(threadIdx.x) % kPieces; }

  __device__ __forceinline__ XCopier(const Product& p, int64_t stage, const Shared<kTiles>& shared)
      : next(p.x + static_cast<uintptr_t>((row() * p.w.cols + stage * kStageColumns + 8 * piece()) * kWidth)),
        stride(p.w.cols * kWidth),
        rows(static_cast<int>(p.m < 8 * kTiles ? p.m : 8 * kTiles) - row()),
        aligned(p.x_aligned),
        slot(&shared, reinterpret_cast<const uint8_t*>(shared.x) + row() * kXStride + 16 * piece(), sizeof(shared.x[0])) {}

  __device__ __forceinline__ const void* source(int i) const {
    return reinterpret_cast<const void*>(next + static_cast<uintptr_t>(i * stride));
  }

  // Asks for a stage, `columns` being left. Where there is no column there are zeros, where there is no row there is anything.
  __device__ __forceinline__ void copy(int64_t columns, uint8_t* shared) {
    if (aligned && columns >= kStageColumns) {
#pragma unroll
      for (int i = 0; i < 8 * kTiles; i += kRows) {
        if (i < rows) ptx::copy_async_16(shared + slot.offset + i * kXStride, source(i));
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < rows; i += kRows) {
        uint16_t* const dst = reinterpret_cast<uint16_t*>(shared + slot.offset + i * kXStride);
        const uint16_t* const src = static_cast<const uint16_t*>(source(i));
#pragma unroll 1
        for (int j = 0; j < 8; ++j) dst[j] = 8 * piece() + j < columns ? src[j] : uint16_t{0};
      }
    }
    next += kStageColumns * kWidth;
    slot.turn();
  }
};

// ---------------------------------------------------------------------------------------------------------------- rows of W

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

// The rows of W that a lane reads, each with three other lanes, and what it copies of them.
//
// kFragments  rows of a warp, in sixteens
template <int kFragments>
struct WCopier {
  static constexpr int kRows = 2 * kFragments;  // of the lane: g + 8 i of the warp's, with g = lane / 4

  const Product& p;
  const Segment segment;
  const int t = static_cast<int>(threadIdx.x % 4);  // which of the row's lanes
  Row rows[kRows];
  uint32_t skews[kRows];           // of the rows' bits in their slots
  int64_t bits_place[kFragments];  // in bitmasks, of the piece that the lane copies next: lanes 0 and 1 for the upper row of a fragment
  bool copies_bits[kFragments];    // that the lane has in it, lanes 2 and 3 for the lower one; whether such a piece is needed
  Turning slot;                    // for the values of the first row

  // The lane's row i in a tile.
  static __device__ __forceinline__ int tile_row(int i) {
    return static_cast<int>(threadIdx.x / 32 * 16 * kFragments + threadIdx.x % 32 / 4) + 8 * i;
  }

  // The lane's row i of W; the last one instead of those that are not there.
  __device__ __forceinline__ int64_t row_of(int i) const {
    const int64_t row = segment.tile * kTileRows + tile_row(i);
    return row < p.w.rows ? row : p.w.rows - 1;
  }

  template <int kTiles>
  __device__ __forceinline__ WCopier(const Product& product, const Segment& stages, const Shared<kTiles>& shared)
      : p(product), segment(stages), slot(&shared, shared.values[0].slots[tile_row(0)], sizeof(Values)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      rows[i] = {p.values.begin + position_of(row_of(i)) * kWidth, 0, {}, 0};
      skews[i] = static_cast<uint32_t>(p.bitmasks.begin + row_of(i) * p.row_bytes) % 16;
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const int64_t place = p.bitmasks.begin + row_of(2 * i + t / 2) * p.row_bytes + segment.begin * kStageBytes;
      copies_bits[i] = t % 2 == 0 || (place & 15) != 0;
      bits_place[i] = (place & ~int64_t{15}) + 16 * (t % 2);
    }
  }

  // Where the values of a row begin in the segment.
  __device__ __forceinline__ int64_t position_of(int64_t row) const {
    int64_t position;
    if (!find_row(p, row, &position)) position = 0;  // row_holds will tell
    if (segment.begin == 0) return position;
    for (int64_t block = p.deal.block_of(segment.tile * p.deal.stages); block < blockIdx.x; ++block) {
      position += p.counts[block * kTileRows + row % kTileRows];
    }
    return position;
  }

  // Asks for the bits of the stage that follows those that have been asked for.
  template <int kTiles>
  __device__ __forceinline__ void copy_bits(Shared<kTiles>& shared) {
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

  // Takes the bits of a stage, which are there, and asks for its values, and for the bits of the next one unless it is the last one.
  template <int kTiles>
  __device__ __forceinline__ void copy_stage(int64_t columns, bool last, Shared<kTiles>& shared) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) read_bits(shared.bits[tile_row(i)], skews[i], columns, rows[i].bits);
    __syncwarp();
    if (!last) copy_bits(shared);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      copy_values(p.values, rows[i], t, reinterpret_cast<uint8_t*>(&shared), slot.offset + static_cast<uint32_t>(8 * i * kSlotBytes));
    }
    slot.turn();
  }
};

// ---------------------------------------------------------------------------------------------------------------- the product

// What it costs on sm_90a, counted in the SASS for half of W zero: cycles of a multiprocessor for 32 elements of W, where an H100 delivers
// their bytes in 2.7 and an H200 in 1.9 cycles (a dense W: 4.8 and 3.3). Not timed.
//
//   rows of x                     8    16    32    64
//   instructions issued         2.2   2.3   2.2   2.5    one for each of four schedulers a cycle; half are integer ALU, which has half that
//   rate shared memory               2.2   2.5   2.5   3.0    values 1.5 (2.3 lanes on the busiest bank), x 0.25 to 1, bits 0.15, copying
//   0.35 tensor cores, at most       0.3   0.5   1.0   2.0
//
// kTiles      rows of x, in eights
// kFragments  rows of W that a warp multiplies them with, in sixteens: more rows use an operand of x more often, but leave fewer warps
template <int kTiles, int kFragments, LinearDtype kDtype>
struct Multiply {
  static constexpr int kThreads = kTileRows / (16 * kFragments) * 32;
  static constexpr int kRows = WCopier<kFragments>::kRows;
  using Sums = float[kFragments][kTiles][4];

  // 16 columns of all rows. `x` is where the lane's elements of the first tile of x are.
  template <int kStep>
  static __device__ __forceinline__ void step(const uint8_t* memory, const Nibbles (&nibbles)[kRows], const uint32_t (&words)[kRows],
                                              const uint32_t (&places)[kRows], const uint8_t* x, Sums& sums) {
    const int t = static_cast<int>(threadIdx.x % 4);
    const uint32_t to_first = __brev(1u << (4 * t + 16 * (kStep % 2)));  // times a word: leaves the bits up to the first column's
    uint32_t a[kFragments][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t place = places[i] + kWidth * static_cast<uint32_t>(__popc(words[i] * to_first));
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

  static __device__ __forceinline__ void multiply_stage(const uint8_t* memory, const Row (&rows)[kRows], const uint8_t* x, Sums& sums) {
    uint32_t places[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) places[i] = rows[i].origin;
#pragma unroll
    for (int half = 0; half < 2; ++half, x += kStageColumns / 2 * kWidth) {
      uint32_t words[2][kRows];
      Nibbles nibbles[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        words[0][i] = rows[i].bits[2 * half];
        words[1][i] = rows[i].bits[2 * half + 1];
        nibbles[i] = nibbles_of(words[0][i], words[1][i], static_cast<int>(threadIdx.x % 4));
      }
      step<0>(memory, nibbles, words[0], places, x, sums);
      step<1>(memory, nibbles, words[0], places, x, sums);
#pragma unroll
      for (int i = 0; i < kRows; ++i) places[i] += kWidth * static_cast<uint32_t>(__popc(words[0][i]));
      step<2>(memory, nibbles, words[1], places, x, sums);
      step<3>(memory, nibbles, words[1], places, x, sums);
#pragma unroll
      for (int i = 0; i < kRows; ++i) places[i] += kWidth * static_cast<uint32_t>(__popc(words[1][i]));
    }
  }

  // The sums of a segment. Where it ends its tile, its rows are proven: those of a faulty one become NaN.
  static __device__ __forceinline__ void multiply_segment(const Product& p, const Segment& segment, Sums& sums) {
    Shared<kTiles>& shared = *ptx::dynamic_shared<Shared<kTiles>>();
    uint8_t* const memory = reinterpret_cast<uint8_t*>(&shared);
    WCopier<kFragments> w(p, segment, shared);
    XCopier<kTiles, kThreads> x(p, segment.begin, shared);
    const uint8_t* const second = shared.x[1][threadIdx.x % 32 / 4] + threadIdx.x % 4 * 4 * kWidth;
    Turning operand(&shared, second, -static_cast<int64_t>(sizeof(shared.x[0])));
    const int64_t stages = segment.end - segment.begin;
    int64_t columns = p.w.cols - segment.begin * kStageColumns;
    w.copy_bits(shared);
    ptx::copy_async_commit();
    for (int64_t left = stages; left >= 0; --left) {  // stages to ask for; the one before is multiplied meanwhile
      ptx::copy_async_wait<0>();
      __syncthreads();
      Row rows[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        rows[i] = w.rows[i];
        w.rows[i].place += rows[i].bytes;
      }
      if (left > 0) {
        w.copy_stage(columns, left == 1, shared);
        x.copy(columns, memory);
      }
      ptx::copy_async_commit();
      if (left < stages) multiply_stage(memory, rows, memory + operand.offset, sums);
      operand.turn();
      columns -= kStageColumns;
    }
    if (segment.end < p.deal.stages) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row_holds(p, w.row_of(i), (w.rows[i].place - p.values.begin) / kWidth)) continue;
#pragma unroll
      for (auto& tile : sums[i / 2]) tile[i % 2 * 2] = tile[i % 2 * 2 + 1] = __uint_as_float(0x7fffffff);  // NaN
    }
  }

  // Adds the bias, rounds and stores.
  static __device__ __forceinline__ void store(const Product& p, int64_t tile_of_w, const Sums& sums) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = tile_of_w * kTileRows + WCopier<kFragments>::tile_row(i);
      if (row >= p.w.rows) continue;
      const float bias = p.bias == nullptr ? 0 : Element<kDtype>::widen(p.bias[row]);
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        const int64_t x_row = 8 * (j / 2) + 2 * static_cast<int>(threadIdx.x % 4) + j % 2;
        if (x_row < p.m) p.y[x_row * p.w.rows + row] = Element<kDtype>::narrow(sums[i / 2][j / 2][i % 2 * 2 + j % 2] + bias);
      }
    }
  }

  // All segments of a block.
  static __device__ __forceinline__ void run(const Product& p) {
    const int64_t last = p.deal.begin(blockIdx.x + 1);
    for (int64_t unit = p.deal.begin(blockIdx.x); unit < last;) {
      const Segment s = p.deal.segment(unit, last);
      Sums sums = {};
      multiply_segment(p, s, sums);
      if (p.join.add<kThreads>(p.deal, s, reinterpret_cast<float (&)[kFragments * kTiles][4]>(sums))) store(p, s.tile, sums);
      unit += s.end - s.begin;
    }
  }
};

template <int kTiles, int kFragments, LinearDtype kDtype>
__global__ __launch_bounds__(Multiply<kTiles, kFragments, kDtype>::kThreads, kBlocksPerMultiprocessor) void multiply(const Product p) {
  Multiply<kTiles, kFragments, kDtype>::run(p);
}

// ---------------------------------------------------------------------------------------------------------------- launching

int64_t shared_bytes_of(int tiles) {
  return tiles == 1 ? sizeof(Shared<1>) : tiles == 2 ? sizeof(Shared<2>) : tiles == 4 ? sizeof(Shared<4>) : sizeof(Shared<8>);
}

struct Plan {
  int tiles;  // rows of x that a launch takes, in eights
  Deal deal;
  JoinSpace join;
  int64_t counts_bytes;
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
  plan.join = {plan.deal, kTileRows * 8 * plan.tiles};
  plan.counts_bytes = plan.deal.whole_tiles() ? 0 : plan.deal.blocks * kTileRows * sizeof(int64_t);
  return plan;
}

template <int kTiles, int kFragments>
cudaError_t launch_multiply(const Product& product, LinearDtype dtype, cudaStream_t stream) {
  const bool half = dtype == kFloat16;
  return launch_kernel(half ? multiply<kTiles, kFragments, kFloat16> : multiply<kTiles, kFragments, kBfloat16>,
                       {product.deal.blocks, Multiply<kTiles, kFragments, kBfloat16>::kThreads, sizeof(Shared<kTiles>)}, stream, product);
}

}  // namespace

int64_t linear_multiply_workspace_bytes(const LinearParams& params, const Device& device) {
  if (params.m == 0 || params.w.rows == 0) return 0;
  const Plan p = plan(params, device);
  return p.join.bytes() + p.counts_bytes;
}

cudaError_t linear_multiply(const LinearParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (params.dtype != kBfloat16 && params.dtype != kFloat16) return cudaErrorInvalidValue;
  if (params.m == 0 || params.w.rows == 0) return cudaSuccess;
  const Plan plan = cuda::plan(params, device);
  Product product = {};
  product.w = params.w;
  product.row_bytes = bitmask_bytes(params.w.cols);
  product.values = pieces_of(params.w.values, params.w.nnz * kWidth, kSlotBytes);
  product.bitmasks = pieces_of(params.w.bitmasks, params.w.rows * product.row_bytes, 16);
  product.bias = static_cast<const uint16_t*>(params.bias);
  product.deal = plan.deal;
  product.join = plan.join.at(workspace);
  product.counts = reinterpret_cast<int64_t*>(static_cast<uint8_t*>(workspace) + plan.join.bytes());
  product.x_aligned = params.w.cols > 0 && reinterpret_cast<uintptr_t>(params.x) % 16 == 0 && params.w.cols * kWidth % 16 == 0;
  for (int64_t first = 0; first < params.m; first += 8 * plan.tiles) {
    product.x = reinterpret_cast<uintptr_t>(params.x) + static_cast<uintptr_t>(first * params.w.cols * kWidth);
    product.y = static_cast<uint16_t*>(params.y) + first * params.w.rows;
    product.m = params.m - first;
    if (!plan.deal.whole_tiles()) {
      const cudaError_t error = launch_kernel(count, {product.deal.blocks, 4 * kTileRows}, stream, product);
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
