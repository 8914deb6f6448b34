#include <cuda_runtime.h>

#include "kernels.h"

namespace bitmask::cuda {

cudaError_t block_warpgroup(const BlockParams&, const Device&, void*, cudaStream_t) { return cudaErrorNotSupported; }
int64_t block_warpgroup_workspace_bytes(const BlockParams&, const Device&) { return 0; }
cudaError_t block_sample_warpgroup(const BlockSampleParams&, const Device&, void*, cudaStream_t) { return cudaErrorNotSupported; }
int64_t block_sample_warpgroup_workspace_bytes(const BlockSampleParams&, const Device&) { return 0; }

}  // namespace bitmask::cuda
