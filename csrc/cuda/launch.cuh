// How kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace bitmask::cuda {

struct LaunchSize {
  int64_t threadblocks;
  int threads;  // of each
  int64_t shared_bytes = 0;
  int64_t shared_limit = 0;  // the most that launches of the kernel have; 0: all have the same
  int grids = 1;             // of so many threadblocks each, told by blockIdx.y
};

// Dynamic shared memory that every kernel may have without asking.
constexpr int64_t kSharedForAll = 48 << 10;

// The limit of shared memory is the kernel's, not the launch's: it must be the same each time, or a lower one would meet launches of other
// threads and those that a CUDA graph holds.
template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchSize& size, cudaStream_t stream,
                          const std::common_type_t<Parameters>&... arguments) {
  if (size.threadblocks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t limit = size.shared_limit == 0 ? size.shared_bytes : size.shared_limit;
  if (limit > kSharedForAll) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size.threadblocks), static_cast<unsigned>(size.grids));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<size_t>(size.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace bitmask::cuda
