// The functions of csrc/cuda/ptx.cuh, done by the CPU (see there for what they do). They check what an instruction demands: alignment,
// lanes that all take part, addresses in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace bitmask::cuda::ptx {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(twin::shared_memory());
}

inline uint32_t shared_address(const void* shared) {
  if (!twin::is_shared(shared, 0)) twin::fail("takes %p for an address in shared memory", shared);
  return static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - twin::shared_memory());
}

inline void copy_async_16(void* shared, const void* global, int bytes = 16) { twin::copy_async(shared, global, bytes); }

inline void copy_async_commit() { twin::copy_async_commit(); }

template <int kPending>
void copy_async_wait() {
  static_assert(kPending >= 0);
  twin::copy_async_wait(kPending);
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix". Each lane reads the row that it names.
template <bool kTransposed>
struct LoadMatrix {
  uint32_t row[4];
  uint32_t r[4];

  uint32_t element(int column) const { return row[column / 2] >> (16 * (column % 2)) & 0xffff; }

  static void combine(LoadMatrix* const (&lanes)[twin::kLanes], uint32_t) {
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = kTransposed ? 2 * (lane % 4) : lane / 4, column = kTransposed ? lane / 4 : 2 * (lane % 4);
        const uint32_t low = lanes[8 * i + row]->element(column);
        const uint32_t high = kTransposed ? lanes[8 * i + row + 1]->element(column) : lanes[8 * i + row]->element(column + 1);
        lanes[lane]->r[i] = low | high << 16;
      }
    }
  }
};

template <bool kTransposed>
void load_matrix(uint32_t (&r)[4], const void* shared_row, twin::Site site) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) twin::fail("ldmatrix: %p is not aligned to 16 bytes", shared_row);
  if (!twin::is_shared(shared_row, 16)) twin::fail("ldmatrix: %p is outside of the block's shared memory", shared_row);
  LoadMatrix<kTransposed> mine{};
  std::memcpy(mine.row, shared_row, sizeof(mine.row));
  twin::exchange<LoadMatrix<kTransposed>>(kTransposed ? "ldmatrix.trans" : "ldmatrix", ~0u, mine, site);
  std::memcpy(r, mine.r, sizeof(mine.r));
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* shared_row, BITMASK_TWIN_SITE) { load_matrix<false>(r, shared_row, site); }
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* shared_row, BITMASK_TWIN_SITE) {
  load_matrix<true>(r, shared_row, site);
}

inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

inline float half_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;  // the exponent is 112 too low
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return __uint_as_float(sign | magnitude | 0x7f800000);  // infinity, NaN
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

// The matrices of mma.m16n8k16, as in the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". Products are exact;
// each sum of 16 of them and d is taken in double precision and rounded once, where a GPU sums in fp32 in an order of its own.
template <float (*kToFloat)(uint16_t)>
struct MultiplyMatrix {
  const uint32_t* a;
  const uint32_t* b;
  float* d;

  static void combine(MultiplyMatrix* const (&lanes)[twin::kLanes], uint32_t) {
    double a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      const int group = lane / 4, column = 2 * (lane % 4);
      for (int i = 0; i < 8; ++i) {  // element i of a: of pair i / 2
        a[group + 8 * (i / 2 % 2)][column + i % 2 + 8 * (i / 4)] = kToFloat(static_cast<uint16_t>(lanes[lane]->a[i / 2] >> (16 * (i % 2))));
      }
      for (int i = 0; i < 4; ++i) {
        b[column + i % 2 + 8 * (i / 2)][group] = kToFloat(static_cast<uint16_t>(lanes[lane]->b[i / 2] >> (16 * (i % 2))));
        d[group + 8 * (i / 2)][column + i % 2] = lanes[lane]->d[i];
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
      }
    }
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      const int group = lane / 4, column = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = static_cast<float>(d[group + 8 * (i / 2)][column + i % 2]);
    }
  }
};

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BITMASK_TWIN_SITE) {
  MultiplyMatrix<bfloat16_to_float> mine{a, b, d};
  twin::exchange<MultiplyMatrix<bfloat16_to_float>>("mma.bf16", ~0u, mine, site);
}

inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BITMASK_TWIN_SITE) {
  MultiplyMatrix<half_to_float> mine{a, b, d};
  twin::exchange<MultiplyMatrix<half_to_float>>("mma.f16", ~0u, mine, site);
}

// PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types": a is unpacked by its codes; then as above. Codes that mean
// nothing are an error, but for those of lanes that the selector passes over.
template <float (*kToFloat)(uint16_t)>
struct MultiplySparse {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
  uint32_t codes;
  int selector;

  static float element(uint32_t pair, int i) { return kToFloat(static_cast<uint16_t>(pair >> (16 * i))); }

