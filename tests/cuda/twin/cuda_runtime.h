// The twin's part of the CUDA language: qualifiers, indices, intrinsics and the launch, for a C++ compiler (twin.h has the idea). What is
// not here does not compile, static shared memory in particular: kernels have ptx::dynamic_shared() only.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "twin.h"

#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

inline const uint3& threadIdx = bitmask::twin::thread_index;
inline const uint3& blockIdx = bitmask::twin::block_index;
inline const dim3& blockDim = bitmask::twin::block_size;
inline const dim3& gridDim = bitmask::twin::grid_size;
constexpr int warpSize = bitmask::twin::kLanes;

// ---------------------------------------------------------------------------------------------------------------- launching

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return [&](Parameters... converted) {
    return bitmask::twin::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(converted...); });
  }(std::forward<Arguments>(arguments)...);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads, std::size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

// ---------------------------------------------------------------------------------------------------------------- barriers

inline void __syncthreads(BITMASK_TWIN_SITE) { bitmask::twin::sync_block("__syncthreads", false, site); }
inline int __syncthreads_count(int vote, BITMASK_TWIN_SITE) {
  return bitmask::twin::sync_block("__syncthreads_count", vote != 0, site).yes;
}
inline int __syncthreads_or(int vote, BITMASK_TWIN_SITE) { return bitmask::twin::sync_block("__syncthreads_or", vote != 0, site).yes != 0; }
inline int __syncthreads_and(int vote, BITMASK_TWIN_SITE) {
  const bitmask::twin::Votes votes = bitmask::twin::sync_block("__syncthreads_and", vote != 0, site);
  return votes.yes == votes.all;
}

inline void __threadfence_block() { bitmask::twin::fence(); }
inline void __threadfence() { bitmask::twin::fence(); }
inline void __threadfence_system() { bitmask::twin::fence(); }

[[noreturn]] inline void __trap() { bitmask::twin::fail("__trap"); }
inline void __nanosleep(unsigned int, BITMASK_TWIN_SITE) { bitmask::twin::yield_waiting("__nanosleep", site); }

// ---------------------------------------------------------------------------------------------------------------- collectives of a warp

namespace bitmask::twin {

// Calls Combination::combine(operands, mask) with the operands of all lanes once these have come.
template <typename Combination, typename Operand>
void exchange(const char* name, uint32_t mask, Operand& operand, Site site) {
  collective(
      name, mask, &operand,
      [](void* const(&brought)[kLanes], uint32_t lanes) {
        Operand* operands[kLanes];
        for (int i = 0; i < kLanes; ++i) operands[i] = static_cast<Operand*>(brought[i]);
        Combination::combine(operands, lanes);
      },
      site);
}

// PTX ISA, "Data Movement and Conversion Instructions: shfl.sync".
enum class Shuffle { kIndex, kUp, kDown, kXor };

template <Shuffle kShuffle>
struct Shuffled {
  uint64_t value;
  unsigned int operand, width;
  uint64_t result;

  static void combine(Shuffled* const (&lanes)[kLanes], uint32_t mask) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      const int width = static_cast<int>(lanes[lane]->width), operand = static_cast<int>(lanes[lane]->operand & 31);
      const int first = lane & -width, last = first + width - 1;
      int source = lane;
      if (kShuffle == Shuffle::kIndex) source = first + (operand & (width - 1));
      if (kShuffle == Shuffle::kUp && lane - operand >= first) source = lane - operand;
      if (kShuffle == Shuffle::kDown && lane + operand <= last) source = lane + operand;
      if (kShuffle == Shuffle::kXor && (lane ^ operand) <= last) source = lane ^ operand;
      lanes[lane]->result = (mask >> source & 1) != 0 ? lanes[source]->value : 0x7fa57fa57fa57fa5;  // undefined
    }
  }
};

