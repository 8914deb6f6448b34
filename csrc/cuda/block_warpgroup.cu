// Products with a block-sparse weight by the tensor cores of sm_90a (block_warpgroup.cuh has the pipeline): W's blocks are A, x is B, and
// what is summed is a tile of y^T, 64 or 128 rows of a block by up to 512 rows of x.
//
//   y^T [line of blocks]  =  | block | . | block | . |  x^T      only what belongs to kept blocks is copied and multiplied; W as A, since
//                                                                its blocks may be no wider than 64 and wgmma has rows in 64s, and
//                                                                columns, of which more use an operand of A more often, up to 256.
//
// For the gradient of W's values A is g^T and B consists of the columns of x that belong to some kept blocks of one line, side by side.
#include "block_warpgroup.cuh"

#include <cuda_runtime.h>

#include <cstdint>

#include "block_lines.cuh"
#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "tensor_map.h"

namespace bitmask::cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------------- y = x W^T, y = x W

// Rows of x whose tiles are done for all lines before others are: as many as the second cache may hold.
constexpr int64_t kPanelRows = 4096;

struct Product {
  CUtensorMap w;  // values as [blocks * block_rows, block_cols]
  CUtensorMap x;
  BlockIndex index;
  const int32_t* schedule;  // lines in the order in which they are done; null: as they come, each tile having a multiprocessor of its own
  const Fault* fault;
  const uint16_t* bias;
  uint16_t* y;
  int64_t m, across;
  int64_t block_rows, block_across, block_depth;
  int64_t parts;    // tiles that a block is high
  int64_t x_tiles;  // tiles that x has rows for
  int64_t tiles;
};

// Where a tile of y^T is.
struct Place {
  int64_t line;
  int64_t part;   // first row of the tile in the blocks of the line
  int64_t x_row;  // first one
};

template <typename T>
__device__ __forceinline__ Place place_of_tile(const Product& p, int64_t tile) {
  constexpr int64_t kPanel = kPanelRows / T::kAllColumns;
  const int64_t high = p.index.lines * p.parts, panel = tile / (high * kPanel), left = p.x_tiles - panel * kPanel;
  const int64_t wide = left < kPanel ? left : kPanel, inside = tile - panel * high * kPanel;
  const int64_t turn = inside / wide / p.parts, line = p.schedule == nullptr ? turn : p.schedule[turn];
  return {line, inside / wide % p.parts * T::kRows, (panel * kPanel + inside % wide) * T::kAllColumns};
}

// Sends the blocks of a line. Lanes prove 32 of them at a time.
template <typename T, bool kTransposed>
__device__ __forceinline__ bool send_line(const Product& p, const Place& place, Pipeline<T>& pipeline) {
  const BlockLine walk(p.index, place.line);
  const int64_t boxes = p.m - place.x_row <= T::kColumns ? 1 : T::kAllColumns / T::kColumns;
  const uint32_t bytes = static_cast<uint32_t>(T::kABytes + boxes * T::kColumns * kLineBytes);
  if (!walk.sound || !is_proven(p.fault)) return false;
  for (int64_t first = walk.begin; first < walk.end; first += 32) {
    const int64_t own = first + pipeline.lane();
    int64_t position = 0, block = 0;
    bool sound = true;
    if (own < walk.end) {
      position = p.index.positions[own];
      block = place_of(p.index, own);
      sound = walk.holds(p.index, own, position) && is_place(p.index, block);
    }
    if (!__all_sync(~0u, sound)) return false;
    const int count = static_cast<int>(walk.end - first < 32 ? walk.end - first : 32);
    for (int i = 0; i < count; ++i) {
      const int64_t x_column = __shfl_sync(~0u, position, i) * p.block_depth, w_row = __shfl_sync(~0u, block, i) * p.block_rows;
      for (int64_t k = 0; k < p.block_depth; k += kDepth, pipeline.advance()) {
        pipeline.send(kMultiplySlot, bytes);
        if (pipeline.lane() != 0) continue;
        if (kTransposed) {
          for (int64_t j = 0; j < T::kRows; j += 64) pipeline.copy(static_cast<int>(j) * kLineBytes, p.w, place.part + j, w_row + k);
        } else {
          pipeline.copy(0, p.w, k, w_row + place.part);
        }
        for (int64_t j = 0; j < boxes; ++j) {
          const int64_t row = j * T::kColumns;
          pipeline.copy(T::kABytes + static_cast<int>(row) * kLineBytes, p.x, x_column + k, place.x_row + row);
        }
      }
    }
  }
  return true;
}

