#include <cuda_runtime.h>

#include "kernels.h"

namespace bitmask::cuda {

cudaError_t prove_block_index(const BlockIndex&, int64_t*, Fault*, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t prove_block_order(const BlockIndex&, const int64_t*, Fault*, void*, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t prove_transposed(const BlockIndex&, const BlockIndex&, Fault*, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t schedule_lines(const BlockIndex&, int32_t*, cudaStream_t) { return cudaErrorNotSupported; }

}  // namespace bitmask::cuda
