// The twin's own test: what each primitive does, and that errors of kernels are found.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <vector>

#include "testing.h"

namespace bitmask::testing {
namespace {

namespace ptx = cuda::ptx;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Sums of each block's threads, through shuffles and shared memory.
__global__ void sum_blocks(const int* values, int* sums) {
  int* shared = ptx::dynamic_shared<int>();
  int sum = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += shared[w];
    sums[blockIdx.x] = sum;
  }
}

TEST_FAMILY(twin) {
  for_each_seed(20, [] {
    constexpr int kBlocks = 50, kThreads = 128;
    std::vector<int> values(kBlocks * kThreads), sums(kBlocks);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i * 7 % 1001);
    check(launch(kBlocks, kThreads, kThreads / 32 * sizeof(int), sum_blocks, values.data(), sums.data()) == cudaSuccess, "launch");
    for (int b = 0; b < kBlocks; ++b) {
      int sum = 0;
      for (int t = 0; t < kThreads; ++t) sum += values[static_cast<std::size_t>(b * kThreads + t)];
      check(sums[static_cast<std::size_t>(b)] == sum, "block %d: %d, not %d", b, sums[static_cast<std::size_t>(b)], sum);
    }
  });
}

}  // namespace
}  // namespace bitmask::testing