template <typename T, LinearDtype kDtype>
__device__ __forceinline__ void store(const Product& p, const Place& place, bool sound, typename T::Sums& sums, Pipeline<T>& pipeline) {
  const int64_t first = place.part + pipeline.first_row() + pipeline.warp() % 4 * 16, column = place.line * p.block_across + first;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t own = column + 8 * half + pipeline.lane() / 4;
    const float bias = p.bias == nullptr || own >= p.across ? 0 : Element<kDtype>::widen(p.bias[own]);
    const float added = sound ? bias : not_a_number();
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; i += 4) {
      sums[i + 2 * half] += added;
      sums[i + 2 * half + 1] += added;
    }
  }
  const int64_t own = column + 8 * (pipeline.lane() % 2), row = place.x_row + pipeline.first_column() + pipeline.lane() / 2;
  const int64_t there = own < p.across ? p.m - row : 0;  // rows from the lane's first one on
  uint16_t* target = p.y + row * p.across + own;
#pragma unroll
  for (int i = 0; i < T::kColumns; i += 16, target += 16 * p.across) {
    const uint4 piece = gather_pieces<kDtype, true>(sums + i / 2, pipeline.staging() + i % 32 / 16 * 512);
    if (i < there) *reinterpret_cast<uint4*>(target) = piece;
  }
}

template <typename T, LinearDtype kDtype, bool kTransposed>
__global__ __launch_bounds__(kThreads, 1) void multiply(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Pipeline<T> pipeline;
  if (pipeline.warp() < kMultipliers / 32) {
    int64_t tile;
    for (int turn = 0; (tile = dealt(turn)) < p.tiles; ++turn) {
      const Place place = place_of_tile<T>(p, tile);
      typename T::Sums sums = {};
      const bool active = place.x_row + pipeline.first_column() < p.m;
      const bool sound = pipeline.template multiply<kDtype, kTransposed, false>(active, sums);
      if (active) store<T, kDtype>(p, place, sound, sums, pipeline);
    }
  } else {
    if (pipeline.lane() == 0) ptx::prefetch_map(&p.w);
    if (pipeline.lane() == 0) ptx::prefetch_map(&p.x);
    int64_t tile;
    for (int turn = 0; (tile = dealt(turn)) < p.tiles; ++turn) {
      const bool sound = send_line<T, kTransposed>(p, place_of_tile<T>(p, tile), pipeline);
      pipeline.send(sound ? kEndSound : kEndFaulty, 0);
      pipeline.advance();
    }
  }
#else
  __trap();  // with CUDA_FORCE_PTX_JIT drivers leave the binary alone, and its result would be whatever is there
#endif
}

// ---------------------------------------------------------------------------------------------------------------- gradient of W's values

constexpr int kChunk = 64;  // columns of a block that lie side by side with those of other blocks

struct Sample {
  CUtensorMap g;
  CUtensorMap x;
  BlockIndex index;
  const Fault* fault;
  uint16_t* values;
  int64_t m, rows, cols;
  int64_t block_rows, block_cols;
  int64_t parts;  // tiles that a block is high
  int chunks;     // that a block has
};

// A tile of the gradient: some of the blocks' chunks in a line. Tiles are numbered such that the first ones of all lines come first: later
// ones are there for long lines only.
template <typename T>
struct Chunks {
  static constexpr int kMost = T::kAllColumns / kChunk;

  int line;
  int part;       // first row of the tile in the blocks of the line
  int64_t begin;  // block that the first chunk is of
  int skipped;    // chunks of that block before it
  int count;      // none if the line is too short

