// Tensor maps: how the copy engine of sm_90 is told of a matrix. Made on the host and passed as kernel parameters.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace bitmask::cuda {

// The driver's cuTensorMapEncodeTiled, or null; asked for at run time, as nothing here is linked to the driver.
inline decltype(&cuTensorMapEncodeTiled) find_tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned int kSince = 12000;  // version of CUDA
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince, cudaEnableDefault, &found) != cudaSuccess)
    return nullptr;
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
}

// Found once: the driver stays.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = find_tensor_map_encoder();
  return encoder;
}

// Whether the driver can make tensor maps.
inline bool has_tensor_maps() { return tensor_map_encoder() != nullptr; }

// A row-major matrix of 16-bit elements, copied in boxes of `box_rows` <= 256 rows of 64 columns, which lie in shared memory as rows of 128
// bytes with the swizzle of 128 bytes (ptx::copy_box). `matrix` and its rows are aligned to 16 bytes. Elements are only moved: any 16-bit
// type will do.
inline cudaError_t encode_tensor_map(CUtensorMap* map, const void* matrix, int64_t rows, int64_t cols, int box_rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)}, strides[] = {sizes[0] * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace bitmask::cuda