  // Columns 4 group to 4 group + 3 of which row r has its stored columns 2 group and 2 group + 1.
  static uint32_t code_of(MultiplySparse* const (&lanes)[twin::kLanes], int r, int group) {
    const MultiplySparse& holder = *lanes[4 * (r % 8) + 2 * lanes[0]->selector + group / 4];
    const uint32_t code = holder.codes >> (16 * (r / 8) + 4 * (group % 4)) & 15;
    if ((code & 3) >= code >> 2) twin::fail("mma.sp: code %u of row %d, columns %d to %d", code, r, 4 * group, 4 * group + 3);
    return code;
  }

  static void combine(MultiplySparse* const (&lanes)[twin::kLanes], uint32_t) {
    double stored[16][16], b[32][8], d[16][8];
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      const int group = lane / 4, column = 2 * (lane % 4);
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          stored[group + 8 * (j % 2)][column + i + 8 * (j / 2)] = element(lanes[lane]->a[j], i);
          b[column + i + 8 * j][group] = element(lanes[lane]->b[j], i);
        }
        for (int j = 0; j < 2; ++j) d[group + 8 * j][column + i] = lanes[lane]->d[2 * j + i];
      }
    }
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t code = code_of(lanes, m, k / 2), column = k % 2 == 0 ? code & 3 : code >> 2;
        for (int n = 0; n < 8; ++n) d[m][n] += stored[m][k] * b[4 * static_cast<uint32_t>(k / 2) + column][n];
      }
    }
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      const int group = lane / 4, column = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = static_cast<float>(d[group + 8 * (i / 2)][column + i % 2]);
    }
  }
};

template <int kSelector>
void mma_sparse_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t codes, BITMASK_TWIN_SITE) {
  MultiplySparse<bfloat16_to_float> mine{a, b, d, codes, kSelector};
  twin::exchange<MultiplySparse<bfloat16_to_float>>(kSelector == 0 ? "mma.sp.bf16, 0" : "mma.sp.bf16, 1", ~0u, mine, site);
}

template <int kSelector>
void mma_sparse_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t codes, BITMASK_TWIN_SITE) {
  MultiplySparse<half_to_float> mine{a, b, d, codes, kSelector};
  twin::exchange<MultiplySparse<half_to_float>>(kSelector == 0 ? "mma.sp.f16, 0" : "mma.sp.f16, 1", ~0u, mine, site);
}

inline uint32_t round_to_tfloat32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k8", tf32. A GPU ignores the low 13 bits of what was not rounded: here that is an error.
struct MultiplyTfloat32 {
  const uint32_t* a;
  const uint32_t* b;
  float* d;

  static double element(uint32_t bits) {
    const float value = __uint_as_float(bits);
    if (value == value && (bits & 0x1fff) != 0) twin::fail("mma.tf32: %a has more bits than tf32", static_cast<double>(value));
    return value;
  }

  static void combine(MultiplyTfloat32* const (&lanes)[twin::kLanes], uint32_t) {
    double a[16][8], b[8][8];
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      const int group = lane / 4, column = lane % 4;
      for (int i = 0; i < 4; ++i) a[group + 8 * (i % 2)][column + 4 * (i / 2)] = element(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) b[column + 4 * i][group] = element(lanes[lane]->b[i]);
    }
    for (int lane = 0; lane < twin::kLanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        double sum = lanes[lane]->d[i];
        for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
        lanes[lane]->d[i] = static_cast<float>(sum);
      }
    }
  }
};

inline void mma_tfloat32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BITMASK_TWIN_SITE) {
  MultiplyTfloat32 mine{a, b, d};
  twin::exchange<MultiplyTfloat32>("mma.tf32", ~0u, mine, site);
}

template <int kOrder>
uint64_t load(const char* name, const uint64_t* address, twin::Site site) {
  twin::yield_waiting(name, site);
  const uint64_t value = __atomic_load_n(address, kOrder);
  twin::saw(address, value);
  return value;
}

inline uint64_t load_acquire(const uint64_t* address, BITMASK_TWIN_SITE) { return load<__ATOMIC_ACQUIRE>("load_acquire", address, site); }

inline void store_release(uint64_t* address, uint64_t value) {
  twin::yield();
  __atomic_store_n(address, value, __ATOMIC_RELEASE);
}

inline uint64_t load_relaxed(const uint64_t* address, BITMASK_TWIN_SITE) { return load<__ATOMIC_RELAXED>("load_relaxed", address, site); }

inline void store_relaxed(uint64_t* address, uint64_t value) {
  twin::yield();
  __atomic_store_n(address, value, __ATOMIC_RELAXED);
}

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15, byte = static_cast<uint32_t>(bytes >> (8 * (s & 7)) & 0xff);
    result |= (s < 8 ? byte : byte >> 7 != 0 ? 0xff : 0) << (8 * i);
  }
  return result;
}

template <typename T>
T opaque(T value) {
  return value;
}

inline void pause(BITMASK_TWIN_SITE) { twin::yield_waiting("pause", site); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // the NaN of the conversion
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {  // below 2^-14: steps of 2^-24, which are those of numbers about 0.5
    return static_cast<uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

}  // namespace bitmask::cuda::ptx