  __device__ __forceinline__ Chunks(const Sample& p, int64_t tile) {
    const int64_t high = p.index.lines * p.parts;
    line = static_cast<int>(tile % high / p.parts);
    part = static_cast<int>(tile % p.parts) * T::kRows;
    const int64_t first = tile / high * kMost;
    const BlockLine walk(p.index, line);
    begin = walk.begin + first / p.chunks;
    skipped = static_cast<int>(first % p.chunks);
    const int64_t left = (walk.end - walk.begin) * p.chunks - first;
    count = static_cast<int>(left < 0 ? 0 : left < kMost ? left : kMost);
  }

  // The most blocks that a line has, found by the lanes of a warp.
  static __device__ __forceinline__ int64_t longest_line(const BlockIndex& index, int lane) {
    int64_t most = 0;
    for (int64_t line = lane; line < index.lines; line += 32) {
      const BlockLine walk(index, line);
      most = max(most, walk.end - walk.begin);
    }
    for (int distance = 16; distance > 0; distance /= 2) most = max(most, __shfl_xor_sync(~0u, most, distance));
    return most;
  }

  __device__ __forceinline__ int64_t block(const Sample& p, int chunk) const { return begin + (skipped + chunk) / p.chunks; }
  __device__ __forceinline__ int column_in_block(const Sample& p, int chunk) const { return (skipped + chunk) % p.chunks * kChunk; }

  // Of x. A position that cannot be gives some column, perhaps none that x has.
  __device__ __forceinline__ int64_t column(const Sample& p, int chunk) const {
    return static_cast<int32_t>(p.index.positions[block(p, chunk)]) * p.block_cols + column_in_block(p, chunk);
  }
};

// Sends g and x, 64 rows at a time; each lane asks for a chunk, and some for rows of the tile.
template <typename T>
__device__ __forceinline__ void send_rows(const Sample& p, const Chunks<T>& tile, Pipeline<T>& pipeline) {
  const int lane = pipeline.lane();
  const int64_t x_column = lane < tile.count ? tile.column(p, lane) : 0, g_column = tile.line * p.block_rows + tile.part + lane * 64;
  const uint32_t bytes = static_cast<uint32_t>(T::kABytes + tile.count * kPanelBytes);
  for (int64_t row = 0; row < p.m; row += kDepth, pipeline.advance()) {
    pipeline.send(kMultiplySlot, bytes);
    if (lane < T::kRows / 64) pipeline.copy(lane * kPanelBytes, p.g, g_column, row);
    if (lane < tile.count) pipeline.copy(T::kABytes + lane * kPanelBytes, p.x, x_column, row);
  }
}

// What is past the edges of W becomes zero.
template <typename T, LinearDtype kDtype>
__device__ __forceinline__ void store(const Sample& p, const Chunks<T>& tile, const typename T::Sums& sums, Pipeline<T>& pipeline) {
  const int row = tile.part + pipeline.first_row() + pipeline.warp() % 4 * 16 + pipeline.lane() / 2, piece_column = pipeline.lane() % 2 * 8;
  const bool row_is_there = tile.line * p.block_rows + row < p.rows;
#pragma unroll
  for (int i = 0; i < T::kColumns / kChunk; ++i) {
    const int chunk = pipeline.first_column() / kChunk + i;
    if (chunk >= tile.count) break;
    const int64_t there = row_is_there ? p.cols - tile.column(p, chunk) - piece_column : 0;  // columns from the lane's first one on
    const int64_t block_row = tile.block(p, chunk) * p.block_rows + row;
    uint16_t* const target = p.values + block_row * p.block_cols + tile.column_in_block(p, chunk) + piece_column;
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      const uint4 piece = gather_pieces<kDtype, false>(sums + i * kChunk / 2 + j / 2, pipeline.staging() + j % 32 / 16 * 512);
      *reinterpret_cast<uint4*>(target + j) = j < there ? piece : make_uint4(0, 0, 0, 0);
    }
  }
}

