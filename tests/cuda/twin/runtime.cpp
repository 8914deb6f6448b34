// The twin's part of the CUDA runtime: what a GPU refuses is refused.
#include <cstdint>
#include <cstring>
#include <map>

#include "cuda.h"
#include "cuda_runtime_api.h"
#include "twin.h"

namespace bitmask::twin {
namespace {

constexpr int kShared = 48 * 1024;     // that a block may have unasked
constexpr int kSharedReserved = 1024;  // by the system, for each block
constexpr int kMostThreads = 1024;
constexpr int kThreadsOfMultiprocessor = 2048;
constexpr int kBlocksOfMultiprocessor = 32;

cudaError_t last_error = cudaSuccess;
std::map<const void*, int> shared_limits;  // of kernels that asked for one

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto limit = shared_limits.find(kernel);
  if (kernel == nullptr || config.numAttrs != 0) return cudaErrorInvalidValue;
  if (block.x > kMostThreads || block.y > kMostThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (threads == 0 || threads > kMostThreads) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > static_cast<std::size_t>(limit == shared_limits.end() ? kShared : limit->second)) {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  if (in_kernel()) fail("launches a kernel");
  const cudaError_t error = check(config, kernel);
  if (error == cudaSuccess) run_grid(config.gridDim, config.blockDim, config.dynamicSmemBytes, thread);
  return remember(error);
}

}  // namespace bitmask::twin

using namespace bitmask::twin;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorUnknown:
      break;
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes != 0) std::memcpy(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(target, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMostThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kShared;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = kLanes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = kThreadsOfMultiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = properties.shared_bytes + kSharedReserved;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = properties.shared_bytes;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return remember(cudaErrorInvalidValue);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > properties.shared_bytes) return remember(cudaErrorInvalidValue);
  shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, std::size_t shared_bytes) {
  if (threads <= 0 || threads > kMostThreads) return remember(cudaErrorInvalidValue);
  const std::size_t all = static_cast<std::size_t>(properties.shared_bytes + kSharedReserved);
  const int by_shared = static_cast<int>(all / (shared_bytes + kSharedReserved));
  const int by_threads = kThreadsOfMultiprocessor / threads;
  *blocks = by_shared < by_threads ? by_shared : by_threads;
  if (*blocks > kBlocksOfMultiprocessor) *blocks = kBlocksOfMultiprocessor;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
