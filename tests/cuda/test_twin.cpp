// The twin's own test: what each primitive does, and what must be reported.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "../native/formats.h"
#include "twin_calls.h"

namespace bitmask::testing {
namespace {

namespace ptx = cuda::ptx;

// ---------------------------------------------------------------------------------------------------------------- launching

__global__ void note_indices(int* calls) {
  const unsigned int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  ++calls[block * (blockDim.x * blockDim.y * blockDim.z) + thread];
}

TEST_FAMILY(twin_launch) {
  for_each_seed(10, [] {
    const dim3 grid(5, 3, 2), block(7, 3, 4);
    std::vector<int> calls(5 * 3 * 2 * 7 * 3 * 4);
    check(launch(grid, block, 0, note_indices, calls.data()) == cudaSuccess, "launch");
    for (int count : calls) check(count == 1, "a thread ran %d times", count);
  });

  const std::function<void(int)> nothing = [](int) {};
  struct {
    dim3 grid, block;
    std::size_t shared_bytes;
    cudaError_t error;
  } const cases[] = {
      {1, 1024, 48 * 1024, cudaSuccess},
      {0, 32, 0, cudaErrorInvalidConfiguration},
      {{1, 0}, 32, 0, cudaErrorInvalidConfiguration},
      {1, 0, 0, cudaErrorInvalidConfiguration},
      {1, 1025, 0, cudaErrorInvalidConfiguration},
      {1, {33, 32}, 0, cudaErrorInvalidConfiguration},
      {1, {1, 1, 65}, 0, cudaErrorInvalidConfiguration},
      {0x80000000, 32, 0, cudaErrorInvalidConfiguration},
      {{1, 65536}, 32, 0, cudaErrorInvalidConfiguration},
      {{1, 1, 65536}, 32, 0, cudaErrorInvalidConfiguration},
      {1, 32, 48 * 1024 + 1, cudaErrorInvalidValue},
  };
  for (const auto& c : cases) {
    const cudaError_t error = launch(c.grid, c.block, c.shared_bytes, call, &nothing);
    check(error == c.error, "%s, not %s", cudaGetErrorName(error), cudaGetErrorName(c.error));
    check(cudaPeekAtLastError() == c.error && cudaGetLastError() == c.error, "the last error");
    check(cudaGetLastError() == cudaSuccess, "the last error is kept");
  }
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(call, attribute, 227 * 1024 + 1) == cudaErrorInvalidValue, "more shared memory than there is");
  check(cudaFuncSetAttribute(call, attribute, 100 * 1024) == cudaSuccess, "more shared memory");
  check(launch(1, 32, 100 * 1024, call, &nothing) == cudaSuccess, "launch with more shared memory");
  check(launch(1, 32, 100 * 1024 + 1, call, &nothing) == cudaErrorInvalidValue, "launch with more than asked for");
  twin::properties.shared_bytes = 99 * 1024;
  check(cudaFuncSetAttribute(call, attribute, 100 * 1024) == cudaErrorInvalidValue, "more shared memory than a smaller device has");
  twin::properties = {};
  check(cudaFuncSetAttribute(call, attribute, 48 * 1024) == cudaSuccess, "the usual shared memory again");
  cudaGetLastError();

  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, call, 256, 50 * 1024) == cudaSuccess && blocks == 4, "occupancy: %d",
        blocks);
}

// ---------------------------------------------------------------------------------------------------------------- collectives of a warp

// shfl.sync in the words of the PTX ISA, operand c built as CUDA does.
int shuffle_source(const std::string& mode, int lane, int operand, int width) {
  const int segment_mask = 32 - width, clamp = mode == "up" ? 0 : 31;
  const int last = (lane & segment_mask) | (clamp & ~segment_mask), first = lane & segment_mask;
  int source = 0;
  bool inside = false;
  if (mode == "up") source = lane - operand, inside = source >= last;
  if (mode == "down") source = lane + operand, inside = source <= last;
  if (mode == "xor") source = lane ^ operand, inside = source <= last;
  if (mode == "index") source = first | (operand & ~segment_mask), inside = source <= last;
  return inside ? source : lane;
}