template <typename T, LinearDtype kDtype>
__global__ __launch_bounds__(kThreads, 1) void sample(const __grid_constant__ Sample p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (!is_proven(p.fault)) {
    fill_with_nan(p.values, p.index.blocks * p.block_rows * p.block_cols);
    return;
  }
  Pipeline<T> pipeline;
  const bool multiplies = pipeline.warp() < kMultipliers / 32;
  const int64_t longest = Chunks<T>::longest_line(p.index, pipeline.lane()) * p.chunks;
  const int64_t tiles = p.index.lines * p.parts * ((longest + Chunks<T>::kMost - 1) / Chunks<T>::kMost);
  int64_t number;
  for (int turn = 0; (number = dealt(turn)) < tiles; ++turn) {
    const Chunks<T> tile(p, number);
    if (tile.count == 0) continue;
    if (multiplies) {
      typename T::Sums sums = {};
      pipeline.template multiply<kDtype, true, true>(pipeline.first_column() < tile.count * kChunk, sums);
      store<T, kDtype>(p, tile, sums, pipeline);
    } else {
      send_rows(p, tile, pipeline);
      pipeline.send(kEndSound, 0);
      pipeline.advance();
    }
  }
#else
  __trap();  // with CUDA_FORCE_PTX_JIT drivers leave the binary alone, and its result would be whatever is there
#endif
}

// ---------------------------------------------------------------------------------------------------------------- launching

bool has_what_it_takes(const Device& device) { return device.warpgroups && has_tensor_maps() && device.shared_bytes >= kMostShared; }

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// A threadblock for each multiprocessor, if there are as many tiles.
LaunchSize size_of(int64_t tiles, int64_t shared_bytes, const Device& device) {
  return {tiles < device.multiprocessors ? tiles : device.multiprocessors, kThreads, shared_bytes};
}

// Calls run(tile) for tiles of the shape that takes least time: as many turns as the multiprocessor with most tiles has, each of them bound
// by the bytes of its slots. tiles_of(tile): how many there are.
template <bool kStacked, typename TilesOf, typename Run>
cudaError_t run_shorter(const Device& device, const TilesOf& tiles_of, const Run& run) {
  const auto time_of = [&](auto tile) { return blocks_across(tiles_of(tile), device.multiprocessors) * decltype(tile)::kSlotBytes; };
  const Tile<kStacked, 256> wide{};
  const Tile<kStacked, 128> narrow{};
  return time_of(wide) <= time_of(narrow) ? run(wide) : run(narrow);
}

template <typename T>
int64_t x_tiles_of(const BlockParams& params) {
  return blocks_across(params.m, T::kAllColumns);
}

template <typename T>
int64_t tiles_of(const BlockParams& params) {
  return params.index.lines * (params.block_across() / T::kRows) * x_tiles_of<T>(params);
}

// Of a gradient, if tiles were full.
template <typename T>
int64_t tiles_of(const BlockSampleParams& params) {
  const int64_t chunks = params.index.blocks * (params.block_cols / kChunk);
  return params.block_rows / T::kRows * blocks_across(chunks, Chunks<T>::kMost);
}

template <typename T>
cudaError_t launch_multiply(Product& product, const BlockParams& params, int32_t* schedule, const Device& device, cudaStream_t stream) {
  product.parts = product.block_across / T::kRows;
  product.x_tiles = x_tiles_of<T>(params);
  product.tiles = tiles_of<T>(params);
  const bool some = params.index.blocks > 0;  // otherwise the map of W is that of something else, and not used
  cudaError_t error =
      encode_tensor_map(&product.w, some ? params.values : params.x, some ? params.index.blocks * params.block_rows : params.m,
                        some ? params.block_cols : params.depth(), params.transposed ? kDepth : T::kRows);
  if (error == cudaSuccess) error = encode_tensor_map(&product.x, params.x, params.m, params.depth(), T::kColumns);
  if (error == cudaSuccess && product.tiles > device.multiprocessors) {
    product.schedule = schedule;
    error = schedule_lines(params.index, schedule, stream);
  }
  if (error != cudaSuccess) return error;
  const bool half = params.dtype == kFloat16;
  const auto kernel = params.transposed ? (half ? multiply<T, kFloat16, true> : multiply<T, kBfloat16, true>)
                                        : (half ? multiply<T, kFloat16, false> : multiply<T, kBfloat16, false>);
  return launch_kernel(kernel, size_of(product.tiles, T::kSharedBytes, device), stream, product);
}

