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
// kIsB         whether it is operand b of the instructions, or else a
template <int kLines, int kWidth, bool kDepthAlong, bool kIsB>
struct OperandTile {
  static constexpr int kBytes = kLines * kStageBytes;
  static constexpr int kRowBytes = kDepthAlong ? kStageBytes : kLines * kWidth;
  static constexpr int kRows = kBytes / kRowBytes;
  static constexpr int kRowChunks = kRowBytes / kChunkBytes;
  static constexpr int kRowsOfBanks = kRowChunks < 8 ? 8 / kRowChunks : 1;  // rows that fill all banks, or a row that fills them
  static constexpr bool kByWords = !kDepthAlong && kWidth == 4;
  static constexpr int kTurns = (kRowChunks < 8 ? kRowChunks : 8) / (kByWords ? 2 : 1);
  static constexpr int kPeriod = kRowsOfBanks * kTurns;  // rows after which turns are the same

  // Words are read from two chunks of four rows at a time, hence turns by two.
  static __host__ __device__ constexpr int turn(int row) { return row / kRowsOfBanks % kTurns * (kByWords ? 2 : 1); }
  // Bytes from the beginning of the tile.
  static __host__ __device__ constexpr int place(int row, int chunk) { return row * kRowBytes + kChunkBytes * (chunk ^ turn(row)); }

  // Where a lane begins to read operands of the lines from `first` on, and from there where those so many lines and steps on are. `first`
  // is a multiple of as many lines as are read from it on.
  static __host__ __device__ constexpr int origin(int lane, int first) {
    if (kByWords) return place(lane % 4, (first + lane / 4) / 4) + lane / 4 % 4 * 4;
    const int lines = 8 * (lane / (kIsB ? 16 : 8) % 2), half = lane / (kIsB ? 8 : 16) % 2;  // that the lane points ldmatrix to
    return kDepthAlong ? place(first + lines + lane % 8, half) : place(8 * half + lane % 8, (first + lines) / 8);
  }
  static __host__ __device__ constexpr int operand(int origin, int lines, int step) {
    if (kDepthAlong) return (origin ^ step * kStepBytes) + lines * kRowBytes;
    const int bytes = lines * kWidth;  // within 128 of them chunks turn
    return (origin ^ bytes % 128) + bytes / 128 * 128 + step * (kStepBytes / kWidth) * kRowBytes;
  }

  // A step of 16 lines: of each eight of them, each half of the step. Of a the lines come in turn first, of b the halves, so that what an
  // instruction takes is in registers side by side: r as a, (r[0], r[1]) as b for the first eight lines, (r[2], r[3]) for the others.
  static __device__ __forceinline__ void load(const uint8_t* tile, int origin, int sixteen, int step, uint32_t (&r)[4]) {
    if constexpr (kByWords) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int lines = kIsB ? i / 2 : i % 2, half = kIsB ? i % 2 : i / 2;
        r[i] = *reinterpret_cast<const uint32_t*>(tile + operand(origin, 16 * sixteen + 8 * lines, step) + half * 4 * kRowBytes);
      }
    } else if constexpr (kDepthAlong) {
      ptx::load_matrix_x4(r, tile + operand(origin, 16 * sixteen, step));
    } else {
      ptx::load_matrix_x4_transposed(r, tile + operand(origin, 16 * sixteen, step));
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

  // Adds the product of a stage, of what lies from these origins on, or of as many steps as it has.
  template <int kSteps = kStageBytes / kStepBytes>
  __device__ __forceinline__ void add_stage(const uint8_t* a_tile, int a_origin, const uint8_t* b_tile, int b_origin) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kAs][4], b[kBs][4];
#pragma unroll
      for (int i = 0; i < kAs; ++i) A::load(a_tile, a_origin, i, step, a[i]);
#pragma unroll
      for (int j = 0; j < kBs; ++j) B::load(b_tile, b_origin, j, step, b[j]);
#pragma unroll
      for (int i = 0; i < kAs; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kBs; ++j) {
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply(sums[i * 2 * kBs + j], a[i], pair);
        }
      }
    }
  }

  // Adds term(line of B) to the sums of that line.
  template <typename Term>
  __device__ __forceinline__ void add_term(const Term& term) {
#pragma unroll
    for (int i = 0; i < 4 * kBs; ++i) {
      const float value = term(i / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2);
#pragma unroll
      for (int j = 0; j < 2 * kAs; ++j) sums[j / 2 * 2 * kBs + i / 2][j % 2 * 2 + i % 2] += value;
    }
  }

  // Leaves nothing of the sums past so many lines of A and of B.
  __device__ __forceinline__ void clear_past(int a_lines, int b_lines) {
#pragma unroll
    for (int i = 0; i < 4 * kFours; ++i) {
      const int a = i / 4 / (2 * kBs) * 16 + i / 2 % 2 * 8 + static_cast<int>(threadIdx.x % 32) / 4;
      const int b = i / 4 % (2 * kBs) * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
      if (a >= a_lines || b >= b_lines) sums[i / 4][i % 4] = 0;
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