template <typename T>
void test_shuffles() {
  const auto value_of = [](int lane) { return static_cast<T>(lane * 1000003) / 7; };
  for (int width = 1; width <= 32; width *= 2) {
    for (int operand = 0; operand < 32; operand += operand % 4 + 1) {
      run_warp([&](int lane) {
        const unsigned int distance = static_cast<unsigned int>(operand);
        const T value = value_of(lane);
        expect(__shfl_sync(kAll, value, operand, width) == value_of(shuffle_source("index", lane, operand, width)), "__shfl_sync");
        expect(__shfl_up_sync(kAll, value, distance, width) == value_of(shuffle_source("up", lane, operand, width)), "__shfl_up_sync");
        expect(__shfl_down_sync(kAll, value, distance, width) == value_of(shuffle_source("down", lane, operand, width)),
               "__shfl_down_sync");
        expect(__shfl_xor_sync(kAll, value, operand, width) == value_of(shuffle_source("xor", lane, operand, width)), "__shfl_xor_sync");
        expect(__shfl_sync(kAll, value, lane / 2) == value_of(lane / 2), "__shfl_sync, a source for each lane");
      });
    }
  }
}

// Lanes of `mask` that have something in common with `lane`.
template <typename Same>
uint32_t lanes_where(uint32_t mask, const Same& same) {
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<uint32_t>((mask >> lane & 1) != 0 && same(lane)) << lane;
  return lanes;
}

void test_votes(uint32_t mask, uint32_t votes) {
  run_warp([&](int lane) {
    if ((mask >> lane & 1) == 0) return;
    const int vote = (votes >> lane & 1) != 0 ? lane + 1 : 0;
    expect(__ballot_sync(mask, vote) == (mask & votes), "__ballot_sync");
    expect(__any_sync(mask, vote) == ((mask & votes) != 0), "__any_sync");
    expect(__all_sync(mask, vote) == ((mask & votes) == mask), "__all_sync");
    expect((__activemask() >> lane & 1) != 0, "__activemask");

    const auto value_of = [&](int l) { return static_cast<unsigned int>((votes >> (l / 4)) % 5) - 2; };
    const unsigned int value = value_of(lane);
    const uint32_t same = lanes_where(mask, [&](int l) { return value_of(l) == value; });
    expect(__match_any_sync(mask, value) == same, "__match_any_sync");
    expect(__match_any_sync(mask, static_cast<unsigned long long>(value) << 32) == same, "__match_any_sync of 64 bits");
    int all = 0;
    const unsigned int matched = __match_all_sync(mask, value, &all);
    expect((all != 0) == (same == mask) && matched == (same == mask ? mask : 0), "__match_all_sync");

    unsigned int sum = 0, least = kAll, most = 0, conjunction = kAll, disjunction = 0, parity = 0;
    int signed_least = INT32_MAX, signed_most = INT32_MIN;
    for (int l = 0; l < 32; ++l) {
      if ((mask >> l & 1) == 0) continue;
      const unsigned int other = value_of(l);
      sum += other, parity ^= other, conjunction &= other, disjunction |= other;
      least = std::min(least, other), most = std::max(most, other);
      signed_least = std::min(signed_least, static_cast<int>(other)), signed_most = std::max(signed_most, static_cast<int>(other));
    }
    expect(__reduce_add_sync(mask, value) == sum, "__reduce_add_sync");
    expect(__reduce_min_sync(mask, value) == least && __reduce_max_sync(mask, value) == most, "__reduce_min_sync, __reduce_max_sync");
    expect(__reduce_min_sync(mask, static_cast<int>(value)) == signed_least, "__reduce_min_sync of int");
    expect(__reduce_max_sync(mask, static_cast<int>(value)) == signed_most, "__reduce_max_sync of int");
    expect(__reduce_and_sync(mask, value) == conjunction && __reduce_or_sync(mask, value) == disjunction,
           "__reduce_and_sync, __reduce_or_sync");
    expect(__reduce_xor_sync(mask, value) == parity, "__reduce_xor_sync");
  });
}

