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
#include "launch.cuh"

namespace bitmask::cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------------- the product

// What a stage of a tile of 256 x 128 costs on an H100, in cycles of a multiprocessor; dense, wgmma takes 1024 at its peak. Counted in the
// SASS for sm_90a. Not timed.
//
//   second cache        1450    34 KB, if each multiprocessor gets 24 bytes a cycle (5.5 TB/s)
//   tensor cores  830 - 1160    512 mma.sp; mma.sync reaches 62% of wgmma's peak, and mma.sp between 1.4 and 2 times mma.sync's rate
//   shared memory       1100    ldmatrix 770, metadata 60, copying 270
//   instructions        1020    512 of each of 8 warps; 64 of them are mma.sp
//
// So at best this is about as fast as the dense product of cuBLAS, which has wgmma and copies to several multiprocessors at once; on sm_80,
// where cuBLAS has mma.sync, it is bound by the same things, and dense takes 2048 cycles.
//
// T       the tiling
// kDtype  of x, W and y
template <class T, LinearDtype kDtype>
struct Multiply {
  static constexpr int kFours = T::kFragments * T::kTiles;
  using Stage = typename T::Stage;
  using Sums = float[kFours][4];  // [fragment of W][eight rows of x], as mma.sp has them

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x / 32) / T::kXWarps * T::kFragments * 16; }
  static __device__ __forceinline__ int first_x_row() { return static_cast<int>(threadIdx.x / 32) % T::kXWarps * T::kTiles * 8; }

  // Where a lane's operands are: bytes from the beginning of each part of a stage, in its first chunk.
  struct Operands {
    int values, x, metadata;

    __device__ __forceinline__ Operands() {
      const int matrix = lane() / 8, row = lane() % 8;
      values = ptx::opaque((first_row() + 8 * (matrix % 2) + row) * kValueRow + (matrix / 2 ^ row / 2 % 4) * 16);
      x = ptx::opaque((first_x_row() + row) * kXRow + (matrix ^ row) * 16);
      metadata = (first_row() + lane() / 4) * kMetadataRow + lane() % 4 * 2;
    }
  };

  // The codes that a lane brings: of 16 columns of the rows g and g + 8 of each fragment. `wrong` gathers faults of these rows, by halves.
  // `there`: whether the columns are in W.
  static __device__ __forceinline__ void read_codes(const uint8_t* metadata, int at, bool there, uint32_t (&codes)[T::kFragments],
                                                    uint32_t (&wrong)[T::kFragments]) {
    uint32_t any = 0;
    uint32_t faults[T::kFragments];
#pragma unroll
    for (int i = 0; i < T::kFragments; ++i) {
      const uint32_t low = *reinterpret_cast<const uint16_t*>(metadata + at + 16 * i * kMetadataRow);
      const uint32_t high = *reinterpret_cast<const uint16_t*>(metadata + at + (16 * i + 8) * kMetadataRow);
      codes[i] = there ? low | high << 16 : kSoundGroups;
      faults[i] = faults_of(codes[i]);
      wrong[i] |= faults[i];
      any |= faults[i];
    }
    if (any != 0) {
#pragma unroll
      for (int i = 0; i < T::kFragments; ++i) codes[i] = repair(codes[i], faults[i]);
    }
#pragma unroll
    for (uint32_t& bits : codes) bits = codes_of(bits);
  }

  // A chunk of a stage, whose codes the lanes with t / 2 == kChunk bring. The swizzle flips bits, so that the second chunk's pieces are
  // where those of the first are, one bit flipped.
  template <int kChunk>
  static __device__ __forceinline__ void multiply_chunk(const Stage& stage, const Operands& operands,
                                                        const uint32_t (&codes)[T::kFragments], Sums& sums) {
    const uint8_t* const values = stage.values + (operands.values ^ kChunk * kValueRow / 2);
    const uint8_t* const x = stage.x + (operands.x ^ kChunk * kXRow / 2);
    uint32_t a[T::kFragments][4];
#pragma unroll
    for (int i = 0; i < T::kFragments; ++i) ptx::load_matrix_x4(a[i], values + 16 * i * kValueRow);
#pragma unroll
    for (int tile = 0; tile < T::kTiles; ++tile) {
      uint32_t b[4];
      ptx::load_matrix_x4(b, x + 8 * tile * kXRow);
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
  static __device__ __forceinline__ BlockLine prove_line(const TwoFourProduct& p, int64_t index) {
    if (!p.params.has_blocks()) return BlockLine(0, 1);
    BlockLine line(p.params.index, index);
#pragma unroll 1
    for (int64_t i = line.begin + threadIdx.x; i < line.end; i += kThreads) {
      line.sound = line.sound && line.holds(p.params.index, i, p.params.index.positions[i]);
    }
    line.sound = __syncthreads_or(!line.sound) == 0;
    if (!line.sound) line.end = line.begin;
    return line;
  }

  // The sums of a segment.
  static __device__ __forceinline__ void multiply_segment(const TwoFourProduct& p, const Segment& s, Sums& sums) {
    const TwoFourTile tile = T::tile_of(p, s.tile);
    typename T::Shared& shared = *ptx::dynamic_shared<typename T::Shared>();
    const BlockLine line = prove_line(p, tile.line);
    const int pieces = static_cast<int>(line.end - line.begin) * p.pieces, stages = (pieces + 3) / 4;
    const bool dealt = !p.params.has_blocks();
    const int begin = dealt ? static_cast<int>(s.begin) : 0, end = dealt && s.end < stages ? static_cast<int>(s.end) : stages;
    Copier<T> copier(p, tile, line, begin);
    const Operands operands;
    uint32_t wrong[T::kFragments] = {};
    int slot = 1;  // of the stage that is multiplied, once the first ones are on their way
    for (int stage = begin - (kStages - 1); stage < end; ++stage) {
      ptx::copy_async_wait<kStages - 2>();
      __syncthreads();
      Stage& next = shared.stages[slot == 0 ? kStages - 1 : slot - 1];
      const bool more = stage + kStages - 1 < end;
      uint32_t codes[T::kFragments];
      if (stage >= begin) {
        read_codes(shared.stages[slot].metadata, operands.metadata, lane() % 4 < pieces - 4 * stage, codes, wrong);
        multiply_chunk<0>(shared.stages[slot], operands, codes, sums);
      }
      if (more) copier.copy(next);
      ptx::copy_async_commit();
      if (stage >= begin) multiply_chunk<1>(shared.stages[slot], operands, codes, sums);
      if (more) copier.keep(next);
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    spoil(wrong, !line.sound, sums);
    __syncthreads();  // shared memory is free
  }

  // Adds the bias, rounds, turns the tile and stores it.
  static __device__ __forceinline__ void store(const TwoFourProduct& p, const TwoFourTile& tile, const Sums& sums) {
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
  static __device__ __forceinline__ void run(const TwoFourProduct& p) {
    const int64_t last = p.deal.begin(blockIdx.x + 1);
    for (int64_t unit = p.deal.begin(blockIdx.x); unit < last;) {
      Sums sums = {};
      multiply_segment(p, p.deal.segment(unit, last), sums);
      const Segment s = p.deal.segment(ptx::opaque(unit), last);  // anew, lest it takes registers meanwhile
      if (p.join.add<kThreads>(p.deal, s, sums)) store(p, T::tile_of(p, s.tile), sums);
      unit += s.end - s.begin;
    }
  }
};

template <class T>
constexpr int kBlocksPerMultiprocessor = T::kFragments * T::kTiles > 16 ? 1 : 2;  // whose sums fit in registers

template <class T, LinearDtype kDtype>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>) void multiply(const TwoFourProduct p) {
  Multiply<T, kDtype>::run(p);
}

// ---------------------------------------------------------------------------------------------------------------- launching

// The kernels for a tiling.
struct Kernels {
  int rows, x_rows;
  int64_t shared_bytes;
  int blocks_per_multiprocessor;
  void (*bfloat16)(TwoFourProduct);
  void (*float16)(TwoFourProduct);
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
  JoinSpace join;
  bool scheduled;  // whether it is worth it to deal long lines first
  int64_t schedule_bytes;
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
    const int64_t worth = blocks_across(tiles * stages, kLeastStages), most = worth < tiles ? tiles : worth;
    blocks = most < resident ? most : resident;
  }
  plan.deal = {stages, tiles * stages, blocks < kMostBlocks ? blocks : kMostBlocks};
  plan.join = {plan.deal, kernels.rows * kernels.x_rows};
  plan.scheduled = params.has_blocks() && tiles > resident;
  if (plan.scheduled) plan.schedule_bytes = round_up(lines * static_cast<int64_t>(sizeof(int32_t)), 16);
  return plan;
}

bool is_empty(const TwoFourParams& params) { return params.m == 0 || params.rows == 0; }

}  // namespace

