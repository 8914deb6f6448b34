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

  // Where a lane points ldmatrix to, for a step of 16 lines from `first` on.
  static __host__ __device__ constexpr int matrix_row(int lane, int first, int step) {
    return kDepthAlong ? place(first + lane % 16, 2 * step + lane / 16)
                       : place(16 * step + 8 * (lane / 16) + lane % 8, first * kWidth / kChunkBytes + lane / 8 % 2);
  }
  // Where a lane's word of an operand is, of the 8 lines `lines` and the half `half` of the step.
  static __host__ __device__ constexpr int word(int lane, int first, int step, int lines, int half) {
    const int line = first + 8 * lines + lane / 4;
    return place(8 * step + 4 * half + lane % 4, line / 4) + 4 * (line % 4);
  }

  // A step of 16 lines from `first` on: r[i + 2 j] is of the lines 8 i ... 8 i + 7 and of half j of the step, as instructions want it of a;
  // (r[i], r[i + 2]) as they want it of b for 8 lines.
  static __device__ __forceinline__ void load(const uint8_t* tile, int first, int step, uint32_t (&r)[4]) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if constexpr (kByWords) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = *reinterpret_cast<const uint32_t*>(tile + word(lane, first, step, i % 2, i / 2));
    } else if constexpr (kDepthAlong) {
      ptx::load_matrix_x4(r, tile + matrix_row(lane, first, step));
    } else {
      ptx::load_matrix_x4_transposed(r, tile + matrix_row(lane, first, step));
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

  // Adds the product of a stage; the operands of a step are loaded while those of the step before are multiplied.
  __device__ __forceinline__ void add_stage(const uint8_t* a_tile, int a_first, const uint8_t* b_tile, int b_first) {
    constexpr int kSteps = kStageBytes / kStepBytes;
    uint32_t a[2][kAs][4], b[2][kBs][4];
#pragma unroll
    for (int next = 0; next <= kSteps; ++next) {
      if (next < kSteps) {
#pragma unroll
        for (int i = 0; i < kAs; ++i) A::load(a_tile, a_first + 16 * i, next, a[next % 2][i]);
#pragma unroll
        for (int j = 0; j < kBs; ++j) B::load(b_tile, b_first + 16 * j, next, b[next % 2][j]);
      }
      if (next == 0) continue;
      const int now = (next - 1) % 2;
#pragma unroll
      for (int i = 0; i < kAs; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kBs; ++j) {
          const uint32_t pair[2] = {b[now][j / 2][j % 2], b[now][j / 2][j % 2 + 2]};
          multiply(sums[i * 2 * kBs + j], a[now][i], pair);
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
    constexpr int kRowChunks = kBLines * kWidth / kChunkBytes, kOfChunk = kChunkBytes / kWidth;
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kAs; ++i) {
      if (16 * i >= rows) break;
#pragma unroll
      for (int j = 0; j < 2 * kBs; ++j) {
        const float (&four)[4] = sums[i * 2 * kBs + j];
        uint8_t* const pair = scratch + lane / 4 * kScratchStride + (8 * j + lane % 4 * 2) * kWidth;
        put(pair, four[0], four[1]);
        put(pair + 8 * kScratchStride, four[2], four[3]);
      }
      __syncwarp();
#pragma unroll
      for (int at = lane; at < 16 * kRowChunks; at += 32) {
        const int row = at / kRowChunks, column = at % kRowChunks * kOfChunk;
        if (16 * i + row >= rows || column >= columns) continue;
        const uint8_t* const from = scratch + row * kScratchStride + column * kWidth;
        uint8_t* const to = target + (16 * i + row) * stride + column * kWidth;
        if (whole) {
          *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll 1
          for (int k = 0; k < kOfChunk && column + k < columns; ++k) {
            reinterpret_cast<Stored*>(to)[k] = reinterpret_cast<const Stored*>(from)[k];
          }
        }
      }
      __syncwarp();
    }
  }

 private:
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
