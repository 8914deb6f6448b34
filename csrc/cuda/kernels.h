// Launchers of the CUDA kernels: plain pointers to device memory, sizes, a stream. They allocate nothing, wait for nothing, and may be
// captured in a CUDA graph. Sizes have been checked by the caller; contents have not: kernels touch nothing outside of the buffers they
// are given, whatever these hold.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../layout.h"

namespace bitmask::cuda {

// A word of device memory that proves a weight: kNoFault, or the lowest row that is faulty (an offset out of order or out of range, a
// popcount that does not lead to the next offset, padding bits set). Kernels only lower it.
using Fault = unsigned long long;
constexpr Fault kNoFault = ~Fault{0};

// ---------------------------------------------------------------------------------------------------------------- codec

// Bytes of scratch memory that compress and decompress take; aligned to 16 bytes, contents irrelevant.
int64_t codec_workspace_bytes(const Geometry& g);

// *nnz = how many elements of dense [rows, cols] are not zero.
cudaError_t count_nonzero(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, int64_t* nnz, cudaStream_t stream);

// Reads `dense` once. Writes bitmasks [rows, bitmask_bytes(cols)], row_offsets [rows], *nnz, and the first `capacity` values.
cudaError_t compress(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* row_offsets,
                     void* values, int64_t capacity, int64_t* nnz, void* workspace, cudaStream_t stream);

// Proves the rows [begin, end) and writes them to dense [end - begin, cols], unless that is null. `fault` is set to kNoFault first if
// `first` says that this is the first part of the weight. What is written for a weight that proves faulty is worthless.
cudaError_t decompress(const BitmaskMatrix& w, int64_t begin, int64_t end, int width, void* dense, bool first, Fault* fault,
                       void* workspace, cudaStream_t stream);

// Sets all bits of `bytes` bytes, which is NaN for every floating-point dtype, if the weight has proven faulty.
cudaError_t poison(void* data, int64_t bytes, const Fault* fault, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------------------------- linear

// Dtypes that have linear kernels.
enum LinearDtype { kFloat32, kBfloat16, kFloat16, kLinearDtypes };

// y [m, rows] = x [m, cols] W^T + bias [rows], all of one dtype, summed in fp32 in an order that depends on the sizes alone. `bias` may be
// null. A faulty row of W gives NaN in its column of y, since a kernel cannot throw.
struct LinearParams {
  BitmaskMatrix w;
  const void* x;
  const void* bias;
  void* y;
  int64_t m;
  LinearDtype dtype;
};

// What the launchers ask of a GPU, so that they can be planned without one.
struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block may have
};

// How a product is to be done.
enum class LinearWay {
  kStream,    // CUDA cores, few rows of x: W is one stream of bytes
  kMultiply,  // tensor cores, more rows of x: a tile of W is expanded into shared memory
  kLibrary,   // decompressed a part at a time and multiplied by cuBLAS
};

struct LinearPlan {
  LinearWay way;
  int64_t workspace_bytes;  // aligned to 16 bytes; contents irrelevant
};

LinearPlan plan_linear(const LinearParams& params, const Device& device);

// Both need params.m to be within what plan_linear chooses them for.
cudaError_t linear_stream(const LinearParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t linear_multiply(const LinearParams& params, const Device& device, void* workspace, cudaStream_t stream);

}  // namespace bitmask::cuda
