// Products with a block-sparse weight on tensor cores, by the instructions that every GPU from sm_80 on has: y = x W^T + bias by the index
// by rows or, transposed, y = x W by the index by columns, where the values stay as they are and operands are transposed while loaded.
//
//   line of blocks    | 3 |   | 7 |     | 9 |         only depth that is kept is walked, as if it lay side by side: stages do not end with
//   slices            |0 1 2 3|4 5 6 7|8 9 ..         blocks, which are cut into slices of 16. A table in shared memory says where the
//   stages            |   0   |   1   |   2           slices of the next stages lie in x and in values; one warp makes it, proving them.
//
// A threadblock does a tile: rows of x by a strip of a line, which is the line or, of a wide one, a part. Stages are copied by cp.async
// into a ring in shared memory, of which one is multiplied while others are on their way. The GPU takes threadblocks in their order: those
// that have the same rows of x together, as these stay in its second cache, and of them those of long lines first. Where there are few
// tiles, several threadblocks share one, each a part of its stages (deal.cuh).
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "block_lines.cuh"
#include "block_tiles.cuh"
#include "deal.cuh"
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bitmask::cuda {
namespace {

constexpr int kSliceDepth = 16;
constexpr int kBatch = 32;  // slices that a warp finds at a time
constexpr int kMostStages = 4;
constexpr int kMostParts = 8;    // of a tile
constexpr int kLeastStages = 4;  // of a line, on average, that are worth a threadblock
constexpr int kMostWaves = 16;   // of threadblocks, before the order of lines no longer matters

// What the kernels are told.
struct Product {
  BlockParams params;
  int64_t x_stride, w_stride, y_stride;  // bytes, between rows of x, of a block and of y
  const int32_t* schedule;               // [lines]; null: any order will do
  uint32_t strips, strips_of_line;       // strips: of all lines
  uint32_t slices;                       // of a block
  int stages;                            // that the ring holds
  bool whole_chunks;                     // whether y's rows are aligned to 16 bytes
  Deal deal;                             // its stages are parts of a tile: where they begin depends on the line
  Join join;
};

// 16 elements of depth of a kept block.
struct Slice {
  int64_t x;  // bytes from the beginning of a row
  int64_t w;  // bytes from the beginning of values
  int depth;  // that there is: less than all past the edge of W, 0 past the end of the line
};

// Shared memory without which the largest tile has no two stages.
constexpr int64_t kLeastShared = 2 * (256 + 128) * kStageBytes + 2 * kBatch * sizeof(Slice);

// Tiles of so many rows of x may be shared by threadblocks.
constexpr int kFewRows = 64;

constexpr int threads_of(int rows) { return rows == 256 ? 256 : 128; }

// Threadblocks that a multiprocessor is to hold: what registers allow.
constexpr int resident_of(int rows, int across) { return rows < 256 ? 3 : 128 / across; }

// ---------------------------------------------------------------------------------------------------------------- a tile

// What a stage of bfloat16 or float16 costs a multiprocessor of an H100, in cycles: mma.sync at 60% of the peak; bytes that shared memory
// takes and gives, 128 a cycle; bytes of the second cache, of whose 5.5 TB/s a multiprocessor gets 24 a cycle; instructions counted in the
// SASS, for each of four schedulers. Not timed. The second cache sets the pace: x is copied anew for each line, as lines have other blocks.
//
//   rows x across     256 x 128   256 x 64   128 x 32   128 x 16   64 x 128   64 x 64   64 x 32   64 x 16
//   tensor cores           1706        853        213        107        427       213       107        53
//   shared memory          1408       1088        416        336        576       384       288       208
//   second cache           2048       1707        853        768       1024       683       512       427
//   instructions            574        436        169        156        215       158       120       128
//
// kTileRows    rows of x
// kAcross      columns of y: of a line, or of a strip of it
// kTransposed  whether the depth of a block is its rows
template <int kTileRows, int kAcross, LinearDtype kDtype, bool kTransposed>
struct Multiply {
  // Transposed float32 operands are loaded word by word: for as many threadblocks as of others, sm_80 would spill.
  static constexpr int kResident = kDtype == kFloat32 && kTransposed && kTileRows == 256 ? 1 : resident_of(kTileRows, kAcross);
  static constexpr int kWidth = sizeof(typename Element<kDtype>::Stored);
  static constexpr bool kShared = kTileRows == kFewRows;
  static constexpr int kOfChunk = kChunkBytes / kWidth;  // elements
  static constexpr int kThreads = threads_of(kTileRows);
  static constexpr int kWarpAcross = kAcross < 32 ? kAcross : kAcross < 128 ? 32 : 64;
  static constexpr int kWarpRows = kTileRows * kAcross / (kThreads / 32) / kWarpAcross;
  static constexpr int kStageSlices = kStageBytes / (kSliceDepth * kWidth);
  static constexpr int kBatchStages = kBatch / kStageSlices;
  using X = OperandTile<kTileRows, kWidth, true, false>;
  using W = OperandTile<kAcross, kWidth, !kTransposed, true>;
  static constexpr int kPlaceBytes = X::kBytes + W::kBytes;  // of a stage in the ring
  using Sums = WarpProduct<kDtype, X, W, kWarpRows, kWarpAcross>;

  const Product& p;
  const BlockParams& params = p.params;
  uint8_t* const ring = ptx::dynamic_shared<uint8_t>();
  Slice* const table = reinterpret_cast<Slice*>(ring + p.stages * kPlaceBytes);  // [2 * kBatch]
  BlockLine line;
  int64_t row, column;  // of y, the first ones
  int rows, columns;    // of y that there are
  int lines;            // of W that the strip has: as many as columns, or some past the edge of W
  int begin, end;       // stages of the line

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int at_most(int64_t count, int most) { return count < most ? static_cast<int>(count) : most; }

  __device__ __forceinline__ Multiply(const Product& product, const Segment& segment, int64_t number, int64_t strip)
      : p(product), line(product.params.index, number) {
    const int64_t first = strip * kAcross;
    row = int64_t{static_cast<uint32_t>(segment.tile) / p.strips} * kTileRows;
    column = number * params.block_across() + first;
    rows = at_most(params.m - row, kTileRows);
    columns = at_most(params.across() - column, at_most(params.block_across() - first, kAcross));
    lines = at_most(params.block_across() - first, kAcross);
    const int64_t slices = line.sound ? (line.end - line.begin) * p.slices : 0;
    const int stages = static_cast<int>((slices + kStageSlices - 1) / kStageSlices), parts = static_cast<int>(p.deal.stages);
    begin = kShared ? stages * static_cast<int>(segment.begin) / parts : 0;
    end = kShared ? stages * static_cast<int>(segment.end) / parts : stages;
  }

  // Slice `number` of the line; lowers `line.sound` if it cannot be.
  __device__ __forceinline__ Slice find_slice(uint32_t number) {
    const int64_t i = line.begin + number / p.slices;
    if (i >= line.end) return {0, 0, 0};
    const int64_t position = params.index.positions[i], place = place_of(params.index, i);
    if (!line.holds(params.index, i, position) || !is_place(params.index, place)) {
      line.sound = false;
      return {0, 0, 0};
    }
    const int64_t inside = number % p.slices * kSliceDepth, depth = position * params.block_depth() + inside;
    const int64_t left = params.depth() - depth, block = place * params.block_rows * params.block_cols;
    const int64_t element = block + inside * (kTransposed ? params.block_cols : 1);
    return {depth * kWidth, element * kWidth, left < 0 ? 0 : at_most(left, kSliceDepth)};
  }

  // The first warp finds the slices of a batch of stages.
  __device__ __forceinline__ void find_batch(int batch) {
    const int first = begin * kStageSlices + batch * kBatch;
    if (thread() < kBatch && first < end * kStageSlices) {
      table[batch % 2 * kBatch + thread()] = find_slice(static_cast<uint32_t>(first + thread()));
    }
  }

  // What a thread copies of the tiles of an operand: a chunk of each of some rows, as far apart as threads copy rows at a time.
  template <typename Tile>
  struct Copier {
    static constexpr int kStep = kThreads / Tile::kRowChunks;
    static_assert(kStep % Tile::kPeriod == 0 && Tile::kRows % kStep == 0);

    uintptr_t from;  // address of its first row in the first slice that there may be
    int left;        // of lines, from the thread's on

    static __device__ __forceinline__ int row() { return thread() / Tile::kRowChunks; }
    static __device__ __forceinline__ int chunk() { return thread() % Tile::kRowChunks; }
    static __device__ __forceinline__ void copy(uint8_t* place, uintptr_t address, bool there) {
      ptx::copy_async_16(place, reinterpret_cast<const void*>(address), there ? kChunkBytes : 0);
    }

    // Rows are lines, `stride` bytes apart.
    __device__ __forceinline__ void copy_lines(uint8_t* tile, const Slice* slices, int64_t Slice::* offset, int64_t stride) const {
      const Slice& slice = slices[chunk() / kWidth];  // which has kWidth chunks
      const bool there = chunk() % kWidth * kOfChunk < slice.depth;
      uintptr_t line = from + static_cast<uintptr_t>(slice.*offset);
      uint8_t* const place = tile + Tile::place(row(), chunk());
#pragma unroll
      for (int i = 0; i < Tile::kRows; i += kStep, line += static_cast<uintptr_t>(kStep * stride)) {
        copy(place + i * Tile::kRowBytes, line, there && i < left);
      }
    }

    // Rows are of one element of depth.
    __device__ __forceinline__ void copy_depths(uint8_t* tile, const Slice* slices, int64_t Slice::* offset, int64_t stride) const {
      uint8_t* const place = tile + Tile::place(row(), chunk());
#pragma unroll
      for (int i = 0; i < Tile::kRows; i += kStep) {
        const Slice& slice = slices[row() / kSliceDepth + i / kSliceDepth];
        const bool there = row() % kSliceDepth + i % kSliceDepth < slice.depth;
        const uintptr_t line = from + static_cast<uintptr_t>(slice.*offset + i % kSliceDepth * stride);
        copy(place + i * Tile::kRowBytes, line, there && left > 0);
      }
    }
  };

  static __device__ __forceinline__ uintptr_t address(const void* array, int64_t offset) {
    return reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(offset);
  }

  __device__ __forceinline__ Copier<X> copier_of_x() const {
    using Copier = Copier<X>;
    const int64_t first = (row + Copier::row()) * p.x_stride + Copier::chunk() % kWidth * kChunkBytes;
    return {address(params.x, first), rows - Copier::row()};
  }

  __device__ __forceinline__ Copier<W> copier_of_w(int64_t first) const {
    using Copier = Copier<W>;
    if constexpr (kTransposed) {
      const int line = Copier::chunk() * kOfChunk;
      return {address(params.values, Copier::row() % kSliceDepth * p.w_stride + (first + line) * kWidth), lines - line};
    } else {
      const int64_t offset = (first + Copier::row()) * p.w_stride + Copier::chunk() % kWidth * kChunkBytes;
      return {address(params.values, offset), lines - Copier::row()};
    }
  }

  // Asks for a stage, counted from the first one. Its slices are known; those of the batch after are found meanwhile.
  __device__ __forceinline__ void copy_stage(int stage, uint8_t* tiles, const Copier<X>& x, const Copier<W>& w) {
    const Slice* const slices = table + stage * kStageSlices % (2 * kBatch);
    x.copy_lines(tiles, slices, &Slice::x, p.x_stride);
    if constexpr (kTransposed) {
      w.copy_depths(tiles + X::kBytes, slices, &Slice::w, p.w_stride);
    } else {
      w.copy_lines(tiles + X::kBytes, slices, &Slice::w, p.w_stride);
    }
    if (stage % kBatchStages == 0) find_batch(stage / kBatchStages + 1);
  }

  static __device__ __forceinline__ int warp_row() { return thread() / 32 / (kAcross / kWarpAcross) * kWarpRows; }
  static __device__ __forceinline__ int warp_column() { return thread() / 32 % (kAcross / kWarpAcross) * kWarpAcross; }

  // The sums of the stages. Warps all of whose results are past the edges have none.
  __device__ __forceinline__ void multiply_stages(Sums& sums, int64_t strip) {
    const Copier<X> x = copier_of_x();
    const Copier<W> w = copier_of_w(strip * kAcross);
    const bool active = warp_row() < rows && warp_column() < columns;
    const int x_origin = X::origin(thread() % 32, warp_row()), w_origin = W::origin(thread() % 32, warp_column());
    const int last = (p.stages - 1) * kPlaceBytes;  // of the places in the ring
    find_batch(0);
    __syncthreads();
    int to = 0, from = 0;
    for (int ahead = 0; ahead < end - begin + p.stages - 1; ++ahead) {  // the stage to ask for
      const bool filled = ahead >= p.stages - 1;
      if (filled) {
        copy_async_wait(p.stages - 2);
        __syncthreads();
      }
      if (ahead < end - begin) copy_stage(ahead, ring + to, x, w);
      ptx::copy_async_commit();
      to = to == last ? 0 : to + kPlaceBytes;
      if (!filled) continue;
      if (active) sums.add_stage(ring + from, x_origin, ring + from + X::kBytes, w_origin);
      from = from == last ? 0 : from + kPlaceBytes;
    }
  }

  // Adds the bias, or makes it all NaN, and stores.
  __device__ __forceinline__ void store(Sums& sums, bool sound) const {
    using E = Element<kDtype>;
    using Stored = typename E::Stored;
    const int first = warp_column(), left = columns - first;
    if (left <= 0) return;
    if (!sound) sums.add_term([](int) { return not_a_number(); });
    if (params.bias != nullptr) {
      const Stored* const bias = static_cast<const Stored*>(params.bias) + column + first;
      sums.add_term([&](int i) { return E::widen(bias[i < left ? i : left - 1]); });
    }
    uint8_t* const y = static_cast<uint8_t*>(params.y) + (row + warp_row()) * p.y_stride + (column + first) * kWidth;
    uint8_t* const scratch = ring + thread() / 32 * Sums::kScratchBytes;
    sums.store(scratch, y, p.y_stride, rows - warp_row(), left, p.whole_chunks);
  }

  __device__ __forceinline__ void run(const Segment& segment, int64_t strip) {
    Sums sums;
    multiply_stages(sums, strip);
    const bool sound = __syncthreads_or(!line.sound) == 0;
    if (!sound) sums.add_term([](int) { return not_a_number(); });
    if constexpr (kShared) {
      if (!p.join.template add<kThreads>(p.deal, segment, sums.sums)) return;
    }
    store(sums, is_proven(params.fault));
  }
};

template <int kTileRows, int kAcross, LinearDtype kDtype, bool kTransposed>
__global__ __launch_bounds__(threads_of(kTileRows),
                             Multiply<kTileRows, kAcross, kDtype, kTransposed>::kResident) void multiply(const Product p) {
  const uint32_t parts = kTileRows == kFewRows ? static_cast<uint32_t>(p.deal.stages) : 1;
  const Segment segment{blockIdx.x / parts, blockIdx.x % parts, blockIdx.x % parts + 1};
  const uint32_t strip = static_cast<uint32_t>(segment.tile) % p.strips, rank = strip / p.strips_of_line;
  const int64_t line = p.schedule == nullptr ? rank : p.schedule[rank], strip_of_line = strip % p.strips_of_line;
  Multiply<kTileRows, kAcross, kDtype, kTransposed> tile(p, segment, line, strip_of_line);
  if (tile.columns > 0) tile.run(segment, strip_of_line);
}

// ---------------------------------------------------------------------------------------------------------------- launching

// How a product is cut, and where parts of the workspace lie.
struct Plan {
  int rows, across;  // of a tile
  int stages, resident;
  int64_t strips_of_line, strips, tiles;
  Deal deal;
  bool scheduled;
  int64_t shared_bytes;
  JoinSpace join;
  int64_t schedule_bytes;
};

// As many threadblocks on a multiprocessor as leave each two stages, and then as many stages as they may have.
void plan_shared(const Device& device, Plan* plan) {
  const int64_t stage = (plan->rows + plan->across) * kStageBytes, table = 2 * kBatch * sizeof(Slice);
  const int64_t reserved = 1024;  // bytes that every threadblock takes besides
  for (plan->resident = resident_of(plan->rows, plan->across);; --plan->resident) {
    const int64_t stages = ((device.shared_bytes + reserved) / plan->resident - reserved - table) / stage;
    plan->stages = static_cast<int>(stages < kMostStages ? stages : kMostStages);
    if (stages >= 2 || plan->resident == 1) break;
  }
  plan->shared_bytes = plan->stages * stage + table;
}

// Tiles of few or of many rows of x, whichever makes the busiest multiprocessor copy less.
void plan_rows(const BlockParams& params, const Device& device, Plan* plan) {
  int64_t least = INT64_MAX;
  for (const int rows : {kFewRows, plan->across < 64 ? 128 : 256}) {
    const int64_t tiles = blocks_across(params.m, rows) * plan->strips;
    const int64_t copied = blocks_across(tiles, device.multiprocessors) * (rows + plan->across);
    if (copied >= least) continue;
    least = copied;
    plan->rows = rows;
    plan->tiles = tiles;
  }
}

// The one table of tiles: they depend on sizes alone, and on the GPU.
Plan plan(const BlockParams& params, const Device& device) {
  Plan plan = {};
  const int64_t across = params.across() < params.block_across() ? params.across() : params.block_across();
  plan.across = 16;
  while (plan.across < 128 && plan.across < across) plan.across *= 2;
  plan.strips_of_line = blocks_across(across, plan.across);
  plan.strips = plan.strips_of_line * params.index.lines;
  plan_rows(params, device, &plan);
  plan_shared(device, &plan);

  const int64_t bytes = params.index.blocks / params.index.lines * params.block_depth() * width_of(params.dtype);
  const int64_t worth = bytes / kStageBytes / kLeastStages, wanted = 2 * int64_t{device.multiprocessors} / plan.tiles;
  int64_t parts = worth < wanted ? worth : wanted;
  parts = plan.rows != kFewRows || parts < 1 ? 1 : parts < kMostParts ? parts : kMostParts;
  const int64_t threadblocks = plan.tiles * parts;
  plan.deal = {parts, threadblocks, threadblocks};
  plan.join = {plan.deal, plan.rows * plan.across};
  const int64_t wave = int64_t{device.multiprocessors} * plan.resident;
  plan.scheduled = threadblocks > wave && threadblocks <= kMostWaves * wave;
  if (plan.scheduled) plan.schedule_bytes = round_up(params.index.lines * sizeof(int32_t), 16);
  return plan;
}

using Kernel = void (*)(Product);

template <LinearDtype kDtype, bool kTransposed>
Kernel kernel_of(const Plan& plan) {
  const bool few = plan.rows == kFewRows;
  switch (plan.across) {
    case 16:
      return few ? multiply<kFewRows, 16, kDtype, kTransposed> : multiply<128, 16, kDtype, kTransposed>;
    case 32:
      return few ? multiply<kFewRows, 32, kDtype, kTransposed> : multiply<128, 32, kDtype, kTransposed>;
    case 64:
      return few ? multiply<kFewRows, 64, kDtype, kTransposed> : multiply<256, 64, kDtype, kTransposed>;
    default:
      return few ? multiply<kFewRows, 128, kDtype, kTransposed> : multiply<256, 128, kDtype, kTransposed>;
  }
}

template <LinearDtype kDtype>
Kernel kernel_of(const Plan& plan, bool transposed) {
  return transposed ? kernel_of<kDtype, true>(plan) : kernel_of<kDtype, false>(plan);
}

bool is_empty(const BlockParams& params) { return params.m == 0 || params.index.lines == 0; }

}  // namespace

bool block_multiply_takes(const BlockParams& params, const Device& device) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kChunkBytes == 0; };
  const bool dtype = params.dtype == kBfloat16 || params.dtype == kFloat16 || (params.dtype == kFloat32 && params.tf32);
  const bool blocks = params.block_rows > 0 && params.block_cols > 0 && params.block_rows % 16 == 0 && params.block_cols % 16 == 0;
  const bool whole = params.depth() < INT64_C(1) << 32 && params.depth() * width_of(params.dtype) % kChunkBytes == 0;
  const bool placed = aligned(params.x) && aligned(params.values) && aligned(params.y);
  return dtype && blocks && whole && placed && device.shared_bytes >= kLeastShared;
}

