// Included by force ahead of csrc/ops*_cuda.cpp: makes them implementations for CPU tensors, over the twin of the CUDA runtime, so that
// the tests of the ops test it without a GPU. Streams, captures and failures are what a test says they are.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

// What a test says, by ctypes.
extern "C" {
inline __attribute__((visibility("default"))) int bitmask_twin_capturing = 0;
inline __attribute__((visibility("default"))) int bitmask_twin_error = 0;  // of the next call that can fail
inline __attribute__((visibility("default"))) int bitmask_twin_waits = 0;  // calls that waited for the GPU
}

#define CUDART_VERSION 13000
constexpr auto cudaErrorUnsupportedPtxVersion = static_cast<cudaError_t>(222);
constexpr auto cudaErrorNoKernelImageForDevice = static_cast<cudaError_t>(209);
constexpr auto cudaErrorInvalidDeviceFunction = static_cast<cudaError_t>(98);

inline cudaError_t cudaSetDevice(int) {
  const int error = bitmask_twin_error;
  bitmask_twin_error = 0;
  return static_cast<cudaError_t>(error);
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = bitmask_twin_capturing != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = size_t{1} << 20;
  *total = size_t{3} << 20;
  return cudaSuccess;
}

// Of the twin's one GPU: CPU tensors have no index.
#define cudaDeviceGetAttribute(value, attribute, device) cudaDeviceGetAttribute(value, attribute, 0)

inline cudaError_t counted_wait(cudaStream_t stream) {
  ++bitmask_twin_waits;
  return bitmask_twin_capturing != 0 ? cudaErrorNotSupported : cudaStreamSynchronize(stream);
}
#define cudaStreamSynchronize counted_wait

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

namespace torch::stable::accelerator {
struct TwinGuard {
  explicit TwinGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard TwinGuard

#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define CUDA CPU