template <Shuffle kShuffle, typename T>
T shuffle(const char* name, uint32_t mask, T value, unsigned int operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) fail("calls %s with width %d", name, width);
  Shuffled<kShuffle> mine{0, operand, static_cast<unsigned int>(width), 0};
  std::memcpy(&mine.value, &value, sizeof(T));
  exchange<Shuffled<kShuffle>>(name, mask, mine, site);
  std::memcpy(&value, &mine.result, sizeof(T));
  return value;
}

struct Ballot {
  bool vote;
  uint32_t votes;

  static void combine(Ballot* const (&lanes)[kLanes], uint32_t mask) {
    uint32_t votes = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) != 0 && lanes[lane]->vote) votes |= 1u << lane;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) != 0) lanes[lane]->votes = votes;
    }
  }
};

inline uint32_t ballot(const char* name, uint32_t mask, bool vote, Site site) {
  Ballot mine{vote, 0};
  exchange<Ballot>(name, mask, mine, site);
  return mine.votes;
}

struct Match {
  uint64_t value;
  uint32_t same;

  static void combine(Match* const (&lanes)[kLanes], uint32_t mask) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      for (int other = 0; other < kLanes; ++other) {
        if ((mask >> other & 1) != 0 && lanes[other]->value == lanes[lane]->value) lanes[lane]->same |= 1u << other;
      }
    }
  }
};

template <typename T>
uint32_t match(const char* name, uint32_t mask, T value, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Match mine{0, 0};
  std::memcpy(&mine.value, &value, sizeof(T));
  exchange<Match>(name, mask, mine, site);
  return mine.same;
}

// Operation::apply(a, b) over all lanes.
template <typename Operation, typename T>
struct Reduction {
  T value;

  static void combine(Reduction* const (&lanes)[kLanes], uint32_t mask) {
    T result = lanes[__builtin_ctz(mask)]->value;
    for (uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1) {
      result = Operation::apply(result, lanes[__builtin_ctz(rest)]->value);
    }
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) lanes[__builtin_ctz(rest)]->value = result;
  }
};

template <typename Operation, typename T>
T reduce(const char* name, uint32_t mask, T value, Site site) {
  Reduction<Operation, T> mine{value};
  exchange<Reduction<Operation, T>>(name, mask, mine, site);
  return mine.value;
}

}  // namespace bitmask::twin

inline void __syncwarp(unsigned int mask = 0xffffffff, BITMASK_TWIN_SITE) { bitmask::twin::sync_warp(mask, site); }

#define BITMASK_TWIN_SHUFFLES(T)                                                                                                        \
  inline T __shfl_sync(unsigned int mask, T value, int source, int width = warpSize, BITMASK_TWIN_SITE) {                               \
    return bitmask::twin::shuffle<bitmask::twin::Shuffle::kIndex>("__shfl_sync", mask, value, static_cast<unsigned int>(source), width, \
                                                                  site);                                                                \
  }                                                                                                                                     \
  inline T __shfl_up_sync(unsigned int mask, T value, unsigned int distance, int width = warpSize, BITMASK_TWIN_SITE) {                 \
    return bitmask::twin::shuffle<bitmask::twin::Shuffle::kUp>("__shfl_up_sync", mask, value, distance, width, site);                   \
  }                                                                                                                                     \
  inline T __shfl_down_sync(unsigned int mask, T value, unsigned int distance, int width = warpSize, BITMASK_TWIN_SITE) {               \
    return bitmask::twin::shuffle<bitmask::twin::Shuffle::kDown>("__shfl_down_sync", mask, value, distance, width, site);               \
  }                                                                                                                                     \
  inline T __shfl_xor_sync(unsigned int mask, T value, int bits, int width = warpSize, BITMASK_TWIN_SITE) {                             \
    return bitmask::twin::shuffle<bitmask::twin::Shuffle::kXor>("__shfl_xor_sync", mask, value, static_cast<unsigned int>(bits), width, \
                                                                site);                                                                  \
  }
