// How products with a block-sparse weight are done on a GPU: the choices in one table, made without one.
#include "kernels.h"

namespace bitmask::cuda {

BlockPlan plan_block(const BlockParams& params, const Device& device) {
  return {BlockWay::kCores, block_cores_workspace_bytes(params, device)};
}

BlockPlan plan_block_sample(const BlockSampleParams& params, const Device& device) {
  return {BlockWay::kCores, block_sample_cores_workspace_bytes(params, device)};
}

}  // namespace bitmask::cuda
