// Products with a block-sparse weight on CUDA cores: any dtype, in full precision, blocks of any shape, memory of any alignment.
//
//   tiles     rows of x by columns of a line (the gradient: elements of a block), cores_tile.cuh
//   few rows  a warp for each column of y, or for neighbouring ones: lanes share the depth, and add their sums up in the end
//   elements  the gradient of blocks too small for tiles: a thread for each element
//
// Nobody shares a sum with other threadblocks, so that results depend on the sizes and the index alone.
#include <cuda_runtime.h>

#include <cstdint>

#include "block_lines.cuh"
#include "cores_tile.cuh"
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bitmask::cuda {
namespace {

constexpr int kThreads = 128;  // where there are no tiles
constexpr int kMostFewRows = 16;

template <typename Stored>
__device__ __forceinline__ bool is_aligned(const Stored* first, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(stride) * sizeof(Stored)) % 16 == 0;
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------- tiles

// What float32 costs on sm_90a, counted in the SASS of a stage whose rows are aligned; of the second cache's 24 bytes for each cycle of a
// multiprocessor what is asked for when nothing else limits. Not timed.
//
//   tile                           128x64  128x32  64x16      of the gradient: 64x64  32x32  16x16
//   multiply-adds of all issued      78%     75%    61%                          83%    77%    53%
//   bytes a cycle                     9       15     24                           13     25     34

// The stages of a line's tile: kM rows of x from `row` on, kN columns of the line from `inside` on.
template <typename Tile>
struct LineStages {
  using Stored = typename Tile::Stored;
  const BlockParams& p;
  const int64_t row, inside;
  const BlockLine walk;
  int64_t i;               // the block at hand
  int64_t j = 0, end = 0;  // in its depth: the next stage, and where it ends, or the depth of W
  int64_t position = 0, place = 0;
  bool sound;

  __device__ __forceinline__ LineStages(const BlockParams& params, int64_t line, int64_t first_row, int64_t first_column)
      : p(params),
        row(first_row),
        inside(first_column),
        walk(params.index, line),
        i(walk.begin - 1),
        sound(walk.sound && is_proven(params.fault)) {}

  __device__ __forceinline__ bool next_block() {
    if (++i >= walk.end) return false;
    position = p.index.positions[i];
    place = place_of(p.index, i);
    sound = walk.holds(p.index, i, position) && is_place(p.index, place);
    j = 0;
    if (sound) end = least(p.block_depth(), p.depth() - position * p.block_depth());
    return sound;
  }

  // Of nothing that is past the edges of W.
  __device__ __forceinline__ bool operator()(typename Tile::Source& a, typename Tile::Source& b) {
    if (!sound || (j >= end && !next_block())) return false;
    const Stored* const x = static_cast<const Stored*>(p.x) + row * p.depth() + position * p.block_depth() + j;
    const Stored* const block = static_cast<const Stored*>(p.values) + place * p.block_rows * p.block_cols;
    const Stored* const w = block + (p.transposed ? j * p.block_cols + inside : inside * p.block_cols + j);
    const int depth = static_cast<int>(least(end - j, Tile::kDepth));
    a = {x, p.depth(), true, is_aligned(x, p.depth()), depth, static_cast<int>(least(p.m - row, Tile::kM))};
    b = {w, p.block_cols, !p.transposed, is_aligned(w, p.block_cols), depth, static_cast<int>(least(p.block_across() - inside, Tile::kN))};
    j += Tile::kDepth;
    return true;
  }
};

// How a result is cut into tiles, each of them the work of a threadblock.
struct Tiling {
  int64_t down, across;  // tiles of the rows of x by those of a line; or of a block
  int64_t count;         // of all lines or blocks
};

template <typename Tile>
__global__ __launch_bounds__(Tile::kThreads) void multiply_tiles(const __grid_constant__ BlockParams p, const Tiling tiling) {
  using E = typename Tile::E;
  using Sum = typename Tile::Sum;
  using Stored = typename Tile::Stored;
  for (int64_t tile = blockIdx.x; tile < tiling.count; tile += gridDim.x) {
    const int64_t first_row = tile % tiling.down * Tile::kM, part = tile / tiling.down, line = part / tiling.across;
    const int64_t inside = part % tiling.across * Tile::kN, first_column = line * p.block_across() + inside;
    Sum sums[Tile::kRows][Tile::kCols] = {};
    LineStages<Tile> stages(p, line, first_row, inside);
    Tile::multiply(stages, sums);
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      const int64_t column = first_column + Tile::col(j);
      if (inside + Tile::col(j) >= p.block_across() || column >= p.across()) continue;
      const Sum bias = p.bias == nullptr ? Sum{0} : Sum{E::widen(static_cast<const Stored*>(p.bias)[column])};
#pragma unroll
      for (int i = 0; i < Tile::kRows; ++i) {
        const int64_t row = first_row + Tile::row(i);
        const Sum sum = stages.sound ? sums[i][j] + bias : Sum{not_a_number()};
        if (row < p.m) static_cast<Stored*>(p.y)[row * p.across() + column] = E::narrow(sum);
      }
    }
  }
}

// Where a block lies in W.
struct Corner {
  int64_t row, col;
  bool there;

  __device__ __forceinline__ Corner(const BlockSampleParams& p, int64_t block) {
    const int64_t line = p.lines[block], position = p.index.positions[block];
    there = line >= 0 && line < p.index.lines && position >= 0 && position < p.index.limit;
    row = there ? line * p.block_rows : 0;
    col = there ? position * p.block_cols : 0;
  }
};

// The stages of a block's tile: columns of g from `row` on, those of x from `col` on.
template <typename Tile>
struct SampleStages {
  using Stored = typename Tile::Stored;
  const BlockSampleParams& p;
  const int64_t row, col;
  int64_t k, end;  // of the rows of g and x

  __device__ __forceinline__ bool operator()(typename Tile::Source& a, typename Tile::Source& b) {
    if (k >= end) return false;
    const Stored* const g = static_cast<const Stored*>(p.g) + k * p.rows + row;
    const Stored* const x = static_cast<const Stored*>(p.x) + k * p.cols + col;
    const int depth = static_cast<int>(least(end - k, Tile::kDepth));
    a = {g, p.rows, false, is_aligned(g, p.rows), depth, static_cast<int>(least(p.rows - row, Tile::kM))};
    b = {x, p.cols, false, is_aligned(x, p.cols), depth, static_cast<int>(least(p.cols - col, Tile::kN))};
    k += Tile::kDepth;
    return true;
  }
};

template <typename Tile>
__global__ __launch_bounds__(Tile::kThreads) void sample_tiles(const __grid_constant__ BlockSampleParams p, const Tiling tiling) {
  using E = typename Tile::E;
  using Sum = typename Tile::Sum;
  using Stored = typename Tile::Stored;
  const bool sound = is_proven(p.fault);
  for (int64_t tile = blockIdx.x; tile < tiling.count; tile += gridDim.x) {
    const int64_t part = tile / tiling.across, block = part / tiling.down;
    const int64_t top = part % tiling.down * Tile::kM, left = tile % tiling.across * Tile::kN;
    const Corner corner(p, block);
    const int64_t row = corner.row + top, col = corner.col + left;
    const bool there = sound && corner.there && row < p.rows && col < p.cols;
    Sum sums[Tile::kRows][Tile::kCols] = {};
    SampleStages<Tile> stages{p, row, col, 0, there ? p.m : 0};
    Tile::multiply(stages, sums);
    Stored* const values = static_cast<Stored*>(p.values) + block * p.block_rows * p.block_cols;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kCols; ++j) {
        const int64_t block_row = top + Tile::row(i), block_col = left + Tile::col(j);
        const bool inner = there && row + Tile::row(i) < p.rows && col + Tile::col(j) < p.cols;
        const Sum sum = !sound ? Sum{not_a_number()} : inner ? sums[i][j] : Sum{0};
        if (block_row < p.block_rows && block_col < p.block_cols) values[block_row * p.block_cols + block_col] = E::narrow(sum);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- few rows

// How the lanes of a warp share columns of y: `columns` of them next to each other, 32 / `columns` lanes for the depth of each.
struct Lanes {
  int columns;
  int64_t groups;                  // of columns in a line
  int64_t block_step, depth_step;  // 32 / columns elements of depth are so many blocks and elements
};

// kRows  of x, at most
template <LinearDtype kDtype, int kRows>
__global__ __launch_bounds__(kThreads) void multiply_few_rows(const __grid_constant__ BlockParams p, const Lanes lanes) {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  using Sum = typename E::Sum;
  const Stored *const x = static_cast<const Stored*>(p.x), *const values = static_cast<const Stored*>(p.values);
  const int lane = static_cast<int>(threadIdx.x % 32), rows = static_cast<int>(p.m);
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32), count = p.index.lines * lanes.groups;
  for (int64_t group = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; group < count; group += warps) {
    const int64_t line = group / lanes.groups, inside = group % lanes.groups * lanes.columns + lane % lanes.columns;
    const BlockLine walk(p.index, line);
    bool sound = walk.sound && is_proven(p.fault);
    const int first = lane / lanes.columns;
    int64_t i = walk.begin + first / p.block_depth(), j = first % p.block_depth();
    Sum sums[kRows] = {};
    while (sound && i < walk.end) {
      const int64_t position = p.index.positions[i], place = place_of(p.index, i);
      sound = walk.holds(p.index, i, position) && is_place(p.index, place);
      const int64_t k = sound ? position * p.block_depth() + j : 0;
      if (sound && k < p.depth() && inside < p.block_across()) {
        const Sum w =
            E::widen(values[place * p.block_rows * p.block_cols + (p.transposed ? j * p.block_cols + inside : inside * p.block_cols + j)]);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          if (row < rows) sums[row] += E::widen(x[row * p.depth() + k]) * w;
        }
      }
      i += lanes.block_step;
      j += lanes.depth_step;
      if (j >= p.block_depth()) {
        j -= p.block_depth();
        ++i;
      }
    }
    sound = __all_sync(~0u, sound);
#pragma unroll
    for (Sum& sum : sums) {
      for (int step = 16; step >= lanes.columns; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    }
    const int64_t column = line * p.block_across() + inside;
    if (first > 0 || inside >= p.block_across() || column >= p.across()) continue;
    const Sum bias = p.bias == nullptr ? Sum{0} : Sum{E::widen(static_cast<const Stored*>(p.bias)[column])};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Sum sum = sound ? sums[row] + bias : Sum{not_a_number()};
      if (row < rows) static_cast<Stored*>(p.y)[row * p.across() + column] = E::narrow(sum);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- elements

template <LinearDtype kDtype>
__global__ __launch_bounds__(kThreads) void sample_elements(const __grid_constant__ BlockSampleParams p) {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  using Sum = typename E::Sum;
  const Stored *const g = static_cast<const Stored*>(p.g), *const x = static_cast<const Stored*>(p.x);
  const int64_t size = p.block_rows * p.block_cols;
  const bool sound = is_proven(p.fault);
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < p.index.blocks * size; at += int64_t{gridDim.x} * kThreads) {
    const Corner corner(p, at / size);
    const int64_t row = corner.row + at % size / p.block_cols, col = corner.col + at % p.block_cols;
    Sum sum = 0;
    const bool there = corner.there && row < p.rows && col < p.cols;
#pragma unroll 4
    for (int64_t i = 0; there && i < p.m; ++i) sum += E::widen(g[i * p.rows + row]) * E::widen(x[i * p.cols + col]);
    static_cast<Stored*>(p.values)[at] = E::narrow(sound ? sum : Sum{not_a_number()});
  }
}

// ---------------------------------------------------------------------------------------------------------------- launching

// Threadblocks walk what is left by themselves.
int64_t grid_of(int64_t threadblocks) { return threadblocks < INT32_MAX ? threadblocks : INT32_MAX; }

template <typename Tile>
cudaError_t multiply_by_tiles(const BlockParams& p, cudaStream_t stream) {
  const int64_t down = blocks_across(p.m, Tile::kM), across = blocks_across(p.block_across(), Tile::kN);
  const Tiling tiling{down, across, down * across * p.index.lines};
  return launch_kernel(multiply_tiles<Tile>, {grid_of(tiling.count), Tile::kThreads, sizeof(typename Tile::Shared)}, stream, p, tiling);
}

template <typename Tile>
cudaError_t sample_by_tiles(const BlockSampleParams& p, cudaStream_t stream) {
  const int64_t down = blocks_across(p.block_rows, Tile::kM), across = blocks_across(p.block_cols, Tile::kN);
  const Tiling tiling{down, across, down * across * p.index.blocks};
  return launch_kernel(sample_tiles<Tile>, {grid_of(tiling.count), Tile::kThreads, sizeof(typename Tile::Shared)}, stream, p, tiling);
}

// Elements of tiles of some side that cover a block, or a line.
int64_t covered(int64_t size, int64_t side) { return blocks_across(size, side) * side; }

template <LinearDtype kDtype>
cudaError_t multiply_few(const BlockParams& p, cudaStream_t stream) {
  Lanes lanes{1, 0, 0, 0};  // W is read along its rows: along the depth or, transposed, across it
  while (p.transposed && lanes.columns < 32 && lanes.columns < p.block_across()) lanes.columns *= 2;
  lanes.groups = blocks_across(p.block_across(), lanes.columns);
  lanes.block_step = 32 / lanes.columns / p.block_depth();
  lanes.depth_step = 32 / lanes.columns % p.block_depth();
  const int64_t blocks = blocks_across(p.index.lines * lanes.groups, kThreads / 32);
  return launch_kernel(p.m <= 4 ? multiply_few_rows<kDtype, 4> : multiply_few_rows<kDtype, kMostFewRows>, {grid_of(blocks), kThreads},
                       stream, p, lanes);
}

// Columns of a thread's tile: float64 sums take two registers each.
template <LinearDtype kDtype>
constexpr int kMostCols = kDtype == kFloat64 ? 4 : 8;

template <LinearDtype kDtype>
cudaError_t multiply(const BlockParams& p, cudaStream_t stream) {
  constexpr int kCols = kMostCols<kDtype>;
  if (p.m <= kMostFewRows) return multiply_few<kDtype>(p, stream);
  if (p.m <= 64) return multiply_by_tiles<CoresTile<kDtype, 32, 32, 4, 4>>(p, stream);
  const int64_t across = p.block_across();
  if (covered(across, 64) == covered(across, 16)) return multiply_by_tiles<CoresTile<kDtype, 16 * kCols, 64, 8, kCols>>(p, stream);
  if (covered(across, 32) == covered(across, 16)) return multiply_by_tiles<CoresTile<kDtype, 16 * kCols, 32, 8, kCols>>(p, stream);
  return multiply_by_tiles<CoresTile<kDtype, 64, 16, 8, 4>>(p, stream);
}

// Tiles waste what they have past the edges of a block, and small ones read more for each product.
template <LinearDtype kDtype>
cudaError_t sample(const BlockSampleParams& p, cudaStream_t stream) {
  const auto cost = [&](int64_t side) { return covered(p.block_rows, side) * covered(p.block_cols, side) * (128 + 64 * 16 / side) / 128; };
  const int64_t by_elements = p.block_rows * p.block_cols * 8;
  if (by_elements < cost(16)) {
    const int64_t blocks = blocks_across(p.index.blocks * p.block_rows * p.block_cols, kThreads);
    return launch_kernel(sample_elements<kDtype>, {grid_of(blocks), kThreads}, stream, p);
  }
  if (cost(64) <= cost(32) && cost(64) <= cost(16)) return sample_by_tiles<CoresTile<kDtype, 64, 64, 8, kMostCols<kDtype>>>(p, stream);
  if (cost(32) <= cost(16)) return sample_by_tiles<CoresTile<kDtype, 32, 32, 8, 4>>(p, stream);
  return sample_by_tiles<CoresTile<kDtype, 16, 16, 4, 2>>(p, stream);
}

}  // namespace

int64_t block_cores_workspace_bytes(const BlockParams&, const Device&) { return 0; }
int64_t block_sample_cores_workspace_bytes(const BlockSampleParams&, const Device&) { return 0; }

cudaError_t block_cores(const BlockParams& params, const Device&, void*, cudaStream_t stream) {
  if (params.m == 0 || params.across() == 0) return cudaSuccess;
  return params.dtype == kFloat32    ? multiply<kFloat32>(params, stream)
         : params.dtype == kBfloat16 ? multiply<kBfloat16>(params, stream)
         : params.dtype == kFloat16  ? multiply<kFloat16>(params, stream)
                                     : multiply<kFloat64>(params, stream);
}

cudaError_t block_sample_cores(const BlockSampleParams& params, const Device&, void*, cudaStream_t stream) {
  if (params.index.blocks == 0) return cudaSuccess;
  return params.dtype == kFloat32    ? sample<kFloat32>(params, stream)
         : params.dtype == kBfloat16 ? sample<kBfloat16>(params, stream)
         : params.dtype == kFloat16  ? sample<kFloat16>(params, stream)
                                     : sample<kFloat64>(params, stream);
}

}  // namespace bitmask::cuda
