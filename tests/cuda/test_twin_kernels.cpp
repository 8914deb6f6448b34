// Kernels that are right, and wrong once something is left out: the twin's schedules and the sanitizers must show it.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdlib>
#include <vector>

#include "twin_calls.h"

namespace bitmask::testing {
namespace {

namespace ptx = cuda::ptx;

// ---------------------------------------------------------------------------------------------------------------- look-back, last block

// A word of the scan: the state in the upper half, a sum in the lower.
constexpr uint64_t kSum = uint64_t{1} << 32, kPrefix = uint64_t{2} << 32;

// Inclusive prefix sums of values [gridDim.x] in one pass by look-back; block `ticket` is the one that came as number `ticket`, so that
// whom it waits for has begun. Without tickets a block waits for one that may never begin.
__global__ void scan(const int* values, unsigned int* ticket, uint64_t* states, int* sums, bool tickets) {
  if (threadIdx.x != 0) return;
  const unsigned int block = tickets ? atomicAdd(ticket, 1u) : blockIdx.x;
  uint32_t sum = static_cast<uint32_t>(values[block]);
  ptx::store_release(&states[block], (block == 0 ? kPrefix : kSum) | sum);
  for (unsigned int before = block; before-- > 0;) {
    uint64_t state;
    while ((state = ptx::load_acquire(&states[before])) == 0) ptx::pause();
    sum += static_cast<uint32_t>(state);
    if ((state & kPrefix) != 0) break;
  }
  ptx::store_release(&states[block], kPrefix | sum);
  sums[block] = static_cast<int>(sum);
}

void run_scan(bool tickets) {
  constexpr std::size_t kBlocks = 60;
  std::vector<int> values(kBlocks), sums(kBlocks);
  std::vector<uint64_t> states(kBlocks);
  unsigned int ticket = 0;
  for (int& value : values) value = static_cast<int>(random_below(1000));
  launch(kBlocks, 64, 0, scan, values.data(), &ticket, states.data(), sums.data(), tickets);
  int sum = 0;
  for (std::size_t i = 0; i < kBlocks; ++i) check(sums[i] == (sum += values[i]), "sum %zu", i);
}

// Every block writes its part; the one that counts last adds them up. `fenced`: as it must be done.
__global__ void add_parts(int* parts, unsigned int* count, int* sum, bool fenced) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = static_cast<int>(blockIdx.x);
  if (fenced) __threadfence();
  if (atomicAdd(count, 1u) != gridDim.x - 1) return;
  if (fenced) __threadfence();
  for (unsigned int i = 0; i < gridDim.x; ++i) *sum += parts[i];
}

void run_add_parts(bool fenced) {
  std::vector<int> parts(50);
  unsigned int count = 0;
  int sum = 0;
  launch(50, 32, 0, add_parts, parts.data(), &count, &sum, fenced);
  check(sum == 49 * 50 / 2, "sum of parts: %d", sum);
}

// ---------------------------------------------------------------------------------------------------------------- barriers, copies

enum class Missing { kNothing, kFirstBarrier, kSecondBarrier };

// Reverses the values of a block, kRounds times, through the same shared memory.
constexpr int kRounds = 2;
__global__ void reverse(int* values, Missing missing) {
  int* shared = ptx::dynamic_shared<int>();
  int value = values[threadIdx.x];
  for (int round = 0; round < kRounds; ++round) {
    shared[threadIdx.x] = value;
    if (missing != Missing::kFirstBarrier) __syncthreads();
    value = shared[blockDim.x - 1 - threadIdx.x];
    if (missing != Missing::kSecondBarrier) __syncthreads();
  }
  values[threadIdx.x] = value;
}

bool reverse_fails(Missing missing) {
  std::vector<int> values(128);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i);
  launch(1, 128, 128 * sizeof(int), reverse, values.data(), missing);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] != static_cast<int>(i)) return true;
  }
  return false;
}

// Rotates the values of a warp through shared memory.
__global__ void rotate(int* values, bool synchronized) {
  int* shared = ptx::dynamic_shared<int>();
  shared[threadIdx.x] = values[threadIdx.x];
  if (synchronized) __syncwarp();
  values[threadIdx.x] = shared[(threadIdx.x + 1) % 32];
}

bool rotate_fails(bool synchronized) {
  std::vector<int> values(32);
  for (std::size_t i = 0; i < 32; ++i) values[i] = static_cast<int>(i);
  launch(1, 32, 32 * sizeof(int), rotate, values.data(), synchronized);
  for (std::size_t i = 0; i < 32; ++i) {
    if (values[i] != static_cast<int>((i + 1) % 32)) return true;
  }
  return false;
}

enum class Pipeline { kRight, kNoWait, kWaitsForOneLess, kNoBarrierAfterWait, kNoBarrierBeforeRefill };

