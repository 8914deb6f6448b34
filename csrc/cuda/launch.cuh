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
};

// Dynamic shared memory that every kernel may have without asking.
constexpr int64_t kSharedForAll = 48 << 10;

// The limit of shared memory is the kernel's, not the launch's: a kernel must always be launched with the same bytes, or a lower limit
// would meet launches of other threads and those that a CUDA graph holds.
template <typename... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const LaunchSize& size, cudaStream_t stream,
                          const std::common_type_t<Parameters>&... arguments) {
  if (size.threadblocks > INT32_MAX) return cudaErrorInvalidValue;
  if (size.shared_bytes > kSharedForAll) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(size.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(size.threadblocks));
  config.blockDim = dim3(static_cast<unsigned>(size.threads));
  config.dynamicSmemBytes = static_cast<size_t>(size.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace bitmask::cuda