// What the kernels can read 16 bytes at a time, and count as they do.
bool two_four_multiply_takes(const TwoFourParams& params, const Device& device) {
  if ((params.dtype != kBfloat16 && params.dtype != kFloat16) || params.index.order != nullptr) return false;
  if (kKernels[0].shared_bytes > device.shared_bytes) return false;
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto at = [](const void* array) { return reinterpret_cast<uintptr_t>(array) % 16; };
  const bool sizes = params.has_blocks() ? params.block_cols > 0 && params.block_cols % kChunkColumns == 0 && params.block_rows % 16 == 0 &&
                                               params.block_cols < kMost && params.block_rows < kMost / params.block_cols
                                         : params.cols % kPieceColumns == 0;
  return sizes && params.cols < kMost && params.cols % 8 == 0 && at(params.x) == 0 && at(params.values) == 0;
}

int64_t two_four_multiply_workspace_bytes(const TwoFourParams& params, const Device& device) {
  if (is_empty(params)) return 0;
  const Plan p = plan(params, device);
  return p.join.bytes() + p.schedule_bytes;
}

cudaError_t two_four_multiply(const TwoFourParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  if (!two_four_multiply_takes(params, device)) return cudaErrorInvalidValue;
  if (is_empty(params)) return cudaSuccess;
  const Plan plan = cuda::plan(params, device);
  TwoFourProduct product = {};
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
  product.join = plan.join.at(workspace);
  cudaError_t error = plan.join.clear(product.join, stream);
  if (error == cudaSuccess && plan.scheduled) {
    int32_t* const schedule = reinterpret_cast<int32_t*>(static_cast<uint8_t*>(workspace) + plan.join.bytes());
    error = schedule_lines(params.index, schedule, stream);
    product.schedule = schedule;
  }
  if (error != cudaSuccess) return error;
  const auto kernel = params.dtype == kFloat16 ? plan.kernels->float16 : plan.kernels->bfloat16;
  return launch_kernel(kernel, {plan.deal.blocks, kThreads, plan.kernels->shared_bytes}, stream, product);
}

}  // namespace bitmask::cuda
