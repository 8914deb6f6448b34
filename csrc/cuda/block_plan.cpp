// How products with a block-sparse weight are done on a GPU: the choices in one place, made without one. Each launcher knows what it takes;
// here is from how many rows of x on it is the best of those that do.
#include "kernels.h"

namespace bitmask::cuda {
namespace {

// Rows of x up to which the kept blocks are streamed: tiles of tensor cores would be mostly padding, and memory is the bound anyway.
constexpr int64_t kStreamRows = 16;

// Rows of x from which on the instructions of sm_90a gain more than their larger tiles lose. Not timed.
constexpr int64_t kWarpgroupRows = 256;

BlockWay way_of(const BlockParams& params, const Device& device) {
  if (params.m <= kStreamRows && block_stream_takes(params, device)) return BlockWay::kStream;
  if (params.m >= kWarpgroupRows && block_warpgroup_takes(params, device)) return BlockWay::kWarpgroup;
  return block_multiply_takes(params, device) ? BlockWay::kMultiply : BlockWay::kCores;
}

BlockWay way_of(const BlockSampleParams& params, const Device& device) {
  if (params.m >= kWarpgroupRows && block_sample_warpgroup_takes(params, device)) return BlockWay::kWarpgroup;
  return block_sample_takes(params, device) ? BlockWay::kMultiply : BlockWay::kCores;
}

}  // namespace

BlockPlan plan_block(const BlockParams& params, const Device& device) {
  switch (const BlockWay way = way_of(params, device)) {
    case BlockWay::kStream:
      return {way, block_stream_workspace_bytes(params, device)};
    case BlockWay::kMultiply:
      return {way, block_multiply_workspace_bytes(params, device)};
    case BlockWay::kWarpgroup:
      return {way, block_warpgroup_workspace_bytes(params, device)};
    default:
      return {way, block_cores_workspace_bytes(params, device)};
  }
}

BlockPlan plan_block_sample(const BlockSampleParams& params, const Device& device) {
  switch (const BlockWay way = way_of(params, device)) {
    case BlockWay::kMultiply:
      return {way, block_sample_workspace_bytes(params, device)};
    case BlockWay::kWarpgroup:
      return {way, block_sample_warpgroup_workspace_bytes(params, device)};
    default:
      return {way, block_sample_cores_workspace_bytes(params, device)};
  }
}

}  // namespace bitmask::cuda
