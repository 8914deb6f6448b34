// Products of tiles on CUDA cores, of elements of any dtype that lie anywhere: what the kernels of block_cores.cu have in common.
//
//            kN                 sums[i][j] += a[k][i] b[k][j]: both operands lie in shared memory with k, the depth, as their rows, widened
//   k  +-----------+            to what is summed in. A thread has kRows x kCols sums, in groups that are read 16 bytes at a time:
//      |     b     |
//      +-----------+            columns   |t=0 |t=1 |t=2 |t=3 | ... |t=0 |t=1 |t=2 |t=3 | ...
//   k
//  +--++-----------+            While one stage of kDepth rows is multiplied, the next one is on its way to registers. Elements that are
//  |a ||   sums    | kM         not there are zeros; where rows of memory are aligned, 16 bytes of them are loaded at a time.
//  +--++-----------+
#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "elements.cuh"

namespace bitmask::cuda {

// Where an operand lies from a stage on: element (k, i) at k * stride + i, or i * stride + k if memory runs along the depth.
template <typename Stored>
struct OperandSource {
  const Stored* first;
  int64_t stride;
  bool along_depth;
  bool aligned;      // `first` and `stride`, to 16 bytes
  int depth, width;  // elements that are there: k, i

  __device__ __forceinline__ Stored element(int k, int i) const {
    return k < depth && i < width ? first[along_depth ? i * stride + k : k * stride + i] : Stored{0};
  }
};

// What is read or written at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T v[kCount];
};

// kTileRows, kTileCols      of the sums of a tile
// kThreadRows, kThreadCols  of those of a thread
template <LinearDtype kDtype, int kTileRows, int kTileCols, int kThreadRows, int kThreadCols>
struct CoresTile {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  using Sum = typename E::Sum;
  using Source = OperandSource<Stored>;
  static constexpr int kM = kTileRows, kN = kTileCols, kRows = kThreadRows, kCols = kThreadCols;
  static constexpr int kDepth = 64 / int{sizeof(Sum)};
  static constexpr int kPad = 16 / int{sizeof(Sum)};  // spreads what is stored column by column over banks
  static constexpr int kAcross = kN / kCols;          // threads
  static constexpr int kThreads = kM / kRows * kAcross;
  static constexpr int kVector = 16 / int{sizeof(Stored)};  // elements

  struct Shared {
    alignas(16) Sum a[2][kDepth][kM + kPad];
    alignas(16) Sum b[2][kDepth][kN + kPad];
  };

  // How many of a thread's rows or columns follow each other, to be read at once.
  static __host__ __device__ constexpr int group(int count) { return count < 16 / int{sizeof(Sum)} ? count : 16 / int{sizeof(Sum)}; }

  // Which of `kWhole` rows or columns a thread's number `i` is, being number `t` of those that share them.
  template <int kWhole, int kOwn>
  static __device__ __forceinline__ int place(int t, int i) {
    return (i / group(kOwn) * (kWhole / kOwn) + t) * group(kOwn) + i % group(kOwn);
  }
  static __device__ __forceinline__ int row(int i) { return place<kM, kRows>(static_cast<int>(threadIdx.x) / kAcross, i); }
  static __device__ __forceinline__ int col(int j) { return place<kN, kCols>(static_cast<int>(threadIdx.x) % kAcross, j); }

  // A thread's part of an operand's stage, on its way from global to shared memory.
  template <int kWidth>
  struct Part {
    static constexpr int kVectors = kDepth * kWidth / kVector / kThreads;
    static_assert(kVectors * kVector * kThreads == kDepth * kWidth);
    static constexpr int kDepthVectors = kDepth / kVector, kWidthVectors = kWidth / kVector;

    Vector<Stored, kVector> parts[kVectors];

    static __device__ __forceinline__ int number(int vector) { return static_cast<int>(threadIdx.x) + vector * kThreads; }

