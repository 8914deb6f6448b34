// The kept blocks of g^T x, the gradient of a block-sparse weight, on tensor cores (mma.sync). Both operands lie with the summed dimension,
// m, as their rows; ldmatrix transposes them, elements of 32 bits are read one by one.
//
//   piece   kSide x kSide elements of a block; 16, 32, 64 or 128, as the sides of blocks divide by it
//   tile    pieces that follow each other, kColumns / kSide of them: what a threadblock sums at a time. Those in one line of the index (or
//           side by side in a block) share the columns of g, which are copied once:
//
//           g^T   |  0  |   -    -    -   |  4  |   -    -    -   |        columns of pieces 0 to 3 and 4 to 7
//           x     |  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |        each piece its own: kColumns in all
//   stage   kStageRows rows of all these columns in shared memory, swizzled; the next ones are on their way meanwhile
//
// The stages of all tiles are dealt to threadblocks equally (deal.cuh), unless dealing whole tiles takes no longer.
#include <cuda_runtime.h>

#include <cstdint>
#include <ptx.cuh>

#include "block_lines.cuh"
#include "block_tiles.cuh"
#include "deal.cuh"
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bitmask::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 256;    // of x in a tile, and of g at most
constexpr int kStages = 3;       // in shared memory
constexpr int kLeastStages = 4;  // that are worth a threadblock
constexpr int kJoinStages = 12;  // that take as long as to join tiles that are shared
constexpr int kTileBytes = 512;  // of shared memory, for what is known of a tile

// Of a stage in shared memory: g, then x.
constexpr int kDepthBytes = 64;  // of a column
constexpr int kOperandBytes = kColumns * kDepthBytes;
constexpr int kPlaceBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kPlaceBytes + kTileBytes;

// What the kernels are told.
struct Sampling {
  BlockSampleParams p;
  int64_t down, across;    // pieces of a block
  int64_t unit_rows;       // of g and x in a unit of the deal
  int64_t g_step, x_step;  // bytes from a row to the next one that a thread copies
  Deal deal;
  Join join;
};

// ---------------------------------------------------------------------------------------------------------------- pieces

struct Piece {
  int64_t row, col;  // of W; those past its edges if the piece is nowhere
  int64_t place;     // of its first element in values; -1 if there is no such piece
};

template <int kSide>
__device__ Piece find_piece(const Sampling& s, int64_t piece) {
  const int64_t block = piece / (s.down * s.across), inside = piece % (s.down * s.across);
  if (block >= s.p.index.blocks) return {s.p.rows, s.p.cols, -1};
  const int64_t row = inside / s.across * kSide, col = inside % s.across * kSide;
  const int64_t place = (block * s.p.block_rows + row) * s.p.block_cols + col;
  const int64_t line = s.p.lines[block], position = s.p.index.positions[block];
  const bool there = line >= 0 && line < s.p.index.lines && position >= 0 && position < s.p.index.limit;
  if (!there) return {s.p.rows, s.p.cols, place};
  return {line * s.p.block_rows + row, position * s.p.block_cols + col, place};
}

// ---------------------------------------------------------------------------------------------------------------- the product

// What it costs on sm_90a: cycles of a multiprocessor for a stage of bfloat16, 256 columns of x by kSide of g in 32 rows, counted in the
// SASS; where the second cache delivers 24 bytes a cycle to each, and mma.sync reaches 60% of what tensor cores can do. Not timed.
//
//   kSide                       128    64    32    16
//   from the second cache      1040   950   830   760    24 KB to 18 KB: 256 columns of x, those of g for half to an eighth of the pieces
//   shared memory               700   560   410   400    operands 512 to 256, copying the rest
//   tensor cores                850   430   210   110
//   instructions issued         360   280   240   210
//
// All are bound by the second cache, which is why neighbouring pieces share what is read of g. For m = 2048 and W [4096, 4096] that makes
// 15 us (128) to 86 us (16) of density 0.1, and 38 us to 216 us of 0.25, and up to 8 us more where tiles are shared.
//
// kSide  of a piece
template <LinearDtype kDtype, int kSide>
struct Sample {
  using Stored = typename Element<kDtype>::Stored;
  static constexpr int kWidth = sizeof(Stored);
  static constexpr int kStageRows = kDepthBytes / kWidth;
  using G = OperandTile<kColumns, kWidth, false, false>;
  using X = OperandTile<kColumns, kWidth, false, true>;
  static constexpr int kPieces = kColumns / kSide;  // of a tile
  static constexpr int kBlocksPerMultiprocessor = kSide == 128 ? 1 : 2;

