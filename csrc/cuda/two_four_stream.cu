// y = x W^T + bias for few rows of x, W being 2:4 as a whole or in blocks: the values and metadata as they lie (weight_stream.cuh).
//
// A piece is as many values as 16 bytes hold and twice as many columns. It is made dense in registers, with zeros for what is not stored.
// These would meet infinity and NaN in x, so sums that are not finite are done again from what is stored alone.
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
struct TwoFourWeight {
  static constexpr LinearDtype kDtype = kDtype_;
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  static constexpr int kWidth = sizeof(Stored);
  static constexpr int kColumns = 2 * kPieceBytes / kWidth;
  static constexpr int kMaskBytes = kColumns / 8;

  using Mask = uint16_t;  // bit c: column c of the piece is stored

  static __device__ __forceinline__ Mask load(const Stream& p, const uint8_t* source, int64_t piece, bool aligned) {
    if (kMaskBytes == 1) return *source;
    if (aligned) return *reinterpret_cast<const uint16_t*>(source);
    const bool second = piece * kMaskBytes + 1 < p.row_mask_bytes;
    return static_cast<Mask>(second ? source[0] | source[1] << 8 : source[0]);
  }

  // Are two bits set in each four of so many columns, and none in others?
  static __device__ __forceinline__ bool is_sound(Mask mask, int64_t columns) {
    const uint32_t pairs = (mask & 0x5555u) + (mask >> 1 & 0x5555u), fours = (pairs & 0x3333) + (pairs >> 2 & 0x3333);
    const uint32_t all = 0x2222u >> (16 - kColumns);
    return fours == (columns >= kColumns ? all : all & ((1u << columns) - 1));
  }

  static __device__ __forceinline__ void copy(const Stream& p, const uint8_t* source, int64_t piece, uint4& target, bool aligned) {
    if (aligned) {
      ptx::copy_async_16(&target, source);
    } else {
      const int64_t left = (p.row_bytes - piece * kPieceBytes) / kWidth;
#pragma unroll
      for (int i = 0; i < kPieceBytes / kWidth; ++i) {
        reinterpret_cast<Stored*>(&target)[i] = i < left ? reinterpret_cast<const Stored*>(source)[i] : Stored{0};
      }
    }
  }

  // A lookup for four groups at once: sound masks of a group differ in their lower three bits, so each picks a byte of a table, which is
  // what becomes a column: 0x10 is the group's first value, 0x32 the second one, 0x44 zero.
  static __device__ __forceinline__ void expand(const uint4& piece, Mask mask, uint2 (&quads)[4]) {
    const uint32_t values[4] = {piece.x, piece.y, piece.z, piece.w}, groups = mask & 0x7777;
    // The bytes are for the masks - 1001 1010 0011 and 1100 0101 0110 -, from the lowest one up.
    const uint32_t column0 = ptx::permute(0x10441044, 0x44441044, groups);
    const uint32_t column1 = ptx::permute(0x32104444, 0x44104444, groups);
    const uint32_t column2 = ptx::permute(0x44444444, 0x44323210, groups);
    const uint32_t column3 = ptx::permute(0x44323244, 0x44444432, groups);
#pragma unroll
    for (uint32_t u = 0; u < 4; ++u) {
      quads[u].x = ptx::permute(values[u], 0, ptx::permute(column0, column1, 0x40 + 0x11 * u));
      quads[u].y = ptx::permute(values[u], 0, ptx::permute(column2, column3, 0x40 + 0x11 * u));
    }
  }

