// How products with a 2:4 weight are done on a GPU: the choices in one place, made without one.
#include "kernels.h"

namespace bitmask::cuda {
namespace {

// Rows of x up to which W is streamed: tiles of tensor cores would be mostly padding, and memory is the bound anyway.
constexpr int64_t kStreamRows = 16;

TwoFourWay way_of(const TwoFourParams& params, const Device& device) {
  if (params.m <= kStreamRows && two_four_stream_takes(params, device)) return TwoFourWay::kStream;
  return two_four_multiply_takes(params, device) ? TwoFourWay::kMultiply : TwoFourWay::kLibrary;
}

}  // namespace

TwoFourPlan plan_two_four(const TwoFourParams& params, const Device& device) {
  switch (const TwoFourWay way = way_of(params, device)) {
    case TwoFourWay::kStream:
      return {way, two_four_stream_workspace_bytes(params, device)};
    case TwoFourWay::kMultiply:
      return {way, two_four_multiply_workspace_bytes(params, device)};
    default:
      return {way, 0};
  }
}

}  // namespace bitmask::cuda
