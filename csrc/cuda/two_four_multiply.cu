// y = x W^T + bias, W being 2:4 as a whole or in kept blocks: sparse tensor cores, which skip what is not stored.
//
// mma.sp takes W for its first operand, so a tile of y is computed transposed, and turned in shared memory on its way out:
//
//             columns (k)                      x rows                          W rows
//   W rows  |. . stages . .|  x  x rows^T  =  |sums| W rows    -->   x rows  |tile of y|
//
// A line of W is the kept blocks of a block row; W as a whole is one block, one line. Tiles are rows of a line by rows of x. Lines are
// walked from end to end by one threadblock each; of W as a whole, with too few tiles for the GPU, the stages are dealt (deal.cuh).
//
// Metadata are proven as they are used, by the lanes that bring their codes: sums of a faulty row become NaN, and the codes of a faulty
// group are replaced by sound ones, as an instruction may do anything with others. What is past the edges of W is zero in shared memory.
#include "two_four_multiply.cuh"

#include <cuda_runtime.h>

#include "elements.cuh"

namespace bitmask::cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------------- the product

template <class T, LinearDtype kDtype>
struct Multiply {
  static constexpr int kFours = T::kFragments * T::kTiles;
  using Stage = typename T::Stage;
  using Sums = float[kFours][4];  // [fragment of W][eight rows of x], as mma.sp has them