template <typename T>
cudaError_t launch_sample(Sample& product, const BlockSampleParams& params, const Device& device, cudaStream_t stream) {
  product.parts = product.block_rows / T::kRows;
  const int64_t tiles = product.index.lines * product.parts * blocks_across(product.index.limit * product.chunks, Chunks<T>::kMost);
  cudaError_t error = encode_tensor_map(&product.g, params.g, params.m, params.rows, kDepth);
  if (error == cudaSuccess) error = encode_tensor_map(&product.x, params.x, params.m, params.cols, kDepth);
  if (error != cudaSuccess) return error;
  const auto kernel = params.dtype == kFloat16 ? sample<T, kFloat16> : sample<T, kBfloat16>;
  return launch_kernel(kernel, size_of(tiles, T::kSharedBytes, device), stream, product);
}

}  // namespace

bool block_warpgroup_takes(const BlockParams& p, const Device& device) {
  const bool typed = p.dtype == kBfloat16 || p.dtype == kFloat16;
  const bool shaped = p.block_rows % 64 == 0 && p.block_cols % 64 == 0 && p.depth() > 0 && p.depth() % p.block_depth() == 0;
  const bool placed = is_aligned(p.values) && is_aligned(p.x) && is_aligned(p.y) && p.across() % 8 == 0;
  return has_what_it_takes(device) && typed && shaped && placed && p.depth() <= INT32_MAX && p.m <= INT32_MAX - kPanelRows &&
         p.index.blocks <= INT32_MAX / p.block_rows;
}

int64_t block_warpgroup_workspace_bytes(const BlockParams& params, const Device&) { return (params.index.lines * 4 + 15) / 16 * 16; }

cudaError_t block_warpgroup(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (!block_warpgroup_takes(params, device)) return cudaErrorInvalidValue;
  if (params.m == 0 || params.index.lines == 0) return cudaSuccess;
  Product product = {};
  product.index = params.index;
  product.fault = params.fault;
  product.bias = static_cast<const uint16_t*>(params.bias);
  product.y = static_cast<uint16_t*>(params.y);
  product.m = params.m;
  product.across = params.across();
  product.block_rows = params.block_rows;
  product.block_across = params.block_across();
  product.block_depth = params.block_depth();
  const auto count = [&](auto tile) { return tiles_of<decltype(tile)>(params); };
  const auto run = [&](auto tile) {
    return launch_multiply<decltype(tile)>(product, params, static_cast<int32_t*>(workspace), device, stream);
  };
  return product.block_across % 128 == 0 ? run_shorter<true>(device, count, run) : run_shorter<false>(device, count, run);
}

bool block_sample_warpgroup_takes(const BlockSampleParams& p, const Device& device) {
  const bool typed = p.dtype == kBfloat16 || p.dtype == kFloat16;
  const bool shaped = p.block_rows % 64 == 0 && p.block_cols % 64 == 0 && p.rows % 8 == 0 && p.cols % 8 == 0;
  const bool placed = is_aligned(p.values) && is_aligned(p.g) && is_aligned(p.x);
  const auto sized = [](int64_t size) { return size > 0 && size <= INT32_MAX; };
  return has_what_it_takes(device) && typed && shaped && placed && sized(p.m) && sized(p.rows) && sized(p.cols);
}

int64_t block_sample_warpgroup_workspace_bytes(const BlockSampleParams&, const Device&) { return 0; }

cudaError_t block_sample_warpgroup(const BlockSampleParams& params, const Device& device, void*, cudaStream_t stream) {
  if (!block_sample_warpgroup_takes(params, device)) return cudaErrorInvalidValue;
  if (params.index.blocks == 0) return cudaSuccess;
  Sample product = {};
  product.index = params.index;
  product.fault = params.fault;
  product.values = static_cast<uint16_t*>(params.values);
  product.m = params.m;
  product.rows = params.rows;
  product.cols = params.cols;
  product.block_rows = params.block_rows;
  product.block_cols = params.block_cols;
  product.chunks = static_cast<int>(params.block_cols / kChunk);
  const auto count = [&](auto tile) { return tiles_of<decltype(tile)>(params); };
  const auto run = [&](auto tile) { return launch_sample<decltype(tile)>(product, params, device, stream); };
  return product.block_rows % 128 == 0 ? run_shorter<true>(device, count, run) : run_shorter<false>(device, count, run);
}

}  // namespace bitmask::cuda
