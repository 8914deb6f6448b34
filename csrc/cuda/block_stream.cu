#include <cuda_runtime.h>

#include "kernels.h"

namespace bitmask::cuda {

cudaError_t block_stream(const BlockParams&, const Device&, void*, cudaStream_t) { return cudaErrorNotSupported; }
int64_t block_stream_workspace_bytes(const BlockParams&, const Device&) { return 0; }

}  // namespace bitmask::cuda