  // Where a lane's operands are.
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x / 32) / T::kXWarps * T::kFragments * 16; }
  static __device__ __forceinline__ int first_x_row() { return static_cast<int>(threadIdx.x / 32) % T::kXWarps * T::kTiles * 8; }

  // The codes that a lane brings: of 16 columns of the rows g and g + 8 of each fragment. `wrong` gathers faults of these rows, by halves.
  // `there`: whether the columns are in W.
  static __device__ __forceinline__ void read_codes(const Stage& stage, bool there, uint32_t (&codes)[T::kFragments],
                                                    uint32_t (&wrong)[T::kFragments]) {
    const uint8_t* const first = stage.metadata[first_row() + lane() / 4] + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < T::kFragments; ++i) {
      const uint32_t low = *reinterpret_cast<const uint16_t*>(first + 16 * i * sizeof(stage.metadata[0]));
      const uint32_t high = *reinterpret_cast<const uint16_t*>(first + (16 * i + 8) * sizeof(stage.metadata[0]));
      uint32_t bits = there ? low | high << 16 : kSoundGroups;
      const uint32_t faults = faults_of(bits);
      if (faults != 0) bits = repair(bits, faults);
      wrong[i] |= faults;
      codes[i] = codes_of(bits);
    }
  }

  // A chunk of a stage, whose codes the lanes with t / 2 == kChunk bring.
  template <int kChunk>
  static __device__ __forceinline__ void multiply_chunk(const Stage& stage, const uint32_t (&codes)[T::kFragments], Sums& sums) {
    const int matrix = lane() / 8, row = lane() % 8;
    const int piece_of_w = (2 * kChunk + matrix / 2) ^ row / 2 % 4, piece_of_x = (4 * kChunk + matrix) ^ row;
    const uint8_t* const w = stage.values[first_row() + 8 * (matrix % 2) + row] + 16 * piece_of_w;
    const uint8_t* const x = stage.x[first_x_row() + row] + 16 * piece_of_x;
    uint32_t a[T::kFragments][4];
#pragma unroll
    for (int i = 0; i < T::kFragments; ++i) ptx::load_matrix_x4(a[i], w + 16 * i * sizeof(stage.values[0]));
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
      uint32_t b[4];
      ptx::load_matrix_x4(b, x + 8 * tile * sizeof(stage.x[0]));
#pragma unroll
      for (int i = 0; i < T::kFragments; ++i) {
        Element<kDtype>::template multiply_sparse<kChunk>(sums[i * T::kTiles + tile], a[i], b, codes[i]);
      }
    }
  }

  // Makes the sums of faulty rows NaN, or all of them.
  static __device__ __forceinline__ void spoil(const uint32_t (&wrong)[T::kFragments], bool all, Sums& sums) {
#pragma unroll
    for (int i = 0; i < T::kFragments; ++i) {
      uint32_t faults = wrong[i];  // of all the columns, once the four lanes of a row have told each other
      faults |= __shfl_xor_sync(~0u, faults, 1);
      faults |= __shfl_xor_sync(~0u, faults, 2);
#pragma unroll
      for (int j = 0; j < 4 * T::kTiles; ++j) {
        const bool faulty = j % 4 < 2 ? (faults & 0xffff) != 0 : faults >> 16 != 0;
        if (all || faulty) sums[i * T::kTiles + j / 4][j % 4] = not_a_number();
      }
    }
  }

  // The blocks of a tile's line, none if it is faulty. All threads call it, each proves some.
  static __device__ __forceinline__ BlockLine prove_line(const Product& p, int64_t index) {
    if (!p.params.has_blocks()) return BlockLine(0, 1);
    BlockLine line(p.params.index, index);
    for (int64_t i = line.begin + threadIdx.x; i < line.end; i += kThreads) {
      line.sound = line.sound && line.holds(p.params.index, i, p.params.index.positions[i]);
    }
    line.sound = __syncthreads_or(!line.sound) == 0;
    if (!line.sound) line.end = line.begin;
    return line;
  }

  // The sums of a segment.
  static __device__ __forceinline__ void multiply_segment(const Product& p, const Tile& tile, const Segment& s, Sums& sums) {
    typename T::Shared& shared = *ptx::dynamic_shared<typename T::Shared>();
    const BlockLine line = prove_line(p, tile.line);
    const int pieces = static_cast<int>(line.end - line.begin) * p.pieces, stages = (pieces + 3) / 4;
    const bool dealt = !p.params.has_blocks();
    const int begin = dealt ? static_cast<int>(s.begin) : 0, end = dealt && s.end < stages ? static_cast<int>(s.end) : stages;
    Copier<T> copier(p, tile, line, begin);
    uint32_t wrong[T::kFragments] = {};
    int slot = 1;  // of the stage that is multiplied, once the first ones are on their way
    for (int stage = begin - (kStages - 1); stage < end; ++stage) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      Stage& next = shared.stages[slot == 0 ? kStages - 1 : slot - 1];
      const bool more = stage + kStages - 1 < end;
      if (more) copier.copy(next);
      ptx::copy_async_commit();
      if (stage >= begin) {
        uint32_t codes[T::kFragments];
        read_codes(shared.stages[slot], lane() % 4 < pieces - 4 * stage, codes, wrong);
        multiply_chunk<0>(shared.stages[slot], codes, sums);
        multiply_chunk<1>(shared.stages[slot], codes, sums);
      }
      if (more) copier.keep(next);
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    spoil(wrong, !line.sound, sums);
    __syncthreads();  // shared memory is free
  }

  // Adds the bias, rounds, turns the tile and stores it.
  static __device__ __forceinline__ void store(const Product& p, const Tile& tile, const Sums& sums) {
    const TwoFourParams& params = p.params;
    uint16_t* const turned = ptx::dynamic_shared<uint16_t>();  // [kXRows][kYStride]
    const int64_t row_of_w = tile.row_of_w(p), left = params.rows - row_of_w;
    const int rows = left < tile.rows ? static_cast<int>(left) : tile.rows;
#pragma unroll
    for (int i = 0; i < 2 * T::kFragments; ++i) {
      const int row = first_row() + 8 * i + lane() / 4;
      const float bias =
          params.bias == nullptr || row >= rows ? 0 : Element<kDtype>::widen(static_cast<const uint16_t*>(params.bias)[row_of_w + row]);
#pragma unroll
      for (int j = 0; j < 2 * T::kTiles; ++j) {
        const int x_row = first_x_row() + 8 * (j / 2) + lane() % 4 * 2 + j % 2;
        turned[x_row * T::kYStride + row] = Element<kDtype>::narrow(sums[i / 2 * T::kTiles + j / 2][i % 2 * 2 + j % 2] + bias);
      }
    }
    __syncthreads();
    uint16_t* const y = static_cast<uint16_t*>(params.y) + tile.x_row * params.rows + row_of_w;
    const int width = p.y_aligned ? 8 : 1;  // elements at a time: all of them are in y or none
    for (int at = static_cast<int>(threadIdx.x) * width; at < T::kXRows * T::kRows; at += kThreads * width) {
      const int x_row = at / T::kRows, row = at % T::kRows;
      if (x_row >= tile.x_rows || row >= rows) continue;
      uint16_t* const dst = y + x_row * params.rows + row;
      if (p.y_aligned) {
        *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(turned + x_row * T::kYStride + row);
      } else {
        *dst = turned[x_row * T::kYStride + row];
      }
    }
    __syncthreads();  // shared memory is free
  }

  // All segments of a threadblock.
  static __device__ __forceinline__ void run(const Product& p) {
    const int64_t last = p.deal.begin(blockIdx.x + 1);
    for (int64_t unit = p.deal.begin(blockIdx.x); unit < last;) {
      const Segment s = p.deal.segment(unit, last);
      const Tile tile = T::tile_of(p, s.tile);
      Sums sums = {};
      multiply_segment(p, tile, s, sums);
      if (p.join.add<kThreads>(p.deal, s, sums)) store(p, tile, sums);
      unit += s.end - s.begin;
    }
  }
};

