// What the ops of every family do with torch tensors: allocate, make contiguous, get at the bytes.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"

namespace bitmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Fresh outputs from here on ask for huge pages.
constexpr int64_t kHugePageBytes = int64_t{4} << 20;

inline int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline const uint8_t* const_bytes(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }
inline int64_t nbytes(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(tensor)));
}
inline uint8_t* mutable_bytes(const Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }

// Asks for huge pages behind a large fresh buffer: a page fault costs more than the 4 KB it brings. Advice only; failing is no error.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kHugePageBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A fresh contiguous tensor. `sizes`: anything with size() and operator[], already checked by geometry().
template <typename Sizes>
Tensor empty_on(int32_t device_type, int32_t device_index, const Sizes& sizes, int32_t dtype) {
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  std::vector<int64_t> strides(shape.size());
  int64_t span = 1;
  for (size_t i = shape.size(); i-- > 0; span *= std::max<int64_t>(shape[i], 1)) strides[i] = span;
  const bool has_elements = std::find(shape.begin(), shape.end(), 0) == shape.end();
  int64_t bytes = 0;
  AtenTensorHandle handle;
  if ((has_elements && __builtin_mul_overflow(span, static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)), &bytes)) ||
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype, device_type, device_index,
                               &handle) != 0) {
    throw OutOfMemory("bitmask: cannot allocate a tensor of size " + to_text(shape));
  }
  return Tensor(handle);
}

// The same on the CPU.
template <typename Sizes>
Tensor empty(const Sizes& sizes, int32_t dtype) {
  Tensor tensor = empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
  advise_huge_pages(tensor.mutable_data_ptr(), nbytes(tensor));
  return tensor;
}

// Refuses a tensor whose storage was shrunk under it.
inline void check_storage(const char* name, const Tensor& tensor) {
  int64_t storage_bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes));
  int64_t last = tensor.storage_offset();
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const int64_t width = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_of(tensor)));
  if (tensor.numel() > 0 && storage_bytes / width <= last) {
    fail(name, ": got a storage of ", storage_bytes, " bytes, expected at least ", (last + 1) * width);
  }
}

// Row-major and without gaps: `tensor` itself or a copy.
inline Tensor contiguous(const char* name, const Tensor& tensor) {
  check_storage(name, tensor);
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    throw OutOfMemory(std::string("bitmask: cannot copy ") + name + " of size " + to_text(tensor.sizes()) + " to contiguous memory");
  }
}

}  // namespace bitmask