int64_t block_multiply_workspace_bytes(const BlockParams& params, const Device& device) {
  if (!block_multiply_takes(params, device) || is_empty(params)) return 0;
  const Plan p = plan(params, device);
  return p.join.bytes() + p.schedule_bytes;
}

cudaError_t block_multiply(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (!block_multiply_takes(params, device)) return cudaErrorInvalidValue;
  if (is_empty(params)) return cudaSuccess;
  const Plan plan = cuda::plan(params, device);
  Product product = {};
  product.params = params;
  product.x_stride = params.depth() * width_of(params.dtype);
  product.w_stride = params.block_cols * width_of(params.dtype);
  product.y_stride = params.across() * width_of(params.dtype);
  product.strips = static_cast<uint32_t>(plan.strips);
  product.strips_of_line = static_cast<uint32_t>(plan.strips_of_line);
  product.stages = plan.stages;
  product.slices = static_cast<uint32_t>(params.block_depth() / kSliceDepth);
  product.whole_chunks = product.y_stride % kChunkBytes == 0;
  product.deal = plan.deal;
  product.join = plan.join.at(workspace);
  cudaError_t error = plan.join.clear(product.join, stream);
  if (error == cudaSuccess && plan.scheduled) {
    int32_t* const schedule = reinterpret_cast<int32_t*>(static_cast<uint8_t*>(workspace) + plan.join.bytes());
    error = schedule_lines(params.index, schedule, stream);
    product.schedule = schedule;
  }
  if (error != cudaSuccess) return error;
  const bool transposed = params.transposed;
  const Kernel kernel = params.dtype == kFloat32    ? kernel_of<kFloat32>(plan, transposed)
                        : params.dtype == kBfloat16 ? kernel_of<kBfloat16>(plan, transposed)
                                                    : kernel_of<kFloat16>(plan, transposed);
  return launch_kernel(kernel, {plan.deal.blocks, threads_of(plan.rows), plan.shared_bytes}, stream, product);
}

}  // namespace bitmask::cuda