template <class T>
constexpr int kBlocksPerMultiprocessor = T::kFragments * T::kTiles > 16 ? 1 : 2;  // whose sums fit in registers

template <class T, LinearDtype kDtype>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) void multiply(const Product p) {
  Multiply<T, kDtype>::run(p);
}

// ---------------------------------------------------------------------------------------------------------------- launching

// The kernels for a tiling.
struct Kernels {
  int rows, x_rows;
  int64_t shared_bytes;
  int blocks_per_multiprocessor;
  void (*bfloat16)(Product);
  void (*float16)(Product);
};

template <int kRows, int kXRows>
constexpr Kernels kernels_for() {
  using T = Tiling<kRows, kXRows>;
  return {kRows, kXRows, sizeof(typename T::Shared), kBlocksPerMultiprocessor<T>, multiply<T, kBfloat16>, multiply<T, kFloat16>};
}

// Those that bring the fewest bytes for a product come last.
constexpr Kernels kKernels[] = {kernels_for<16, 64>(),   kernels_for<16, 128>(), kernels_for<32, 64>(),  kernels_for<32, 128>(),
                                kernels_for<64, 64>(),   kernels_for<64, 128>(), kernels_for<128, 64>(), kernels_for<128, 128>(),
                                kernels_for<128, 256>(), kernels_for<256, 128>()};

// The last tiling that fits the device and is not twice as large as need be.
const Kernels& choose_kernels(const TwoFourParams& params, const Device& device) {
  constexpr const Kernels& kLeast = kKernels[0];
  const Kernels* chosen = &kLeast;
  for (const Kernels& kernels : kKernels) {
    const bool rows = kernels.rows == kLeast.rows || kernels.rows < 2 * params.block_rows;
    const bool x_rows = kernels.x_rows == kLeast.x_rows || kernels.x_rows < 2 * params.m;
    if (rows && x_rows && kernels.shared_bytes <= device.shared_bytes) chosen = &kernels;
  }
  return *chosen;
}

struct Plan {
  const Kernels* kernels;
  int64_t row_tiles, x_tiles;
  Deal deal;
  int64_t arrived_bytes, partials_bytes;  // parts of the workspace
};

