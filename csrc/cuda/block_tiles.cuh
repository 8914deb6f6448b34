// Products of tiles of shared memory by tensor cores, for kernels with blocks: where operands lie, how warps load and multiply them.
//
// A stage of a tile is 128 bytes of depth of each of its lines (rows of x, rows or columns of W), which are four steps of mma.m16n8k16 or,
// tf32, m16n8k8. Rows of a tile consist of chunks of 16 bytes, the unit of cp.async and ldmatrix:
//
//   depth along rows                    lines along rows                 chunk c of row r lies at chunk c ^ turn(r) of its row, so that
//   row: a line   | 8 chunks |          row: one depth | 2-32 chunks |   8 threads that copy a row, and 8 that read chunk c of 8 rows,
//   ldmatrix                            ldmatrix.trans; tf32: words      never meet in a bank
//
// As a step takes the same 32 bytes of depth whatever the dtype, ldmatrix makes operands of tf32 from rows along depth, too.
#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "elements.cuh"

namespace bitmask::cuda {

constexpr int kChunkBytes = 16;
constexpr int kStageBytes = 128;
constexpr int kStepBytes = 32;

// kLines       a multiple of 16 and a power of two
// kWidth       bytes of an element
// kDepthAlong  whether a row is a line, or else one element of depth of all lines
template <int kLines, int kWidth, bool kDepthAlong>
struct OperandTile {
  static constexpr int kBytes = kLines * kStageBytes;
  static constexpr int kRowBytes = kDepthAlong ? kStageBytes : kLines * kWidth;
  static constexpr int kRows = kBytes / kRowBytes;
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  static constexpr int kRowsOfBanks = kRowChunks < 8 ? 8 / kRowChunks : 1;  // rows that fill all banks, or a row that fills them
  static constexpr int kTurns = kRowChunks < 8 ? kRowChunks : 8;
  static constexpr bool kByWords = !kDepthAlong && kWidth == 4;

  // Words are read from two chunks of four rows at a time, hence turns by two.
  static __host__ __device__ constexpr int turn(int row) {
    return kByWords ? 2 * (row / kRowsOfBanks % (kTurns / 2)) : row / kRowsOfBanks % kTurns;
  }
  // Bytes from the beginning of the tile.
  static __host__ __device__ constexpr int place(int row, int chunk) { return row * kRowBytes + kChunkBytes * (chunk ^ turn(row)); }

  // Where a lane begins to read operands of the lines from `first` on, and from there where those of another 16 lines and of another step
  // are. `first` is a multiple of as many lines as are read from it on.
  static __host__ __device__ constexpr int origin(int lane, int first) {
    return kByWords      ? place(lane % 4, (first + lane / 4) / 4) + lane / 4 % 4 * 4
           : kDepthAlong ? place(first + lane % 16, lane / 16)
                         : place(8 * (lane / 16) + lane % 8, first / 8 + lane / 8 % 2);
  }
  static __host__ __device__ constexpr int operand(int origin, int sixteen, int step) {
    return kDepthAlong ? (origin ^ step * kStepBytes) + sixteen * 16 * kRowBytes
                       : (origin ^ sixteen * 16 * kWidth) + step * (kStepBytes / kWidth) * kRowBytes;
  }

  // A step of 16 lines: r[i + 2 j] is of the lines 8 i ... 8 i + 7 and of half j of the step, as instructions want it of a; (r[i], r[i +
  // 2]) as they want it of b for 8 lines.
  static __device__ __forceinline__ void load(const uint8_t* tile, int origin, int sixteen, int step, uint32_t (&r)[4]) {
    const int at = operand(origin, sixteen, step);
    if constexpr (kByWords) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const uint32_t*>(tile + (at ^ i % 2 * 8 * kWidth) + i / 2 * 4 * kRowBytes);
    } else if constexpr (kDepthAlong) {
      ptx::load_matrix_x4(r, tile + at);
    } else {
      ptx::load_matrix_x4_transposed(r, tile + at);
    }
    if constexpr (kWidth == 4) {
#pragma unroll
      for (uint32_t& word : r) word = ptx::round_to_tfloat32(__uint_as_float(word));
    }
  }
};

// What a warp multiplies: kALines lines of a tile A by kBLines lines of a tile B. Lanes hold sums as the instructions have them.
template <LinearDtype kDtype, typename A, typename B, int kALines, int kBLines>
struct WarpProduct {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  static constexpr int kWidth = sizeof(Stored);
  static constexpr int kAs = kALines / 16, kBs = kBLines / 16;  // operands
  static constexpr int kFours = kAs * 2 * kBs;

