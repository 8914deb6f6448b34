// The functions of csrc/cuda/ptx_warpgroup.cuh, done by the CPU (see there for what they do; warpgroup.h for how).
#pragma once

#include <cuda.h>

#include <ptx.cuh>

#include <cstdint>
#include <cstring>

#include "warpgroup.h"

#define __CUDA_ARCH_FEAT_SM90_ALL  // the twin is such a GPU

namespace bitmask::cuda::ptx {

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { twin::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_arrive(uint64_t* barrier) { twin::barrier_arrive(barrier, 0); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { twin::barrier_arrive(barrier, bytes); }

inline bool barrier_try_wait(uint64_t* barrier, uint32_t parity, BITMASK_TWIN_SITE) {
  twin::barrier_wait(barrier, parity, site);
  return true;
}

inline void copy_box(void* shared, const CUtensorMap* map, int32_t column, int32_t row, uint64_t* barrier) {
  twin::copy_box(shared, map, column, row, barrier);
}
inline void prefetch_map(const CUtensorMap*) {}

// PTX ISA, "Warp-level matrix store instruction: stmatrix". Each lane writes the row that it names.
template <bool kTransposed>
struct StoreMatrix {
  const uint32_t* r;
  uint16_t row[8];

  static void combine(StoreMatrix* const (&lanes)[twin::kLanes], uint32_t) {
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int row = kTransposed ? i : lane % 8, column = kTransposed ? lane % 8 : i;
        const uint32_t pair = lanes[4 * row + column / 2]->r[lane / 8];
        lanes[lane]->row[i] = static_cast<uint16_t>(pair >> (16 * (column % 2)));
      }
    }
  }
};

template <bool kTransposed>
void store_matrix(void* shared_row, const uint32_t (&r)[4], twin::Site site) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) twin::fail("stmatrix: %p is not aligned to 16 bytes", shared_row);
  if (!twin::is_shared(shared_row, 16)) twin::fail("stmatrix: %p is outside of the block's shared memory", shared_row);
  StoreMatrix<kTransposed> mine{r, {}};
  twin::exchange<StoreMatrix<kTransposed>>(kTransposed ? "stmatrix.trans" : "stmatrix", ~0u, mine, site);
  std::memcpy(shared_row, mine.row, sizeof(mine.row));
}

inline void store_matrix_x4(void* shared_row, const uint32_t (&r)[4], BITMASK_TWIN_SITE) { store_matrix<false>(shared_row, r, site); }
inline void store_matrix_x4_transposed(void* shared_row, const uint32_t (&r)[4], BITMASK_TWIN_SITE) {
  store_matrix<true>(shared_row, r, site);
}

inline uint64_t operand_of(const void* shared, uint32_t along, uint32_t group) {
  return uint64_t{1} << 62 | uint64_t{group >> 4} << 32 | uint64_t{along >> 4} << 16 | shared_address(shared) >> 4;
}

inline void warpgroup_fence() { twin::multiply_fence(); }
inline void warpgroup_commit() { twin::multiply_commit(); }

template <int kPending>
void warpgroup_wait() {
  twin::multiply_wait(kPending);
}

template <int kSums>
void warpgroup_wait_for(float (&)[kSums]) {
  twin::multiply_wait(0);
}

// All lanes of a warp multiply, and the same.
struct SameOperands {
  uint64_t a, b;

  static void combine(SameOperands* const (&lanes)[twin::kLanes], uint32_t) {
    for (const SameOperands* lane : lanes) {
      if (lane->a != lanes[0]->a || lane->b != lanes[0]->b) twin::fail("wgmma: lanes multiply different operands");
    }
  }
};

template <bool kTransposedA, bool kTransposedB, int kSums>
void warpgroup_multiply(float (&d)[kSums], uint64_t a, uint64_t b, twin::Widen widen, twin::Site site) {
  static_assert(kSums == 64 || kSums == 128);
  SameOperands mine{a, b};
  twin::exchange<SameOperands>("wgmma", ~0u, mine, site);
  twin::multiply(d, kSums, {a, b, kTransposedA, kTransposedB, widen, 0});
}

template <bool kTransposedA, bool kTransposedB, int kSums>
void warpgroup_multiply_bfloat16(float (&d)[kSums], uint64_t a, uint64_t b, BITMASK_TWIN_SITE) {
  warpgroup_multiply<kTransposedA, kTransposedB>(d, a, b, bfloat16_to_float, site);
}

template <bool kTransposedA, bool kTransposedB, int kSums>
void warpgroup_multiply_float16(float (&d)[kSums], uint64_t a, uint64_t b, BITMASK_TWIN_SITE) {
  warpgroup_multiply<kTransposedA, kTransposedB>(d, a, b, half_to_float, site);
}

}  // namespace bitmask::cuda::ptx