// Sums of tiles of 64 x 16 bytes that pass through two buffers; each thread copies one piece and reads that of its neighbour.
__global__ void sum_tiles(const uint4* tiles, int count, unsigned int* sums, Pipeline pipeline) {
  uint4* shared = ptx::dynamic_shared<uint4>();
  const unsigned int neighbour = (threadIdx.x + 17) % 64;
  ptx::copy_async_16(&shared[threadIdx.x], &tiles[threadIdx.x]);
  ptx::copy_async_commit();
  unsigned int sum = 0;
  for (int tile = 0; tile < count; ++tile) {
    if (tile + 1 < count) ptx::copy_async_16(&shared[64 * ((tile + 1) % 2) + threadIdx.x], &tiles[64 * (tile + 1) + threadIdx.x]);
    ptx::copy_async_commit();
    if (pipeline == Pipeline::kWaitsForOneLess) {
      ptx::copy_async_wait<2>();
    } else if (pipeline != Pipeline::kNoWait) {
      ptx::copy_async_wait<1>();
    }
    if (pipeline != Pipeline::kNoBarrierAfterWait) __syncthreads();
    const uint4 piece = shared[64 * (tile % 2) + neighbour];
    sum += piece.x + 3 * piece.y + 5 * piece.z + 7 * piece.w;
    if (pipeline != Pipeline::kNoBarrierBeforeRefill) __syncthreads();
  }
  sums[threadIdx.x] = sum;
}

bool sum_tiles_fails(Pipeline pipeline) {
  constexpr std::size_t kTiles = 6;
  std::vector<uint4> tiles(kTiles * 64);
  std::vector<unsigned int> sums(64);
  for (unsigned int i = 0; i < tiles.size(); ++i) tiles[i] = make_uint4(i, 2 * i, i * i, 1);
  launch(1, 64, 2 * 64 * 16, sum_tiles, tiles.data(), static_cast<int>(kTiles), sums.data(), pipeline);
  for (unsigned int t = 0; t < 64; ++t) {
    unsigned int sum = 0;
    for (unsigned int tile = 0; tile < kTiles; ++tile) {
      const unsigned int i = 64 * tile + (t + 17) % 64;
      sum += i + 3 * 2 * i + 5 * i * i + 7;
    }
    if (sums[t] != sum) return true;
  }
  return false;
}

constexpr int kSchedules = 40;

template <typename Fails>
void check_found(const char* what, int least, const Fails& fails) {
  int found = 0;
  for_each_seed(kSchedules, [&] { found += fails(); });
  check(found >= least, "%s: wrong results with %d of %d schedules", what, found, kSchedules);
}

TEST_FAMILY(twin_schedules) {
  for_each_seed(kSchedules, [] {
    check(!reverse_fails(Missing::kNothing), "reverse");
    check(!rotate_fails(true), "rotate");
    check(!sum_tiles_fails(Pipeline::kRight), "sum_tiles");
    run_scan(true);
    run_add_parts(true);
  });
  check_dies("endless wait", [] { for_each_seed(20, [] { run_scan(false); }); });
  if (twin::kWatchesRaces || std::getenv("BITMASK_TWIN_SEED") != nullptr) return;
  check_found("no barrier", kSchedules, [] { return reverse_fails(Missing::kFirstBarrier); });
  check_found("no second barrier", kSchedules / 2, [] { return reverse_fails(Missing::kSecondBarrier); });
  check_found("no __syncwarp", kSchedules, [] { return rotate_fails(false); });
  check_found("no wait", kSchedules / 2, [] { return sum_tiles_fails(Pipeline::kNoWait); });
  check_found("wait for one less", kSchedules / 2, [] { return sum_tiles_fails(Pipeline::kWaitsForOneLess); });
  check_found("no barrier after the wait", kSchedules / 2, [] { return sum_tiles_fails(Pipeline::kNoBarrierAfterWait); });
  check_found("no barrier before the next copy", kSchedules / 2, [] { return sum_tiles_fails(Pipeline::kNoBarrierBeforeRefill); });
}

// ---------------------------------------------------------------------------------------------------------------- planted errors

PLANTED_ERROR(twin_no_copy_wait, "FAILED .*: sums of tiles") {
  for_each_seed(5, [] { check(!sum_tiles_fails(Pipeline::kNoWait), "sums of tiles"); });
}

PLANTED_ERROR(twin_no_barrier, "ThreadSanitizer: data race") { reverse_fails(Missing::kFirstBarrier); }
PLANTED_ERROR(twin_no_second_barrier, "ThreadSanitizer: data race") { reverse_fails(Missing::kSecondBarrier); }
PLANTED_ERROR(twin_no_syncwarp, "ThreadSanitizer: data race") { rotate_fails(false); }
PLANTED_ERROR(twin_no_barrier_after_wait, "ThreadSanitizer: data race") { sum_tiles_fails(Pipeline::kNoBarrierAfterWait); }
PLANTED_ERROR(twin_no_barrier_before_refill, "ThreadSanitizer: data race") { sum_tiles_fails(Pipeline::kNoBarrierBeforeRefill); }
PLANTED_ERROR(twin_no_fence, "ThreadSanitizer: data race") { run_add_parts(false); }

}  // namespace
}  // namespace bitmask::testing