    __device__ __forceinline__ void fetch(const Source& source) {
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        const int k = source.along_depth ? number(n) % kDepthVectors * kVector : number(n) / kWidthVectors;
        const int i = source.along_depth ? number(n) / kDepthVectors : number(n) % kWidthVectors * kVector;
        const int k_end = source.along_depth ? k + kVector : k + 1, i_end = source.along_depth ? i + 1 : i + kVector;
        if (source.aligned && k_end <= source.depth && i_end <= source.width) {
          const Stored* const at = source.first + (source.along_depth ? i * source.stride + k : k * source.stride + i);
          parts[n] = *reinterpret_cast<const Vector<Stored, kVector>*>(at);
        } else {
#pragma unroll
          for (int v = 0; v < kVector; ++v) parts[n].v[v] = source.along_depth ? source.element(k + v, i) : source.element(k, i + v);
        }
      }
    }

    __device__ __forceinline__ void put(bool along_depth, Sum (&stage)[kDepth][kWidth + kPad]) const {
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        if (along_depth) {
          const int k = number(n) % kDepthVectors * kVector, i = number(n) / kDepthVectors;
#pragma unroll
          for (int v = 0; v < kVector; ++v) stage[k + v][i] = E::widen(parts[n].v[v]);
        } else {
          constexpr int kGroup = group(kVector);
          const int k = number(n) / kWidthVectors, i = number(n) % kWidthVectors * kVector;
#pragma unroll
          for (int v = 0; v < kVector; v += kGroup) {
            Vector<Sum, kGroup> widened;
#pragma unroll
            for (int u = 0; u < kGroup; ++u) widened.v[u] = E::widen(parts[n].v[v + u]);
            *reinterpret_cast<Vector<Sum, kGroup>*>(&stage[k][i + v]) = widened;
          }
        }
      }
    }
  };

  template <int kWhole, int kOwn>
  static __device__ __forceinline__ void read(const Sum (&line)[kWhole + kPad], int t, Sum (&own)[kOwn]) {
    constexpr int kGroup = group(kOwn);
#pragma unroll
    for (int i = 0; i < kOwn; i += kGroup) {
      const auto read = *reinterpret_cast<const Vector<Sum, kGroup>*>(&line[place<kWhole, kOwn>(t, i)]);
#pragma unroll
      for (int u = 0; u < kGroup; ++u) own[i + u] = read.v[u];
    }
  }

  static __device__ __forceinline__ void multiply_row(const Sum (&a)[kM + kPad], const Sum (&b)[kN + kPad], Sum (&sums)[kRows][kCols]) {
    Sum rows[kRows], cols[kCols];
    read<kM, kRows>(a, static_cast<int>(threadIdx.x) / kAcross, rows);
    read<kN, kCols>(b, static_cast<int>(threadIdx.x) % kAcross, cols);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) sums[i][j] += rows[i] * cols[j];
    }
  }

  // Adds the products of all stages. next(a, b): where the operands of the next stage lie, or false; all threads are told the same.
  template <typename Next>
  static __device__ __forceinline__ void multiply(Next& next, Sum (&sums)[kRows][kCols]) {
    Shared& shared = *ptx::dynamic_shared<Shared>();
    Source a{}, b{};
    Part<kM> a_part;
    Part<kN> b_part;
    __syncthreads();  // nobody needs the tile before
    bool more = next(a, b);
    int depth = 0;  // of the stage in shared memory
#pragma unroll 1
    for (int now = 1;; now ^= 1) {  // buffers by turns: one is multiplied, the other one is written
      if (more) {
        a_part.fetch(a);
        b_part.fetch(b);
      }
      if (depth == kDepth) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) multiply_row(shared.a[now][k], shared.b[now][k], sums);
      } else {
#pragma unroll 1
        for (int k = 0; k < depth; ++k) multiply_row(shared.a[now][k], shared.b[now][k], sums);
      }
      if (!more) break;
      a_part.put(a.along_depth, shared.a[now ^ 1]);
      b_part.put(b.along_depth, shared.b[now ^ 1]);
      depth = a.depth;
      __syncthreads();
      more = next(a, b);
    }
  }
};

}  // namespace bitmask::cuda