BITMASK_TWIN_SHUFFLES(int)
BITMASK_TWIN_SHUFFLES(unsigned int)
BITMASK_TWIN_SHUFFLES(long)
BITMASK_TWIN_SHUFFLES(unsigned long)
BITMASK_TWIN_SHUFFLES(long long)
BITMASK_TWIN_SHUFFLES(unsigned long long)
BITMASK_TWIN_SHUFFLES(float)
BITMASK_TWIN_SHUFFLES(double)
#undef BITMASK_TWIN_SHUFFLES

inline unsigned int __ballot_sync(unsigned int mask, int vote, BITMASK_TWIN_SITE) {
  return bitmask::twin::ballot("__ballot_sync", mask, vote != 0, site);
}
inline int __any_sync(unsigned int mask, int vote, BITMASK_TWIN_SITE) {
  return bitmask::twin::ballot("__any_sync", mask, vote != 0, site) != 0;
}
inline int __all_sync(unsigned int mask, int vote, BITMASK_TWIN_SITE) {
  return bitmask::twin::ballot("__all_sync", mask, vote != 0, site) == mask;
}
// Lanes that run together are whatever the GPU likes; a lane may be alone.
inline unsigned int __activemask() { return 1u << bitmask::twin::lane(); }

#define BITMASK_TWIN_MATCH(T)                                                                     \
  inline unsigned int __match_any_sync(unsigned int mask, T value, BITMASK_TWIN_SITE) {           \
    return bitmask::twin::match("__match_any_sync", mask, value, site);                           \
  }                                                                                               \
  inline unsigned int __match_all_sync(unsigned int mask, T value, int* all, BITMASK_TWIN_SITE) { \
    *all = bitmask::twin::match("__match_all_sync", mask, value, site) == mask;                   \
    return *all != 0 ? mask : 0;                                                                  \
  }
BITMASK_TWIN_MATCH(int)
BITMASK_TWIN_MATCH(unsigned int)
BITMASK_TWIN_MATCH(long)
BITMASK_TWIN_MATCH(unsigned long)
BITMASK_TWIN_MATCH(long long)
BITMASK_TWIN_MATCH(unsigned long long)
BITMASK_TWIN_MATCH(float)
BITMASK_TWIN_MATCH(double)
#undef BITMASK_TWIN_MATCH

#define BITMASK_TWIN_OPERATION(Name, expression) \
  struct Name {                                  \
    template <typename T>                        \
    static T apply(T a, T b) {                   \
      return static_cast<T>(expression);         \
    }                                            \
  };
namespace bitmask::twin {
// What sums are computed in: integers wrap around.
template <typename T>
struct Wrapping {
  using Type = T;
};
template <>
struct Wrapping<int> {
  using Type = unsigned int;
};
template <typename T>
using Wrapped = typename Wrapping<T>::Type;

BITMASK_TWIN_OPERATION(Add, static_cast<Wrapped<T>>(a) + static_cast<Wrapped<T>>(b))
BITMASK_TWIN_OPERATION(Sub, static_cast<Wrapped<T>>(a) - static_cast<Wrapped<T>>(b))
BITMASK_TWIN_OPERATION(Min, b < a ? b : a)
BITMASK_TWIN_OPERATION(Max, a < b ? b : a)
BITMASK_TWIN_OPERATION(And, (a & b))
BITMASK_TWIN_OPERATION(Or, a | b)
BITMASK_TWIN_OPERATION(Xor, a ^ b)
BITMASK_TWIN_OPERATION(Exchange, (static_cast<void>(a), b))
BITMASK_TWIN_OPERATION(Increment, a >= b ? 0 : a + 1)
BITMASK_TWIN_OPERATION(Decrement, a == 0 || a > b ? b : a - 1)
}  // namespace bitmask::twin
#undef BITMASK_TWIN_OPERATION

