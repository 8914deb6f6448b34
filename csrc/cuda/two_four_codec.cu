#include <cuda_runtime.h>

#include "kernels.h"

namespace bitmask::cuda {

cudaError_t pack_24(const void*, const Geometry&, int, const ZeroTest&, Magnitude, bool, void*, uint8_t*, Fault*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t unpack_24(const TwoFourMatrix&, int, void*, Fault*, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t prune_24(void*, const Geometry&, int, const ZeroTest&, Magnitude, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t prune_24_transposable(void*, const Geometry&, LinearDtype, cudaStream_t) { return cudaErrorNotSupported; }

}  // namespace bitmask::cuda