  // A warp has kHeight x kWide elements of a piece, or kOwn pieces.
  static constexpr int kHeight = kSide < 64 ? kSide : kSide / 2;
  static constexpr int kWide = kSide < 64 ? kSide : 64;
  static constexpr int kOwn = kPieces > kWarps ? kPieces / kWarps : 1;
  static constexpr int kWarpsAcross = kSide / kWide;  // of a piece
  static constexpr int kWarpsDown = kSide / kHeight;  // the same
  using Product = WarpProduct<kDtype, G, X, kHeight, kWide>;
  using Sums = float[kOwn * Product::kFours][4];  // of all products of a thread
  static_assert(kWarps * Product::kScratchBytes <= kStages * kPlaceBytes);
  static_assert(kPieces * kWarpsAcross * kWarpsDown == kWarps * kOwn);

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32); }

  // The first of the warp's pieces in the tile, and the warp's part of it.
  static __device__ __forceinline__ int own_piece() { return warp() * kOwn / (kWarpsAcross * kWarpsDown); }
  static __device__ __forceinline__ int top() { return warp() / kWarpsAcross % kWarpsDown * kHeight; }
  static __device__ __forceinline__ int left() { return warp() % kWarpsAcross * kWide; }

  // What all threads know of the tile at hand, behind the stages.
  struct Tile {
    int64_t last;  // where the units of the threadblock end
    Segment segment;
    Piece pieces[kPieces];

    // The first piece that has the same columns of g as this one has.
    __device__ __forceinline__ int owner_of(int piece) const {
      while (piece > 0 && pieces[piece - 1].row == pieces[piece].row) --piece;
      return piece;
    }
  };
  static_assert(sizeof(Tile) <= kTileBytes);

  static __device__ __forceinline__ Tile& tile() {
    return *reinterpret_cast<Tile*>(ptx::dynamic_shared<uint8_t>() + kStages * kPlaceBytes);
  }

  static __device__ void begin_tile(const Sampling& s, int64_t unit) {
    __syncthreads();  // nobody needs the tile before
    const Segment segment = s.deal.segment(unit, tile().last);
    if (threadIdx.x == 0) tile().segment = segment;
    if (threadIdx.x < kPieces) tile().pieces[threadIdx.x] = find_piece<kSide>(s, segment.tile * kPieces + threadIdx.x);
    __syncthreads();
  }

  // What a thread copies of one operand: one chunk of some rows of a stage.
  struct Copier {
    static constexpr int kChunks = X::kRowChunks;     // of a row
    static constexpr int kRows = kThreads / kChunks;  // that the threads copy at a time
    static constexpr int kColumnsOfChunk = kChunkBytes / kWidth;

    uintptr_t next;  // address, in the row that the thread copies next
    int bytes;       // of a chunk that are there: all or none; of those past the edges of W there are zeros
    bool needed;     // else nothing is copied

    static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kChunks; }
    static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
    static __device__ __forceinline__ int piece() { return chunk() * kColumnsOfChunk / kSide; }
    static __device__ __forceinline__ int place() { return X::place(row(), chunk()); }

    // `corner`: the first of the piece's columns, of `columns`.
    __device__ __forceinline__ Copier(const void* matrix, int64_t columns, int64_t corner, int64_t first_row, bool owner) : needed(owner) {
      const int64_t column = corner + chunk() * kColumnsOfChunk % kSide;
      bytes = column < columns ? kChunkBytes : 0;
      next = reinterpret_cast<uintptr_t>(matrix) + static_cast<uintptr_t>(((first_row + row()) * columns + column) * kWidth);
    }

    // Asks for a stage, which has so many rows.
    __device__ __forceinline__ void copy(uint8_t* operand, int rows, int64_t step) {
#pragma unroll
      for (int i = 0; i < kStageRows; i += kRows) {
        if (needed) {
          ptx::copy_async_16(operand + place() + i * X::kRowBytes, reinterpret_cast<const void*>(next), row() + i < rows ? bytes : 0);
        }
        next += static_cast<uintptr_t>(step);
      }
    }
  };

  // A stage in shared memory, each by turns.
  struct Ring {
    int offset = 0;
    __device__ __forceinline__ void turn() { offset = offset == (kStages - 1) * kPlaceBytes ? 0 : offset + kPlaceBytes; }
  };

  static __device__ __forceinline__ void multiply_segment(const Sampling& s, Product (&products)[kOwn]) {
    uint8_t* const memory = ptx::dynamic_shared<uint8_t>();
    int g_origins[kOwn], x_origins[kOwn];
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const int piece = own_piece() + own;
      g_origins[own] = G::origin(lane(), tile().owner_of(piece) * kSide + top());
      x_origins[own] = X::origin(lane(), piece * kSide + left());
    }
    const int64_t first_row = tile().segment.begin * s.unit_rows, end = tile().segment.end * s.unit_rows;
    const int64_t rows = (end < s.p.m ? end : s.p.m) - first_row;
    const int stages = static_cast<int>((rows + kStageRows - 1) / kStageRows);
    const int last_rows = static_cast<int>(rows - int64_t{stages - 1} * kStageRows);
    const Piece piece = tile().pieces[Copier::piece()];
    Copier g(s.p.g, s.p.rows, piece.row, first_row, tile().owner_of(Copier::piece()) == Copier::piece());
    Copier x(s.p.x, s.p.cols, piece.col, first_row, true);
    Ring to, from;
    const auto copy = [&](int stage) {
      if (stage < stages) {
        const int rows = stage == stages - 1 ? last_rows : kStageRows;
        g.copy(memory + to.offset, rows, s.g_step);
        x.copy(memory + to.offset + kOperandBytes, rows, s.x_step);
      }
      ptx::copy_async_commit();
      to.turn();
    };
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      copy(stage + kStages - 1);
      const uint8_t *const g_stage = memory + from.offset, *const x_stage = g_stage + kOperandBytes;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        products[own].template add_stage<kDepthBytes / kStepBytes>(g_stage, g_origins[own], x_stage, x_origins[own]);
      }
      from.turn();
    }
  }

  static __device__ __forceinline__ int at_most(int64_t count, int most) { return count < most ? static_cast<int>(count) : most; }

  // Rounds and stores: zero past the edges of W.
  static __device__ __forceinline__ void store(const Sampling& s, Product (&products)[kOwn]) {
    const bool sound = is_proven(s.p.fault);
    uint8_t* const scratch = ptx::dynamic_shared<uint8_t>() + warp() * Product::kScratchBytes;
    __syncthreads();  // all stages have been multiplied
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const Piece piece = tile().pieces[own_piece() + own];
      if (piece.place < 0) continue;
      products[own].clear_past(at_most(s.p.rows - piece.row - top(), kHeight), at_most(s.p.cols - piece.col - left(), kWide));
      if (!sound) products[own].add_term([](int) { return not_a_number(); });
      Stored* const target = static_cast<Stored*>(s.p.values) + piece.place + top() * s.p.block_cols + left();
      products[own].store(scratch, reinterpret_cast<uint8_t*>(target), s.p.block_cols * kWidth, kHeight, kWide, true);
    }
  }

  static __device__ __forceinline__ void run(const Sampling& s) {
    if (threadIdx.x == 0) tile().last = s.deal.begin(blockIdx.x + 1);
    int64_t unit = s.deal.begin(blockIdx.x);
    do {
      begin_tile(s, unit);
      Product products[kOwn];
      multiply_segment(s, products);
      if (s.join.add<kThreads>(s.deal, tile().segment, reinterpret_cast<Sums&>(products))) store(s, products);
      unit = tile().segment.tile * s.deal.stages + tile().segment.end;
    } while (unit < tile().last);
  }
};