#define BITMASK_TWIN_REDUCE(T, name, Operation)                                       \
  inline T name(unsigned int mask, T value, BITMASK_TWIN_SITE) {                      \
    return bitmask::twin::reduce<bitmask::twin::Operation>(#name, mask, value, site); \
  }
BITMASK_TWIN_REDUCE(unsigned int, __reduce_add_sync, Add)
BITMASK_TWIN_REDUCE(int, __reduce_add_sync, Add)
BITMASK_TWIN_REDUCE(unsigned int, __reduce_min_sync, Min)
BITMASK_TWIN_REDUCE(int, __reduce_min_sync, Min)
BITMASK_TWIN_REDUCE(unsigned int, __reduce_max_sync, Max)
BITMASK_TWIN_REDUCE(int, __reduce_max_sync, Max)
BITMASK_TWIN_REDUCE(unsigned int, __reduce_and_sync, And)
BITMASK_TWIN_REDUCE(unsigned int, __reduce_or_sync, Or)
BITMASK_TWIN_REDUCE(unsigned int, __reduce_xor_sync, Xor)
#undef BITMASK_TWIN_REDUCE

// ---------------------------------------------------------------------------------------------------------------- atomics

namespace bitmask::twin {

// Stores update(old) for the old value, and returns this. Nobody runs between load and store; they are atomic and relaxed
// for ThreadSanitizer to take them for what they are.
template <typename T, typename Update>
T atomic(const char* name, T* address, const Update& update, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("calls %s at %s:%d, not aligned", name, site.file, site.line);
  yield_waiting(name, site);
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  T updated = update(old);
  __atomic_store(address, &updated, __ATOMIC_RELAXED);
  uint64_t bits = 0;
  std::memcpy(&bits, &old, sizeof(T));
  saw(address, bits);
  return old;
}

}  // namespace bitmask::twin

#define BITMASK_TWIN_ATOMIC(T, name, Operation)                                               \
  inline T name(T* address, T operand, BITMASK_TWIN_SITE) {                                   \
    const auto update = [=](T old) { return bitmask::twin::Operation::apply(old, operand); }; \
    return bitmask::twin::atomic(#name, address, update, site);                               \
  }
#define BITMASK_TWIN_ATOMICS(T)          \
  BITMASK_TWIN_ATOMIC(T, atomicMin, Min) \
  BITMASK_TWIN_ATOMIC(T, atomicMax, Max) \
  BITMASK_TWIN_ATOMIC(T, atomicAnd, And) \
  BITMASK_TWIN_ATOMIC(T, atomicOr, Or)   \
  BITMASK_TWIN_ATOMIC(T, atomicXor, Xor)
BITMASK_TWIN_ATOMICS(int)
BITMASK_TWIN_ATOMICS(unsigned int)
BITMASK_TWIN_ATOMICS(long long)
BITMASK_TWIN_ATOMICS(unsigned long long)
BITMASK_TWIN_ATOMIC(int, atomicAdd, Add)
BITMASK_TWIN_ATOMIC(unsigned int, atomicAdd, Add)
BITMASK_TWIN_ATOMIC(unsigned long long, atomicAdd, Add)
BITMASK_TWIN_ATOMIC(float, atomicAdd, Add)
BITMASK_TWIN_ATOMIC(double, atomicAdd, Add)
BITMASK_TWIN_ATOMIC(int, atomicSub, Sub)
BITMASK_TWIN_ATOMIC(unsigned int, atomicSub, Sub)
BITMASK_TWIN_ATOMIC(int, atomicExch, Exchange)
BITMASK_TWIN_ATOMIC(unsigned int, atomicExch, Exchange)
BITMASK_TWIN_ATOMIC(unsigned long long, atomicExch, Exchange)
BITMASK_TWIN_ATOMIC(float, atomicExch, Exchange)
BITMASK_TWIN_ATOMIC(unsigned int, atomicInc, Increment)
BITMASK_TWIN_ATOMIC(unsigned int, atomicDec, Decrement)
#undef BITMASK_TWIN_ATOMICS
#undef BITMASK_TWIN_ATOMIC

#define BITMASK_TWIN_CAS(T)                                                     \
  inline T atomicCAS(T* address, T expected, T desired, BITMASK_TWIN_SITE) {    \
    const auto update = [=](T old) { return old == expected ? desired : old; }; \
    return bitmask::twin::atomic("atomicCAS", address, update, site);           \
  }
BITMASK_TWIN_CAS(int)
BITMASK_TWIN_CAS(unsigned int)
BITMASK_TWIN_CAS(unsigned long long)
#undef BITMASK_TWIN_CAS

// ---------------------------------------------------------------------------------------------------------------- memory

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldca(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldlu(const T* address) {
  return *address;
}
template <typename T>
T __ldcv(const T* address) {
  return *address;
}
template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}
template <typename T>
void __stwt(T* address, T value) {
  *address = value;
}

// ---------------------------------------------------------------------------------------------------------------- integers

inline int __popc(unsigned int value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(value)); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value)); }