  float sums[kFours][4];  // [line of A / 16, line of B / 8]

  __device__ __forceinline__ WarpProduct() : sums{} {}

  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kDtype == kFloat32) {
      ptx::mma_tfloat32(d, a, b);
    } else {
      E::multiply(d, a, b);
    }
  }

  // Adds the product of a stage, of what lies from these origins on.
  __device__ __forceinline__ void add_stage(const uint8_t* a_tile, int a_origin, const uint8_t* b_tile, int b_origin) {
#pragma unroll
    for (int step = 0; step < kStageBytes / kStepBytes; ++step) {
      uint32_t a[kAs][4], b[kBs][4];
#pragma unroll
      for (int i = 0; i < kAs; ++i) A::load(a_tile, a_origin, i, step, a[i]);
#pragma unroll
      for (int j = 0; j < kBs; ++j) B::load(b_tile, b_origin, j, step, b[j]);
#pragma unroll
      for (int i = 0; i < kAs; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kBs; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2], b[j / 2][j % 2 + 2]};
          multiply(sums[i * 2 * kBs + j], a[i], pair);
        }
      }
    }
  }

  // Calls change(sum, column) for each sum, with its line of B.
  template <typename Change>
  __device__ __forceinline__ void for_each(const Change& change) {
#pragma unroll
    for (int i = 0; i < 4 * kFours; ++i) {
      change(sums[i / 4][i % 4], i / 4 % (2 * kBs) * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2);
    }
  }

  // Scratch memory of a warp: 16 rows. The pad keeps rows that are written at a time in different banks.
  static constexpr int kScratchStride = (kBLines + 8) * kWidth;
  static constexpr int kScratchBytes = 16 * kScratchStride;

  // Rounds the sums and writes the first `rows` lines of A, of each the first `columns` lines of B, to `target`, whose rows are `stride`
  // bytes apart. `whole`: target and stride are aligned to 16 bytes, columns are whole chunks.
  __device__ __forceinline__ void store(uint8_t* scratch, uint8_t* target, int64_t stride, int rows, int columns, bool whole) const {
    constexpr int kRowChunks = kBLines * kWidth / kChunkBytes, kOfChunk = kChunkBytes / kWidth, kRowsAtOnce = 32 / kRowChunks;
    const int lane = static_cast<int>(threadIdx.x % 32), row = lane / kRowChunks, column = lane % kRowChunks * kOfChunk;
    uint8_t* const pair = scratch + lane / 4 * kScratchStride + lane % 4 * 2 * kWidth;
    const uint8_t* const from = scratch + row * kScratchStride + column * kWidth;
    uint8_t* to = target + row * stride + column * kWidth;
    int left = column < columns ? rows - row : 0;
#pragma unroll
    for (int i = 0; i < kAs; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kBs; ++j) {
        const float (&four)[4] = sums[i * 2 * kBs + j];
        put(pair + 8 * j * kWidth, four[0], four[1]);
        put(pair + 8 * j * kWidth + 8 * kScratchStride, four[2], four[3]);
      }
      __syncwarp();
#pragma unroll 1
      for (int k = 0; k < 16; k += kRowsAtOnce, left -= kRowsAtOnce, to += kRowsAtOnce * stride) {
        if (left > 0) copy_chunk(to, from + k * kScratchStride, columns - column, whole);
      }
      __syncwarp();
    }
  }

 private:
  // Up to as many elements as a chunk has.
  static __device__ __forceinline__ void copy_chunk(uint8_t* to, const uint8_t* from, int elements, bool whole) {
    if (whole) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kChunkBytes / kWidth && i < elements; ++i) {
      reinterpret_cast<Stored*>(to)[i] = reinterpret_cast<const Stored*>(from)[i];
    }
  }

  static __device__ __forceinline__ void put(uint8_t* pair, float first, float second) {
    if constexpr (kWidth == 4) {
      *reinterpret_cast<uint2*>(pair) = make_uint2(__float_as_uint(first), __float_as_uint(second));
    } else {
      *reinterpret_cast<uint32_t*>(pair) = static_cast<uint32_t>(E::narrow(first)) | static_cast<uint32_t>(E::narrow(second)) << 16;
    }
  }
};

// Waits until all but this thread's `pending` latest groups of copies are there: 0, 1 or 2 of them.
__device__ __forceinline__ void copy_async_wait(int pending) {
  if (pending == 0) {
    ptx::copy_async_wait<0>();
  } else if (pending == 1) {
    ptx::copy_async_wait<1>();
  } else {
    ptx::copy_async_wait<2>();
  }
}

}  // namespace bitmask::cuda