template <LinearDtype kDtype, int kSide>
__global__ __launch_bounds__(kThreads, (Sample<kDtype, kSide>::kBlocksPerMultiprocessor)) void sample(const __grid_constant__ Sampling s) {
  Sample<kDtype, kSide>::run(s);
}

// ---------------------------------------------------------------------------------------------------------------- launching

// The largest piece that blocks are made of.
int side_of(const BlockSampleParams& p) {
  int side = 128;
  while (p.block_rows % side != 0 || p.block_cols % side != 0) side /= 2;
  return side;
}

struct Plan {
  int side;
  Deal deal;
  int64_t unit_rows;
  JoinSpace join;
};

Plan plan(const BlockSampleParams& p, const Device& device) {
  const int side = side_of(p);
  const int64_t stage_rows = kDepthBytes / width_of(p.dtype), stages = p.m == 0 ? 1 : blocks_across(p.m, stage_rows);
  const int64_t reserved = 1024;  // bytes that every threadblock takes besides
  const int64_t fit = side < 128 && device.shared_bytes + reserved >= 2 * (kSharedBytes + reserved) ? 2 : 1;
  const int64_t resident = device.multiprocessors * fit;
  const int64_t tiles = blocks_across(p.index.blocks * (p.block_rows / side) * (p.block_cols / side), kColumns / side);
  const int64_t units = tiles * stages;
  if (blocks_across(tiles, resident) * stages <= blocks_across(units, resident) + kJoinStages) {
    return {side, {1, tiles, tiles < resident ? tiles : resident}, stages * stage_rows, {}};
  }
  const int64_t worth = units / kLeastStages;
  const Deal deal = {stages, units, worth < resident ? worth : resident};
  return {side, deal, stage_rows, {deal, kColumns * side}};
}