inline unsigned int __brev(unsigned int value) {
  unsigned int reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (value >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long value) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned int>(value))) << 32 | __brev(static_cast<unsigned int>(value >> 32));
}

// Byte i of the result is byte s % 8 of (y, x), s being nibble i of the selector; unlike in prmt, bit 3 of s is ignored.
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned int>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

namespace bitmask::twin {
inline uint64_t join(unsigned int low, unsigned int high) { return static_cast<uint64_t>(high) << 32 | low; }
inline unsigned int clamp_shift(unsigned int shift) { return shift < 32 ? shift : 32; }
}  // namespace bitmask::twin

inline unsigned int __funnelshift_l(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>(bitmask::twin::join(low, high) << (shift & 31) >> 32);
}
inline unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>(bitmask::twin::join(low, high) >> (shift & 31));
}
inline unsigned int __funnelshift_lc(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>(bitmask::twin::join(low, high) << bitmask::twin::clamp_shift(shift) >> 32);
}
inline unsigned int __funnelshift_rc(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>(bitmask::twin::join(low, high) >> bitmask::twin::clamp_shift(shift));
}

inline unsigned int __umulhi(unsigned int a, unsigned int b) { return static_cast<unsigned int>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ typedef unsigned __int128 Wide;
  return static_cast<unsigned long long>(static_cast<Wide>(a) * b >> 64);
}

// The overloads that CUDA has, and no others: a call that is ambiguous there is ambiguous here.
#define BITMASK_TWIN_MIN_MAX(A, B, T)                                                                              \
  inline T min(A a, B b) { return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a); } \
  inline T max(A a, B b) { return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a); }
BITMASK_TWIN_MIN_MAX(int, int, int)
BITMASK_TWIN_MIN_MAX(unsigned int, unsigned int, unsigned int)
BITMASK_TWIN_MIN_MAX(int, unsigned int, unsigned int)
BITMASK_TWIN_MIN_MAX(unsigned int, int, unsigned int)
BITMASK_TWIN_MIN_MAX(long, long, long)
BITMASK_TWIN_MIN_MAX(unsigned long, unsigned long, unsigned long)
BITMASK_TWIN_MIN_MAX(long, unsigned long, unsigned long)
BITMASK_TWIN_MIN_MAX(unsigned long, long, unsigned long)
BITMASK_TWIN_MIN_MAX(long long, long long, long long)
BITMASK_TWIN_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
BITMASK_TWIN_MIN_MAX(long long, unsigned long long, unsigned long long)
BITMASK_TWIN_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef BITMASK_TWIN_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---------------------------------------------------------------------------------------------------------------- floating point

namespace bitmask::twin {
template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace bitmask::twin

inline float __uint_as_float(unsigned int bits) { return bitmask::twin::bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bitmask::twin::bits_as<float>(bits); }
inline unsigned int __float_as_uint(float value) { return bitmask::twin::bits_as<unsigned int>(value); }
inline int __float_as_int(float value) { return bitmask::twin::bits_as<int>(value); }
inline double __longlong_as_double(long long bits) { return bitmask::twin::bits_as<double>(bits); }
inline long long __double_as_longlong(double value) { return bitmask::twin::bits_as<long long>(value); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