TEST_FAMILY(twin_warp) {
  test_shuffles<int>();
  test_shuffles<unsigned int>();
  test_shuffles<long>();
  test_shuffles<unsigned long long>();
  test_shuffles<float>();
  test_shuffles<double>();
  for_each_seed(40, [] {
    const uint32_t mask = random_below(3) == 0 ? kAll : static_cast<uint32_t>(random_word()) | 1u << random_below(32);
    test_votes(mask, random_below(4) == 0 ? kAll : static_cast<uint32_t>(random_word()));
  });
  // Lanes may gather in parts first, whose masks share their lowest lane with that of all.
  for_each_seed(20, [] {
    run_warp([](int lane) {
      if (lane < 2) {
        expect(__ballot_sync(3, lane == 1) == 2, "two lanes");
      } else if (lane >= 16) {
        expect(__ballot_sync(0xffff0000, 1) == 0xffff0000, "half of the lanes");
      }
      expect(__ballot_sync(kAll, lane < 5) == 31, "all lanes");
    });
  });
}

// ---------------------------------------------------------------------------------------------------------------- barriers

TEST_FAMILY(twin_barrier) {
  for_each_seed(20, [] {
    run_block(100, [](int thread) {
      if (thread >= 90) return;  // who has ended is not waited for
      expect(__syncthreads_count(thread % 3 == 0 ? 5 : 0) == 30, "__syncthreads_count");
      expect(__syncthreads_or(thread == 77) == 1 && __syncthreads_or(0) == 0, "__syncthreads_or");
      expect(__syncthreads_and(1) == 1 && __syncthreads_and(thread != 77) == 0, "__syncthreads_and");
      if (thread == 3) return;
      expect(__syncthreads_count(1) == 89, "__syncthreads_count with one thread less");
    });
    // Shared memory makes no sense until written; a barrier lets others see it.
    run_block(
        256,
        [](int thread) {
          uint16_t* shared = ptx::dynamic_shared<uint16_t>();
          expect(shared[thread] == 0xffff || shared[thread] == 0x7f7f, "how shared memory begins", shared[thread]);
          for (int round = 0; round < 5; ++round) {
            shared[thread] = static_cast<uint16_t>(thread + round);
            __syncthreads();
            expect(shared[255 - thread] == 255 - thread + round, "shared memory after a barrier");
            __syncthreads();
          }
        },
        512);
  });
}

// ---------------------------------------------------------------------------------------------------------------- integers, formats

TEST_FAMILY(twin_integers) {
  check(__popc(0xf0f00001) == 9 && __popcll(~0ull) == 64, "__popc");
  check(__ffs(0) == 0 && __ffs(8) == 4 && __ffs(INT32_MIN) == 32 && __ffsll(1ll << 40) == 41, "__ffs");
  check(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(0) == 64 && __clzll(1) == 63, "__clz");
  check(__brev(1) == 0x80000000 && __brev(0x12345678) == 0x1e6a2c48 && __brevll(1) == 1ull << 63, "__brev");
  check(__byte_perm(0x33221100, 0x77665544, 0x7250) == 0x77225500, "__byte_perm");
  check(__byte_perm(0x33221100, 0x77665544, 0xfad8) == 0x77225500, "__byte_perm ignores bit 3");
  check(ptx::permute(0x33221100, 0x77665544, 0x7250) == 0x77225500, "permute");
  check(ptx::permute(0x80ff017f, 0x00008000, 0xdc98) == 0xff000000, "permute: signs of either word");
  check(ptx::permute(0x80ff017f, 0, 0xba98) == 0xffff0000, "permute: signs of the lower word");
  check(__funnelshift_l(0x80000001, 0x0000000f, 4) == 0xf8, "__funnelshift_l");
  check(__funnelshift_l(1, 2, 32) == 2 && __funnelshift_lc(1, 2, 32) == 1 && __funnelshift_lc(1, 2, 99) == 1, "__funnelshift_l past 31");
  check(__funnelshift_r(0x80000001, 0x0000000f, 4) == 0xf8000000, "__funnelshift_r");
  check(__funnelshift_r(1, 2, 32) == 1 && __funnelshift_rc(1, 2, 32) == 2 && __funnelshift_rc(1, 2, 99) == 2, "__funnelshift_r past 31");
  check(__umulhi(kAll, kAll) == 0xfffffffe && __mulhi(-1, 5) == -1 && __umul64hi(~0ull, 4) == 3, "__mulhi");
  check(min(3, 5u) == 3 && max(-1, 1) == 1 && min(-1ll, 1ll) == -1 && max(2.0f, 3.0f) == 3, "min, max");
  check(__uint_as_float(0x3f800000) == 1 && __float_as_uint(-2) == 0xc0000000 && __float_as_int(1) == 0x3f800000, "__uint_as_float");
  static_assert(alignof(uint4) == 16 && alignof(float2) == 8 && alignof(ushort4) == 8 && alignof(uchar4) == 4 && sizeof(uint3) == 12);
}