Plan plan(const TwoFourParams& params, const Device& device) {
  constexpr int64_t kReserved = 1024;          // bytes that every threadblock takes besides
  constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid
  constexpr int64_t kLeastStages = 4;          // that are worth a threadblock
  Plan plan = {};
  const Kernels& kernels = choose_kernels(params, device);
  plan.kernels = &kernels;
  plan.row_tiles = blocks_across(params.block_rows, kernels.rows);
  plan.x_tiles = blocks_across(params.m, kernels.x_rows);
  const int64_t lines = params.has_blocks() ? params.index.lines : 1;
  const int64_t tiles = lines * plan.row_tiles * plan.x_tiles;
  const int64_t stages = params.has_blocks() || params.cols == 0 ? 1 : blocks_across(params.cols, 2 * kChunkColumns);
  const int64_t fit = (device.shared_bytes + kReserved) / (kernels.shared_bytes + kReserved);
  const int64_t resident = device.multiprocessors * (fit < kernels.blocks_per_multiprocessor ? fit : kernels.blocks_per_multiprocessor);
  const int64_t places = blocks_across(tiles, resident) * resident;  // for threadblocks, till the last one is done
  int64_t blocks = tiles;
  if (stages > 1 && tiles < places - places / 4) {  // more than a quarter of the places would be empty
    const int64_t worth = blocks_across(tiles * stages, kLeastStages);
    blocks = worth < resident ? worth : resident;
  }
  plan.deal = {stages, tiles * stages, blocks < kMostBlocks ? blocks : kMostBlocks};
  if (!plan.deal.whole_tiles()) {
    plan.arrived_bytes = blocks_across(plan.deal.blocks * static_cast<int64_t>(sizeof(uint32_t)), 16) * 16;
    plan.partials_bytes = plan.deal.blocks * 2 * kernels.rows * kernels.x_rows * static_cast<int64_t>(sizeof(float));
  }
  return plan;
}

bool is_empty(const TwoFourParams& params) { return params.m == 0 || params.rows == 0; }

// Whether the kernels can read what they are given 16 bytes at a time, and count it as they do.
bool is_suitable(const TwoFourParams& params) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto at = [](const void* array) { return reinterpret_cast<uintptr_t>(array) % 16; };
  const bool sizes = params.has_blocks() ? params.block_cols % kChunkColumns == 0 && params.block_rows % 16 == 0 &&
                                               params.block_cols < kMost && params.block_rows < kMost / params.block_cols
                                         : params.cols % kPieceColumns == 0;
  return sizes && params.cols < kMost && params.cols % 8 == 0 && at(params.x) == 0 && at(params.values) == 0;
}

}  // namespace

int64_t two_four_multiply_workspace_bytes(const TwoFourParams& params, const Device& device) {
  if (is_empty(params)) return 0;
  const Plan p = plan(params, device);
  return p.arrived_bytes + p.partials_bytes;
}

cudaError_t two_four_multiply(const TwoFourParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if ((params.dtype != kBfloat16 && params.dtype != kFloat16) || params.index.order != nullptr) return cudaErrorInvalidValue;
  if (is_empty(params)) return cudaSuccess;
  if (!is_suitable(params)) return cudaErrorInvalidValue;
  const Plan plan = cuda::plan(params, device);
  uint8_t* const scratch = static_cast<uint8_t*>(workspace);
  Product product = {};
  product.params = params;
  product.cols = static_cast<int>(params.cols);
  product.block_cols = static_cast<int>(params.block_cols);
  product.row_bytes = bitmask_bytes(params.block_cols);
  product.block_bytes = static_cast<int>(params.has_blocks() ? params.block_rows * product.row_bytes : 0);
  product.chunks = params.block_cols == 0 ? 1 : static_cast<int>(blocks_across(params.block_cols, kChunkColumns));
  product.pieces = static_cast<int>(params.block_cols / kPieceColumns);
  product.words_aligned = product.row_bytes % 4 == 0 && reinterpret_cast<uintptr_t>(params.metadata) % 4 == 0;
  product.y_aligned = params.rows % 8 == 0 && reinterpret_cast<uintptr_t>(params.y) % 16 == 0;
  product.row_tiles = plan.row_tiles;
  product.x_tiles = plan.x_tiles;
  product.deal = plan.deal;
  product.join = {reinterpret_cast<uint32_t*>(scratch), reinterpret_cast<float4*>(scratch + plan.arrived_bytes)};
  if (plan.arrived_bytes > 0) {
    const cudaError_t error = cudaMemsetAsync(scratch, 0, static_cast<size_t>(plan.arrived_bytes), stream);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = params.dtype == kFloat16 ? plan.kernels->float16 : plan.kernels->bfloat16;
  const int shared_bytes = static_cast<int>(plan.kernels->shared_bytes);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.deal.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, product);
}

}  // namespace bitmask::cuda
