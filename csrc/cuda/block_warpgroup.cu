// Products with a block-sparse weight by the tensor cores of sm_90a (block_warpgroup.cuh has the pipeline): W's blocks are A, x is B, and
// what is summed is a tile of y^T, 64 or 128 rows of a block by up to 512 rows of x.
//
//   y^T [line of blocks]  =  | block | . | block | . |  x^T      only what belongs to kept blocks is copied and multiplied; W as A, since
//                                                                its blocks may be no wider than 64 and wgmma has rows in 64s, and
//                                                                columns, of which more use an operand of A more often, up to 256.
//
// For the gradient of W's values A is g^T and B consists of the columns of x that belong to some kept blocks of one line, side by side.
//
// Tiles are dealt to one block of threads for each multiprocessor in turns, there and back again, so that tiles of lines with many blocks,
// which come first, are followed by those of lines with few.
#include "block_warpgroup.cuh"

#include <cuda_runtime.h>

#include <cstdint>

#include "block_lines.cuh"
#include "elements.cuh"
#include "kernels.h"
#include "tensor_map.h"

namespace bitmask::cuda {
namespace {

// The tile that is a block's `turn`-th, of those dealt there and back again.
__device__ __forceinline__ int64_t dealt(int64_t turn) {
  return turn * gridDim.x + (turn % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

// ---------------------------------------------------------------------------------------------------------------- y = x W^T, y = x W

// Rows of x whose tiles are done for all lines before others are: as many as the second cache may hold.
constexpr int64_t kPanelRows = 4096;

struct Product {
  CUtensorMap w;  // values as [blocks * block_rows, block_cols]
  CUtensorMap x;
  BlockIndex index;
  const int32_t* schedule;  // lines in the order in which they are done
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
  return {p.schedule[inside / wide / p.parts], inside / wide % p.parts * T::kRows, (panel * kPanel + inside % wide) * T::kAllColumns};
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
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; i += 4) {
      sums[i + 2 * half] = sound ? sums[i + 2 * half] + bias : not_a_number();
      sums[i + 2 * half + 1] = sound ? sums[i + 2 * half + 1] + bias : not_a_number();
    }
  }
  const int64_t own = column + 8 * (pipeline.lane() % 2);
#pragma unroll
  for (int i = 0; i < T::kColumns / 16; ++i) {
    const uint4 piece = gather_pieces<kDtype, true>(sums + 8 * i, pipeline.staging() + i % 2 * 512);
    const int64_t row = place.x_row + pipeline.first_column() + 16 * i + pipeline.lane() / 2;
    if (row < p.m && own < p.across) *reinterpret_cast<uint4*>(p.y + row * p.across + own) = piece;
  }
}

template <typename T, LinearDtype kDtype, bool kTransposed>
__global__ __launch_bounds__(kThreads, 1) void multiply(const __grid_constant__ Product p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Pipeline<T> pipeline;
  if (pipeline.warp() < kMultipliers / 32) {
    for (int64_t turn = 0, tile; (tile = dealt(turn)) < p.tiles; ++turn) {
      const Place place = place_of_tile<T>(p, tile);
      typename T::Sums sums = {};
      const bool active = place.x_row + pipeline.first_column() < p.m;
      const bool sound = pipeline.template multiply<kDtype, kTransposed, false>(active, sums);
      if (active) store<T, kDtype>(p, place, sound, sums, pipeline);
    }
  } else {
    if (pipeline.lane() == 0) ptx::prefetch_map(&p.w);
    if (pipeline.lane() == 0) ptx::prefetch_map(&p.x);
    for (int64_t turn = 0, tile; (tile = dealt(turn)) < p.tiles; ++turn) {
      const bool sound = send_line<T, kTransposed>(p, place_of_tile<T>(p, tile), pipeline);
      pipeline.send(sound ? kEndSound : kEndFaulty, 0);
      pipeline.advance();
    }
  }
#endif
}

// ---------------------------------------------------------------------------------------------------------------- launching

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <typename Parameters>
cudaError_t launch(void (*kernel)(Parameters), const Parameters& parameters, int64_t tiles, int shared_bytes, const Device& device,
                   cudaStream_t stream) {
  if (device.shared_bytes < shared_bytes) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles < device.multiprocessors ? tiles : device.multiprocessors));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}