  static __device__ __forceinline__ void expand(const uint4& piece, Mask mask, float4 (&quads)[2]) {
    const float values[4] = {__uint_as_float(piece.x), __uint_as_float(piece.y), __uint_as_float(piece.z), __uint_as_float(piece.w)};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const bool stored[4] = {(mask >> 4 * u & 1) != 0, (mask >> 4 * u & 2) != 0, (mask >> 4 * u & 4) != 0, (mask >> 4 * u & 8) != 0};
      quads[u].x = stored[0] ? values[2 * u] : 0;
      quads[u].y = stored[1] ? stored[0] ? values[2 * u + 1] : values[2 * u] : 0;
      quads[u].z = stored[2] ? stored[3] ? values[2 * u] : values[2 * u + 1] : 0;
      quads[u].w = stored[3] ? values[2 * u + 1] : 0;
    }
  }

  // The sum of a sound row of what a warp does of a tile with row i of x.
  static __device__ __forceinline__ float settle(const Stream& p, const Span& span, int tile_row, int i, float sum) {
    const Tile& tile = span.tile;
    const int64_t row = tile.strip * kTileRows + tile_row;
    if (fabsf(sum) <= 3.40282347e38f || row >= p.block_rows || tile.line * p.block_rows + row >= p.rows) return sum;
    sum = 0;
    const Stored* const x = static_cast<const Stored*>(p.x) + i * p.cols;
#pragma unroll 1
    for (int64_t at = span.begin; at < span.end; ++at) {
      const int64_t block = tile.first + (at - tile.begin) / p.row_pieces, piece = (at - tile.begin) % p.row_pieces;
      const bool whole = p.index.starts == nullptr;
      const int64_t column = (whole ? 0 : p.index.positions[block]) * p.block_cols + piece * kColumns;
      const int64_t in_values = (whole ? 0 : place_of(p.index, block)) * p.block_rows + row;
      const uint8_t* source = p.values + in_values * p.row_bytes + piece * kPieceBytes;
      uint32_t bits = load(p, p.metadata + in_values * p.row_mask_bytes + piece * kMaskBytes, piece, p.w_aligned);
#pragma unroll 1
      for (int64_t c = column; bits != 0; ++c, bits >>= 1) {
        if ((bits & 1) == 0) continue;
        if (c < p.cols) sum = fmaf(E::widen(*reinterpret_cast<const Stored*>(source)), E::widen(x[c]), sum);
        source += kWidth;
      }
    }
    return sum;
  }
};

}  // namespace

bool two_four_stream_takes(const TwoFourParams& params, const Device&) { return params.dtype != kFloat64 && params.m <= kMostStreamRows; }

int64_t two_four_stream_workspace_bytes(const TwoFourParams& params, const Device& device) {
  return streaming::stream_workspace_bytes(params.m, device);
}

cudaError_t two_four_stream(const TwoFourParams& params, const Device& device, void* workspace, cudaStream_t stream_of_work) {
  if (!two_four_stream_takes(params, device)) return cudaErrorInvalidValue;
  const int64_t width = width_of(params.dtype);
  const uintptr_t x = reinterpret_cast<uintptr_t>(params.x), values = reinterpret_cast<uintptr_t>(params.values);
  Stream p{};
  p.index = params.has_blocks() ? params.index : BlockIndex{nullptr, nullptr, nullptr, 1, 1, 1};
  p.values = static_cast<const uint8_t*>(params.values);
  p.metadata = params.metadata;
  p.rows = params.rows;
  p.cols = params.cols;
  p.block_rows = params.has_blocks() ? params.block_rows : params.rows;
  p.block_cols = params.has_blocks() ? params.block_cols : params.cols;
  p.x = params.x;
  p.bias = params.bias;
  p.y = params.y;
  p.m = static_cast<int>(params.m);
  p.row_bytes = p.block_cols / 2 * width;
  p.row_mask_bytes = bitmask_bytes(p.block_cols);
  p.row_pieces = blocks_across(p.row_bytes, kPieceBytes);
  p.strips = blocks_across(p.block_rows, kTileRows);
  p.pieces = p.index.blocks * p.row_pieces * p.strips;
  p.x_aligned = x % kPieceBytes == 0 && (p.m == 1 || p.cols * width % kPieceBytes == 0) &&
                (!params.has_blocks() || p.block_cols * width % kPieceBytes == 0);
  p.w_aligned = values % kPieceBytes == 0 && p.row_bytes % kPieceBytes == 0 && reinterpret_cast<uintptr_t>(p.metadata) % 2 == 0;
  return launch_stream<TwoFourWeight>(p, params.dtype, device, workspace, stream_of_work);
}

}  // namespace bitmask::cuda
