// What the CUDA implementations of every family share: where an op runs, and what becomes of errors of the GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cuda/kernels.h"
#include "operands.h"
#include "tensors.h"

namespace bitmask {

using Named = std::pair<const char*, const Tensor*>;

// How kernels call a dtype, that of values, that products are of.
inline cuda::LinearDtype linear_dtype_of(int32_t dtype) {
  return by_linear_dtype(dtype, cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16, cuda::kFloat64);
}

// Where an op runs: the GPU of its tensors, made the current one for as long as this lives, and torch's current stream on it.
class Launch {
 public:
  Launch(const char* op, std::initializer_list<Named> tensors) : op_(op), index_(index_of(tensors)), guard_(index_) {
    check(cudaSetDevice(index_));  // this library's own copy of the CUDA runtime has a current device of its own
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  template <typename Sizes>
  Tensor empty(const Sizes& sizes, int32_t dtype) const {
    return empty_on(aoti_torch_device_type_cuda(), index_, sizes, dtype);
  }
  Tensor bytes(int64_t count) const { return empty(std::vector<int64_t>{count}, aoti_torch_dtype_uint8()); }
  // Contiguous from a multiple of 16 bytes on, as kernels want it that read so many at a time: `tensor` itself or a copy. What torch
  // allocates begins so; views may begin anywhere.
  Tensor aligned(const char* name, const Tensor& tensor) const {
    const Tensor whole = contiguous(name, tensor);
    if (reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0) return whole;
    const Tensor copy = empty(whole.sizes(), dtype_of(whole));
    check(cudaMemcpyAsync(copy.mutable_data_ptr(), whole.const_data_ptr(), static_cast<size_t>(nbytes(whole)), cudaMemcpyDeviceToDevice,
                          stream_));
    return copy;
  }
  Tensor int64() const { return empty(std::vector<int64_t>{}, aoti_torch_dtype_int64()); }

  // Throws unless a call of the CUDA runtime or a launcher succeeded.
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or a later call would report it again
    std::string message = std::string("bitmask: ") + op_ + ": CUDA error: " + cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction || error == cudaErrorUnsupportedPtxVersion) {
      message += "; bitmask was built for " BITMASK_CUDA_ARCHITECTURES ", this GPU has compute capability " +
                 std::to_string(attribute(cudaDevAttrComputeCapabilityMajor)) + "." +
                 std::to_string(attribute(cudaDevAttrComputeCapabilityMinor)) + ": build bitmask with TORCH_CUDA_ARCH_LIST set to that";
    }
    throw std::runtime_error(message);
  }

  bool capturing() const {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  void refuse_capture(const char* instead) const {
    if (!capturing()) return;
    throw std::runtime_error(std::string("bitmask: ") + op_ + " waits for the GPU, which it cannot while a CUDA graph is captured; " +
                             instead);
  }

  // Copies to the CPU and waits for all that the stream holds until here.
  void read(void* target, const void* source, size_t size) const {
    check(cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToHost, stream_));
    check(cudaStreamSynchronize(stream_));
  }

  // The instructions of sm_90a are those of that capability alone, and in binaries for no other.
  cuda::Device device() const {
    const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
    const bool built = std::strstr(BITMASK_CUDA_ARCHITECTURES, "sm_90a") != nullptr;
    return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), hopper && built};
  }

  // Throws what a failed allocation was: the GPU may have failed long before.
  [[noreturn]] void fail_allocation(const OutOfMemory& failure) const {
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total));
    throw std::runtime_error(std::string(kOutOfMemory) + failure.what() + " for " + op_ + " on cuda:" + std::to_string(index_) +
                             ", where " + std::to_string(free >> 20) + " MiB of " + std::to_string(total >> 20) + " MiB are free");
  }

 private:
  static int32_t index_of(std::initializer_list<Named> tensors) {
    check_one_device(tensors);
    return tensors.begin()->second->get_device_index();
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }

  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Runs body(launch) where the tensors are.
template <typename Body>
auto launch(const char* op, std::initializer_list<Named> tensors, const Body& body) {
  const Launch on(op, tensors);
  try {
    return body(on);
  } catch (const OutOfMemory& failure) {
    on.fail_allocation(failure);
  }
}

// The word on the GPU that says what proofs of a weight have found.
class Verdict {
 public:
  explicit Verdict(const Launch& on) : on_(on), word_(on.int64()) {}

  cuda::Fault* word() const { return static_cast<cuda::Fault*>(word_.mutable_data_ptr()); }

  // Waits for the proofs.
  cuda::Fault read() const {
    cuda::Fault fault;
    on_.read(&fault, word_.const_data_ptr(), sizeof fault);
    return fault;
  }

  // Makes a result NaN if the weight it was calculated from proves faulty.
  void poison(const Tensor& result) const { on_.check(cuda::poison(result.mutable_data_ptr(), nbytes(result), word(), on_.stream())); }

 private:
  const Launch& on_;
  Tensor word_;
};

// Calls an out= overload of a torch op that has one result.
template <typename... Arguments>
void call_out(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // a reference to `out`, released
}

inline Tensor matrix(const Tensor& tensor, int64_t rows, int64_t cols) {
  return torch::stable::view(tensor, std::vector<int64_t>{rows, cols});
}

}  // namespace bitmask