template <typename T>
cudaError_t launch_multiply(Product& product, const BlockParams& params, const Device& device, cudaStream_t stream) {
  product.parts = product.block_across / T::kRows;
  product.x_tiles = blocks_across(params.m, T::kAllColumns);
  product.tiles = product.index.lines * product.parts * product.x_tiles;
  const bool some = params.index.blocks > 0;  // otherwise the map of W is that of something else, and not used
  cudaError_t error = encode_tensor_map(&product.w, some ? params.values : params.x, some ? params.index.blocks * params.block_rows : params.m,
                                        some ? params.block_cols : params.depth(), params.transposed ? kDepth : T::kRows);
  if (error == cudaSuccess) error = encode_tensor_map(&product.x, params.x, params.m, params.depth(), T::kColumns);
  if (error != cudaSuccess) return error;
  const bool half = params.dtype == kFloat16;
  const auto kernel = params.transposed ? (half ? multiply<T, kFloat16, true> : multiply<T, kBfloat16, true>)
                                        : (half ? multiply<T, kFloat16, false> : multiply<T, kBfloat16, false>);
  return launch(kernel, product, product.tiles, T::kSharedBytes, device, stream);
}

bool takes(const BlockParams& p, const Device& device) {
  const bool typed = p.dtype == kBfloat16 || p.dtype == kFloat16;
  const bool shaped = p.block_rows % 64 == 0 && p.block_cols % 64 == 0 && p.depth() > 0 && p.depth() % p.block_depth() == 0;
  const bool placed = is_aligned(p.values) && is_aligned(p.x) && is_aligned(p.y) && p.across() % 8 == 0;
  return device.warpgroups && typed && shaped && placed && p.depth() <= INT32_MAX && p.m <= INT32_MAX - kPanelRows &&
         p.index.blocks <= INT32_MAX / p.block_rows;
}

}  // namespace

int64_t block_warpgroup_workspace_bytes(const BlockParams& params, const Device&) { return (params.index.lines * 4 + 15) / 16 * 16; }

cudaError_t block_warpgroup(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (!takes(params, device)) return cudaErrorInvalidValue;
  if (params.m == 0 || params.index.lines == 0) return cudaSuccess;
  int32_t* const schedule = static_cast<int32_t*>(workspace);
  const cudaError_t error = schedule_lines(params.index, schedule, stream);
  if (error != cudaSuccess) return error;
  Product product = {};
  product.index = params.index;
  product.schedule = schedule;
  product.fault = params.fault;
  product.bias = static_cast<const uint16_t*>(params.bias);
  product.y = static_cast<uint16_t*>(params.y);
  product.m = params.m;
  product.across = params.across();
  product.block_rows = params.block_rows;
  product.block_across = params.block_across();
  product.block_depth = params.block_depth();
  const bool stacked = product.block_across % 128 == 0;
  const int64_t high = product.index.lines * (product.block_across / (stacked ? 128 : 64));
  const bool wide = high * blocks_across(params.m, stacked ? 256 : 512) >= device.multiprocessors;
  const auto run = stacked ? (wide ? launch_multiply<Tile<true, 256>> : launch_multiply<Tile<true, 128>>)
                           : (wide ? launch_multiply<Tile<false, 256>> : launch_multiply<Tile<false, 128>>);
  return run(product, params, device, stream);
}

cudaError_t block_sample_warpgroup(const BlockSampleParams&, const Device&, void*, cudaStream_t) { return cudaErrorInvalidValue; }
int64_t block_sample_warpgroup_workspace_bytes(const BlockSampleParams&, const Device&) { return 0; }

}  // namespace bitmask::cuda
