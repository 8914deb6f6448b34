// y = x W^T + bias for few rows of x, W being block-sparse: the values as they lie (weight_stream.cuh).
#include <cuda_runtime.h>

#include <cstdint>
#include <ptx.cuh>

#include "elements.cuh"
#include "kernels.h"
#include "weight_stream.cuh"

namespace bitmask::cuda {
namespace {

using namespace streaming;

template <LinearDtype kDtype_>
struct BlockWeight {
  static constexpr LinearDtype kDtype = kDtype_;
  static constexpr int kColumns = kPieceBytes / sizeof(typename Element<kDtype>::Stored);

  static constexpr int kMaskBytes = 0;

  struct Mask {};

  static __device__ __forceinline__ Mask load(const Stream&, const uint8_t*, int64_t, bool) { return {}; }
  static __device__ __forceinline__ bool is_sound(Mask, int64_t) { return true; }

  static __device__ __forceinline__ void copy(const Stream&, const uint8_t* source, int64_t, uint4& target, bool) {
    ptx::copy_async_16(&target, source);
  }

  static __device__ __forceinline__ void expand(const uint4& piece, Mask, uint2 (&quads)[2]) {
    quads[0] = {piece.x, piece.y};
    quads[1] = {piece.z, piece.w};
  }
  static __device__ __forceinline__ void expand(const uint4& piece, Mask, float4 (&quads)[1]) {
    quads[0] = {__uint_as_float(piece.x), __uint_as_float(piece.y), __uint_as_float(piece.z), __uint_as_float(piece.w)};
  }

  static __device__ __forceinline__ float settle(const Stream&, const Span&, int, int, float sum) { return sum; }
};

}  // namespace

bool block_stream_takes(const BlockParams& params, const Device&) {
  const int64_t width = width_of(params.dtype);
  const bool pieces = params.block_cols * width % kPieceBytes == 0 && reinterpret_cast<uintptr_t>(params.values) % kPieceBytes == 0;
  return !params.transposed && params.dtype != kFloat64 && params.m <= kMostStreamRows && pieces;
}

int64_t block_stream_workspace_bytes(const BlockParams& params, const Device& device) {
  return streaming::stream_workspace_bytes(params.m, device);
}

cudaError_t block_stream(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream_of_work) {
  if (!block_stream_takes(params, device)) return cudaErrorInvalidValue;
  const int64_t width = width_of(params.dtype);
  const uintptr_t x = reinterpret_cast<uintptr_t>(params.x);
  Stream p{};
  p.index = params.index;
  p.values = static_cast<const uint8_t*>(params.values);
  p.rows = params.rows;
  p.cols = params.cols;
  p.block_rows = params.block_rows;
  p.block_cols = params.block_cols;
  p.x = params.x;
  p.bias = params.bias;
  p.y = params.y;
  p.m = static_cast<int>(params.m);
  p.fault = params.fault;
  p.x_aligned = x % kPieceBytes == 0 && (params.m == 1 || params.cols * width % kPieceBytes == 0);
  p.row_bytes = params.block_cols * width;
  p.row_pieces = p.row_bytes / kPieceBytes;
  p.strips = blocks_across(params.block_rows, kTileRows);
  p.pieces = params.index.blocks * p.row_pieces * p.strips;
  return launch_stream<BlockWeight>(p, params.dtype, device, workspace, stream_of_work);
}

}  // namespace bitmask::cuda