template <LinearDtype kDtype>
auto kernel_of(int side) {
  return side == 128 ? sample<kDtype, 128> : side == 64 ? sample<kDtype, 64> : side == 32 ? sample<kDtype, 32> : sample<kDtype, 16>;
}

}  // namespace

bool block_sample_takes(const BlockSampleParams& p, const Device& device) {
  const auto aligned = [&](const void* pointer, int64_t columns) {
    return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0 && columns * width_of(p.dtype) % kChunkBytes == 0;
  };
  const bool dtype = p.dtype == kBfloat16 || p.dtype == kFloat16 || (p.dtype == kFloat32 && p.tf32);
  const bool sides = p.block_rows > 0 && p.block_cols > 0 && p.block_rows % 16 == 0 && p.block_cols % 16 == 0;
  const bool memory = aligned(p.g, p.rows) && aligned(p.x, p.cols) && aligned(p.values, 0);
  return dtype && sides && memory && device.shared_bytes >= kSharedBytes;
}

int64_t block_sample_workspace_bytes(const BlockSampleParams& params, const Device& device) {
  if (!block_sample_takes(params, device) || params.index.blocks == 0) return 0;
  return plan(params, device).join.bytes();
}

cudaError_t block_sample(const BlockSampleParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (!block_sample_takes(params, device)) return cudaErrorInvalidValue;
  if (params.index.blocks == 0) return cudaSuccess;
  const Plan plan = cuda::plan(params, device);
  const int64_t down = params.block_rows / plan.side, across = params.block_cols / plan.side;
  const int64_t step = kThreads * kChunkBytes / kColumns;  // bytes of a column that threads copy at a time, whatever the dtype
  const Join join = plan.join.at(workspace);
  const Sampling sampling = {params, down, across, plan.unit_rows, step * params.rows, step * params.cols, plan.deal, join};
  const cudaError_t error = plan.join.clear(join, stream);
  if (error != cudaSuccess) return error;
  const auto kernel = params.dtype == kBfloat16  ? kernel_of<kBfloat16>(plan.side)
                      : params.dtype == kFloat16 ? kernel_of<kFloat16>(plan.side)
                                                 : kernel_of<kFloat32>(plan.side);
  return launch_kernel(kernel, {plan.deal.blocks, kThreads, kSharedBytes}, stream, sampling);
}

}  // namespace bitmask::cuda