TEST_FAMILY(twin_formats) {
  const Format& single = kFormats[0];
  const Format& bfloat16 = kFormats[1];
  const Format& half = kFormats[2];
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t h = static_cast<uint16_t>(bits);
    const double expected = half.decode(bits);
    const float value = ptx::half_to_float(h);
    check(std::isnan(expected) ? std::isnan(value) : single.encode(expected) == __float_as_uint(value), "half %x", bits);
    const float exact = ptx::bfloat16_to_float(h);
    check(std::isnan(exact) ? std::isnan(bfloat16.decode(bits)) : bfloat16.decode(bits) == exact, "bfloat16 %x", bits);
    for (int kind = 0; kind < 4; ++kind) {  // on, beside and halfway between numbers of either format
      const uint32_t beside = kind == 0 ? 0 : kind == 1 ? 0x8000 : kind == 2 ? 0x7fff : static_cast<uint32_t>(random_below(0x10000));
      const float b = __uint_as_float(bits << 16 | beside);
      const float f = std::isnan(value) ? value : __uint_as_float(__float_as_uint(value) + (beside >> 3));
      for (float x : {b, f}) {
        if (std::isnan(x)) {
          check(ptx::float_to_bfloat16(x) == 0x7fff && ptx::float_to_half(x) == 0x7fff, "NaN");
        } else {
          check(ptx::float_to_bfloat16(x) == bfloat16.encode(x), "bfloat16 of %a", x);
          check(ptx::float_to_half(x) == half.encode(x), "half of %a: %x, not %x", x, ptx::float_to_half(x),
                static_cast<unsigned int>(half.encode(x)));
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- asynchronous copies

TEST_FAMILY(twin_copy) {
  alignas(16) uint8_t source[4 * 16];
  for (int i = 0; i < 64; ++i) source[i] = static_cast<uint8_t>(i + 1);
  int early = 0, late = 0;
  for_each_seed(40, [&] {
    run_block(
        1,
        [&](int) {
          uint8_t* shared = ptx::dynamic_shared<uint8_t>();
          const auto there = [&](int copy) { return shared[16 * copy] == source[16 * copy]; };
          for (int i = 0; i < 64; ++i) shared[i] = 0;
          ptx::copy_async_16(shared, source, 5);
          ptx::copy_async_commit();
          ptx::copy_async_16(shared + 16, source + 16);
          ptx::copy_async_16(shared + 32, source + 32, 0);
          ptx::copy_async_commit();
          ptx::copy_async_16(shared + 48, source + 48);
          expect(!there(3) && shared[48] != 0, "a copy not committed is done, or its target is as before");
          (there(0) ? early : late) += 1;
          ptx::copy_async_wait<1>();
          expect(std::memcmp(shared, "\1\2\3\4\5\0\0\0\0\0\0\0\0\0\0", 16) == 0, "a copy of 5 bytes");
          (there(1) ? early : late) += 1;
          ptx::copy_async_wait<0>();
          expect(std::memcmp(shared + 16, source + 16, 16) == 0, "a copy of 16 bytes");
          for (int i = 32; i < 48; ++i) expect(shared[i] == 0, "a copy of no byte");
          expect(!there(3), "a copy not committed is done by a wait");
          ptx::copy_async_commit();
          ptx::copy_async_wait<0>();
          expect(there(3), "the last copy");
        },
        64);
  });
  check(early >= 5 && late >= 5, "copies are done early %d times, late %d times", early, late);
}

// ---------------------------------------------------------------------------------------------------------------- atomics

__global__ void count_all(unsigned int* u, unsigned long long* l, float* f) {
  atomicAdd(&u[0], 1u);
  atomicMin(&u[1], 1000 - (blockIdx.x * blockDim.x + threadIdx.x));
  atomicMax(&u[2], blockIdx.x * blockDim.x + threadIdx.x);
  atomicOr(&u[3], 1u << (threadIdx.x % 32));
  atomicAnd(&u[4], ~(1u << (blockIdx.x % 32)));
  atomicXor(&u[5], 1u << (threadIdx.x % 32));
  atomicInc(&u[6], 9u);
  for (unsigned int old = 0, seen; (seen = atomicCAS(&u[7], old, old + 2)) != old;) old = seen;
  atomicAdd(l, 1ull << 33);
  atomicAdd(f, 0.5f);
  if (blockIdx.x == 0 && threadIdx.x == 0) atomicExch(&u[8], 7u);
}

TEST_FAMILY(twin_atomics) {
  for_each_seed(20, [] {
    unsigned int u[9] = {0, 5000, 0, 0, kAll, 0, 0, 0, 0};
    unsigned long long l = 0;
    float f = 0;
    check(launch(10, 64, 0, count_all, &u[0], &l, &f) == cudaSuccess, "launch");
    check(u[0] == 640 && u[1] == 361 && u[2] == 639 && u[3] == kAll && u[4] == 0xfffffc00 && u[5] == 0, "sums, extremes, bits");
    check(u[6] == 0 && u[7] == 1280 && u[8] == 7 && l == 640ull << 33 && f == 320, "counters: %u %u %u %llu %g", u[6], u[7], u[8], l, f);
  });
}

// ---------------------------------------------------------------------------------------------------------------- what must be reported

TEST_FAMILY(twin_reports) {
  check_dies("wait for it in __syncwarp with mask ffffffff", [] { run_warp([](int lane) { lane == 5 ? void() : __syncwarp(); }); });
  check_dies("lanes 00000020 have ended or never were", [] {
    run_warp([](int lane) {
      if (lane == 5) return;
      for (int i = 0; i < 100; ++i) __nanosleep(1);
      __syncwarp();
    });
  });
  check_dies("lanes ffff0000 have ended or never were", [] { run_block(16, [](int) { __syncwarp(); }); });
  check_dies("which it is not in", [] { run_warp([](int) { __syncwarp(0xfffffffe); }); });
  check_dies("in __any_sync with mask ffffffff at", [] {
    run_warp([](int lane) {
      if (lane == 31) {
        for (int i = 0; i < 100; ++i) __nanosleep(1);
        __ballot_sync(kAll, 1);
      } else {
        __any_sync(kAll, 1);
      }
    });
  });
  check_dies("wait for it in __syncwarp", [] {  // the same call in two places
    run_warp([](int lane) {
      if (lane % 2 == 0) {
        __syncwarp();
      } else {
        __syncwarp();
      }
    });
  });
  check_dies("deadlock", [] { run_warp([](int lane) { lane == 7 ? __syncthreads() : __syncwarp(); }); });
  check_dies("other threads of the block wait in __syncthreads", [] {
    run_block(64, [](int thread) {
      if (thread < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    });
  });
  check_dies("endless wait", [] {
    uint64_t never = 0;
    run_warp([&](int) {
      while (ptx::load_acquire(&never) == 0) ptx::pause();
    });
  });
  check_dies("and were last in atomicExch", [] {
    unsigned int lock = 1;
    run_warp([&](int) {
      while (atomicExch(&lock, 1u) != 0) continue;
    });
  });
  check_dies("__trap", [] { run_warp([](int) { __trap(); }); });
  check_dies("with width 12", [] { run_warp([](int lane) { __shfl_sync(kAll, lane, 0, 12); }); });
  check_dies("launches a kernel", [] { run_warp([](int) { run_warp([](int) {}); }); });
  check_dies("calls atomicAdd at tests/cuda/test_twin.cpp", [] {
    alignas(4) char bytes[8] = {};
    run_warp([&](int) { atomicAdd(reinterpret_cast<unsigned int*>(bytes + 1), 1u); });
  });

  const auto in_shared = [](auto body) { run_warp([&](int) { body(ptx::dynamic_shared<uint8_t>()); }, 64); };
  alignas(16) static const uint8_t source[32] = {};
  check_dies("cp.async: target", [&] { in_shared([](uint8_t* shared) { ptx::copy_async_16(shared + 8, source); }); });
  check_dies("cp.async: source", [&] { in_shared([](uint8_t* shared) { ptx::copy_async_16(shared, source + 8); }); });
  check_dies("outside of the block's shared memory", [&] { in_shared([](uint8_t* shared) { ptx::copy_async_16(shared + 64, source); }); });
  check_dies("cp.async: reads 17 bytes", [&] { in_shared([](uint8_t* shared) { ptx::copy_async_16(shared, source, 17); }); });
  check_dies("cp.async: reads -1 bytes", [&] { in_shared([](uint8_t* shared) { ptx::copy_async_16(shared, source, -1); }); });
  uint32_t r[4];
  check_dies("ldmatrix", [&] { in_shared([&](uint8_t* shared) { ptx::load_matrix_x4(r, shared + 8); }); });
  check_dies("ldmatrix", [&] { in_shared([&](uint8_t* shared) { ptx::load_matrix_x4(r, shared + 64); }); });
}

// ---------------------------------------------------------------------------------------------------------------- planted errors

PLANTED_ERROR(twin_reads_past_shared, "AddressSanitizer: heap-buffer-overflow") {
  run_warp([](int lane) { expect(ptx::dynamic_shared<uint8_t>()[lane + 1] != 0, "read"); }, 32);
}

PLANTED_ERROR(twin_reads_past_global, "AddressSanitizer: heap-buffer-overflow") {
  Buffer values(32 * 4 - 1);
  run_warp([&](int lane) { expect(__ldg(reinterpret_cast<const int*>(values.data()) + lane) != 0, "read"); });
}

PLANTED_ERROR(twin_copies_past_global, "AddressSanitizer: heap-buffer-overflow") {
  Buffer values(15);
  run_warp([&](int) { ptx::copy_async_16(ptx::dynamic_shared<uint8_t>(), values.data()); }, 16);
}

PLANTED_ERROR(twin_stack_overflow, "AddressSanitizer: stack-overflow") {
  run_warp([](int) {
    std::function<int(int)> recurse = [&](int depth) { return depth + recurse(depth + 1); };
    recurse(0);
  });
}

PLANTED_ERROR(twin_misaligned_vector, "runtime error: .* misaligned address") {
  Buffer values(64, 8);
  run_warp([&](int) { expect(reinterpret_cast<const uint4*>(values.data())->x != 0, "read"); });
}

PLANTED_ERROR(twin_shuffle_for_barrier, "ThreadSanitizer: data race") {  // a shuffle orders no memory
  run_warp(
      [](int lane) {
        int* shared = ptx::dynamic_shared<int>();
        shared[lane] = lane;
        __shfl_sync(kAll, lane, 0);
        expect(shared[31 - lane] == 31 - lane, "read");
      },
      128);
}

}  // namespace
}  // namespace bitmask::testing
