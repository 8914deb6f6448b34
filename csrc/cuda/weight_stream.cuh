// y = x W^T + bias for few rows of x, W being kept blocks of any kind: bound by the bytes of W.
//
// A warp takes its share of the tiles (stream_tiles.cuh) a step at a time: lane 4g + t has piece t of the rows g, g + 8, g + 16 and g + 24.
// It copies ahead by stages of its own in shared memory, on into the next tile, and waits for no other warp until its share is done. Sums
// of a tile that several warps of a threadblock share are then added in the order of the warps, those of several threadblocks by `join`,
// in theirs: they depend on the sizes and on the index alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx.cuh>

#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "stream_tiles.cuh"

namespace bitmask::cuda::streaming {

constexpr int kLanes = 32;
constexpr unsigned int kAllLanes = 0xffffffff;
constexpr int64_t kMostStreamRows = 16;  // of x
constexpr int64_t kFlagBytes = 16;       // of the workspace, before the sums

// ---------------------------------------------------------------------------------------------------------------- arithmetic

// Four columns of a row of W or x, and the sums of a warp. The order of the columns is free in a dot product: a lane takes four that follow
// each other for the pairs (2t, 2t + 1) and (2t + 8, 2t + 9) of mma.m16n8k16.
//
// kDtype  of W and x
// kRows   of x: 8 or 16, since tensor cores do 8 for the price of one
template <LinearDtype kDtype, int kRows>
struct Arithmetic {
  using Quad = uint2;
  struct Sums {
    float of[kLaneRows / 2][kRows / 8][4];
  };

  // Columns from `left` on become zeros.
  static __device__ __forceinline__ void mask(Quad& quad, int left) {
    quad.x = left <= 0 ? 0 : left == 1 ? quad.x & 0xffff : quad.x;
    quad.y = left <= 2 ? 0 : left == 3 ? quad.y & 0xffff : quad.y;
  }

  // `x`: what lane 0 has of the first 8 rows; lane 4g + t has row g of each 8, which lie `stride` bytes apart.
  static __device__ __forceinline__ void multiply(Sums& sums, const Quad (&w)[kLaneRows], const uint8_t* x, int stride, int lane) {
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const Quad operand = *reinterpret_cast<const Quad*>(x + i * stride + lane * kPieceBytes);
#pragma unroll
      for (int j = 0; j < kLaneRows / 2; ++j) {
        Element<kDtype>::multiply(sums.of[j][i], {w[2 * j].x, w[2 * j + 1].x, w[2 * j].y, w[2 * j + 1].y}, {operand.x, operand.y});
      }
    }
  }

  // Calls each(sum, row of x, which of the lane's rows of W) for the sums that this lane is to deliver.
  template <typename Each>
  static __device__ __forceinline__ void deliver(const Sums& sums, int lane, const Each& each) {
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        each(sums.of[j / 2][i][2 * (j % 2)], 8 * i + 2 * (lane % 4), j);
        each(sums.of[j / 2][i][2 * (j % 2) + 1], 8 * i + 2 * (lane % 4) + 1, j);
      }
    }
  }
};

// On CUDA cores, for any number of rows of x: each lane multiplies what it has of W with all rows, which other lanes have copied.
template <int kRows>
struct Arithmetic<kFloat32, kRows> {
  using Quad = float4;
  struct Sums {
    float of[kLaneRows][kRows];
  };

  static __device__ __forceinline__ void mask(Quad& quad, int left) {
    if (left <= 0) quad.x = 0;
    if (left <= 1) quad.y = 0;
    if (left <= 2) quad.z = 0;
    if (left <= 3) quad.w = 0;
  }

  static __device__ __forceinline__ void multiply(Sums& sums, const Quad (&w)[kLaneRows], const uint8_t* x, int stride, int lane) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Quad operand = *reinterpret_cast<const Quad*>(x + i / 8 * stride + (i % 8 * 4 + lane % 4) * kPieceBytes);
#pragma unroll
      for (int j = 0; j < kLaneRows; ++j) {
        float& sum = sums.of[j][i];
        sum = fmaf(w[j].x, operand.x, sum);
        sum = fmaf(w[j].y, operand.y, sum);
        sum = fmaf(w[j].z, operand.z, sum);
        sum = fmaf(w[j].w, operand.w, sum);
      }
    }
  }

  template <typename Each>
  static __device__ __forceinline__ void deliver(const Sums& sums, int lane, const Each& each) {
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float sum = sums.of[j][i] + __shfl_xor_sync(kAllLanes, sums.of[j][i], 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (i % 4 == lane % 4) each(sum, i, j);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------- shared memory

// Weight  how pieces hold W, with these members:
//         kDtype, kColumns  of W, and how many columns a piece has
//         Mask, kMaskBytes  what tells which columns these are, and how it lies in the metadata
//         load              loads a mask
//         is_sound          whether the mask is, for so many columns of a block
//         copy              brings a piece to shared memory
//         expand            makes quads of a piece
//         settle            what becomes of a sum
template <class Weight, int kRows>
struct Stage {
  static constexpr int kTiles = (kRows + 7) / 8;
  static constexpr int kXPieces = Weight::kColumns * int{sizeof(typename Element<Weight::kDtype>::Stored)} / kPieceBytes;

  uint4 values[kLaneRows][kLanes];
  uint4 x[kTiles][kXPieces][kLanes];  // lane 4g + t: of row g of each 8
  int16_t left[kLanes];               // columns that W has of the piece, up to Weight::kColumns
  uint16_t faulty[kLanes];            // bit j: row j of the lane
  typename Weight::Mask masks[kLaneRows][kLanes];
  bool ends;  // the warp's part of a tile, this one
  Span span;
};

// The sums of a tile that a warp has not done alone.
template <int kRows>
struct Part {
  float sums[kRows][kTileRows];
  Tile tile;
  bool kept;  // whether there is such a tile
};

// Where sums take many registers, half of the warps copy twice as far ahead.
template <class Weight, int kRows>
constexpr int kMostWarps = Weight::kDtype == kFloat32 && kRows >= 4 ? 8 : 16;

template <class Weight, int kRows>
struct alignas(16) WarpMemory {
  static constexpr int kStages = kMostWarps<Weight, kRows> == 16 ? 3 : 5;

  Stage<Weight, kRows> stages[kStages];
  Part<kRows> parts[2];  // of the tile that the warp has not begun, and of the one that it does not end
};

// ---------------------------------------------------------------------------------------------------------------- copying

// What a lane waits for longest, asked for a step before it is used.
template <class Weight>
struct Request {
  int64_t position, before;  // of the lane's block and of the one before it in the line, or -1
  int64_t place;             // or -1, if there is no such
  typename Weight::Mask masks[kLaneRows];
};

// A warp's way through its share, ahead of the products.
template <class Weight, int kRows>
struct Reader {
  using Stored = typename Element<Weight::kDtype>::Stored;
  static constexpr int kXColumns = kPieceBytes / sizeof(Stored);

  const Stream& p;
  int lane;
  Walk walk;
  int64_t block, piece;  // the lane's, in the index and in a row of the block
  int rows;              // how many the lane has that W has

  __device__ __forceinline__ Reader(const Stream& params, const Walk& begin, int lane_)
      : p(params), lane(lane_), walk(begin), block(0), piece(0), rows(0) {
    find();
  }

  // Is there a piece for the lane?
  __device__ __forceinline__ bool any() const { return walk.at + lane % 4 < walk.end; }

  __device__ __forceinline__ void advance() {
    walk.at += kStepPieces;
    if (!walk.more()) {
      walk.advance();
      find();
      return;
    }
    for (piece += kStepPieces; piece >= p.row_pieces; piece -= p.row_pieces) ++block;
  }

  __device__ __forceinline__ Request<Weight> request() const {
    Request<Weight> request{0, -1, 0, {}};
    if (!any()) return request;
    if (p.index.starts != nullptr) {
      request.position = p.index.positions[block];
      if (block > walk.tile.first) request.before = p.index.positions[block - 1];
      request.place = place_of(p.index, block);
      if (!is_place(p.index, request.place)) request.place = -1;
    }
    if (request.place >= 0) aligned() ? load_masks(request, true) : load_masks(request, false);
    return request;
  }

  __device__ __forceinline__ void copy(const Request<Weight>& request, Stage<Weight, kRows>& stage) const {
    const bool there = any() && request.place >= 0;
    if (there) aligned() ? copy_values(request, stage, true) : copy_values(request, stage, false);
    const bool placed = there && request.position > request.before && request.position < limit();
    const int64_t inside = piece * Weight::kColumns, column = placed ? request.position * p.block_cols + inside : 0;
    const int64_t columns = placed ? min(p.cols - column, p.block_cols - inside) : 0;
    const int left = static_cast<int>(max(min(columns, int64_t{Weight::kColumns}), int64_t{0}));
    copy_x(column, left, stage);
    uint32_t faulty = any() && !placed ? (1 << kLaneRows) - 1 : 0;
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
      if (there && j < rows && !Weight::is_sound(request.masks[j], p.block_cols - inside)) faulty |= 1u << j;
      stage.masks[j][lane] = request.masks[j];
    }
    if (lane == 0) {
      stage.ends = walk.at + kStepPieces >= walk.end;
      if (stage.ends) stage.span = walk.span();
    }
    stage.left[lane] = static_cast<int16_t>(left);
    stage.faulty[lane] = static_cast<uint16_t>(faulty);
  }

 private:
  __device__ __forceinline__ bool aligned() const { return Weight::kMaskBytes == 0 || p.w_aligned; }

  __device__ __forceinline__ void load_masks(Request<Weight>& request, bool aligned) const {
    const uint8_t* source = p.metadata + first_row(request) * p.row_mask_bytes + piece * Weight::kMaskBytes;
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
      if (j < rows) request.masks[j] = Weight::load(p, source, piece, aligned);
      source += 8 * p.row_mask_bytes;
    }
  }

  __device__ __forceinline__ void copy_values(const Request<Weight>& request, Stage<Weight, kRows>& stage, bool aligned) const {
    const uint8_t* source = p.values + first_row(request) * p.row_bytes + piece * kPieceBytes;
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
      if (j < rows) Weight::copy(p, source, piece, stage.values[j][lane], aligned);
      source += 8 * p.row_bytes;
    }
  }

  // The lane's first one, of the rows of all blocks.
  __device__ __forceinline__ int64_t first_row(const Request<Weight>& request) const {
    return request.place * p.block_rows + walk.tile.strip * kTileRows + lane / 4;
  }

  __device__ __forceinline__ int64_t limit() const { return p.index.starts == nullptr ? 1 : p.index.limit; }

  __device__ __forceinline__ void find() {
    if (!walk.more()) return;
    const int64_t pieces = walk.at - walk.tile.begin + lane % 4;
    block = walk.tile.first + pieces / p.row_pieces;
    piece = pieces % p.row_pieces;
    const int64_t inside = walk.tile.strip * kTileRows + lane / 4;
    const int64_t left = min(p.block_rows, p.rows - walk.tile.line * p.block_rows) - inside;
    rows = static_cast<int>(min(max(left + 7, int64_t{0}) / 8, int64_t{kLaneRows}));
  }

  // The lane's columns of its rows of x; zeros from `left` on, and in rows that x does not have.
  __device__ __forceinline__ void copy_x(int64_t column, int left, Stage<Weight, kRows>& stage) const {
#pragma unroll
    for (int i = 0; i < Stage<Weight, kRows>::kTiles; ++i) {
      const int row = 8 * i + lane / 4;
      const Stored* const source = static_cast<const Stored*>(p.x) + (row < p.m && left > 0 ? row * p.cols + column : 0);
#pragma unroll
      for (int k = 0; k < Stage<Weight, kRows>::kXPieces; ++k) {
        const int count = row < p.m ? max(min(left - k * kXColumns, kXColumns), 0) : 0;
        uint4& target = stage.x[i][k][lane];
        if (p.x_aligned) {
          ptx::copy_async_16(&target, source + (count > 0 ? k * kXColumns : 0), count * static_cast<int>(sizeof(Stored)));
        } else {
#pragma unroll
          for (int e = 0; e < kXColumns; ++e) reinterpret_cast<Stored*>(&target)[e] = e < count ? source[k * kXColumns + e] : Stored{0};
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------- products

// What it costs, in instructions of a warp for a step of 2 KB of values (sm_90a, counted in the machine code). Not timed. An H100's memory
// delivers a step in 141 cycles, with metadata in 159, in which a multiprocessor issues 564 or 635 instructions:
//
//                       m = 1     4     8    16
//   blocks, 16 bits       290   290   290   320     x comes from the second cache for each step: m / 32 as many bytes as the values have,
//   blocks, float32       305   355   425   570     2:4 m / 16. At 16 rows that is the limit of 2:4 in 16 bits, 1.15 times the memory's
//   2:4, 16 bits          490   490   490   540     time; that of 2:4 in float32 are instructions from 4 rows on.
//   2:4, float32          550   655   790  1060
//
// Next to that, two launches and the loads that wait for each other (starts, positions, values; then sums): some 4 us for any weight.

template <class Weight, int kRows>
__device__ __forceinline__ void multiply_step(const Stage<Weight, kRows>& stage, int lane,
                                              typename Arithmetic<Weight::kDtype, kRows>::Sums& sums) {
  using A = Arithmetic<Weight::kDtype, kRows>;
  constexpr int kQuads = Weight::kColumns / 4;
  typename A::Quad quads[kLaneRows][kQuads];
#pragma unroll
  for (int j = 0; j < kLaneRows; ++j) Weight::expand(stage.values[j][lane], stage.masks[j][lane], quads[j]);
  const int left = stage.left[lane];
  if (left < Weight::kColumns) {
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
#pragma unroll
      for (int u = 0; u < kQuads; ++u) A::mask(quads[j][u], left - 4 * u);
    }
  }
#pragma unroll
  for (int u = 0; u < kQuads; ++u) {
    constexpr int kQuadBytes = 4 * sizeof(typename Element<Weight::kDtype>::Stored);
    constexpr int kXQuads = kPieceBytes / kQuadBytes;  // of a piece of x
    const uint8_t* const x = reinterpret_cast<const uint8_t*>(stage.x[0][u / kXQuads]) + u % kXQuads * kQuadBytes;
    typename A::Quad rows[kLaneRows];
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) rows[j] = quads[j][u];
    A::multiply(sums, rows, x, sizeof(stage.x[0]), lane);
  }
}

// y of a row of a tile and row i of x. Does nothing for rows that W does not have.
template <LinearDtype kDtype>
__device__ __forceinline__ void write(const Stream& p, const Tile& tile, int tile_row, int i, float sum) {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  const int64_t inside = tile.strip * kTileRows + tile_row, row = tile.line * p.block_rows + inside;
  if (inside >= p.block_rows || row >= p.rows) return;
  const float bias = p.bias == nullptr ? 0.0f : E::widen(static_cast<const Stored*>(p.bias)[row]);
  static_cast<Stored*>(p.y)[i * p.rows + row] = E::narrow(is_proven(p.fault) ? sum + bias : not_a_number());
}

// ---------------------------------------------------------------------------------------------------------------- the kernels

// What a warp has of a tile: its sums go to a part and, if the warp has done the whole tile, to y.
template <class Weight, int kRows>
__device__ __forceinline__ void finish(const Stream& p, const Span& span, uint32_t faulty,
                                       const typename Arithmetic<Weight::kDtype, kRows>::Sums& sums, int lane,
                                       WarpMemory<Weight, kRows>& own) {
  faulty |= __shfl_xor_sync(kAllLanes, faulty, 1);
  faulty |= __shfl_xor_sync(kAllLanes, faulty, 2);
  Part<kRows>& part = own.parts[span.begins ? 1 : 0];
  Arithmetic<Weight::kDtype, kRows>::deliver(sums, lane, [&](float sum, int i, int j) { part.sums[i][lane / 4 + 8 * j] = sum; });
  const bool is_faulty = (__shfl_sync(kAllLanes, faulty, 4 * (lane % 8)) >> (lane / 8) & 1) != 0;
  __syncwarp();
  for (int i = 0; i < p.m; ++i) {
    float& sum = part.sums[i][lane];
    sum = is_faulty ? not_a_number() : Weight::settle(p, span, lane, i, sum);
    if (span.whole) write<Weight::kDtype>(p, span.tile, lane, i, sum);
  }
  if (lane == 0) {
    part.tile = span.tile;
    part.kept = !span.whole;
  }
}

// The tiles of a warp: those that it does alone are written to y, the sums of others to its parts.
template <class Weight, int kRows>
__device__ __forceinline__ void stream_tiles(const Stream& p, const Walk& walk, int lane, WarpMemory<Weight, kRows>& own) {
  constexpr int kStages = WarpMemory<Weight, kRows>::kStages;
  const auto turn = [](int& stage) { stage = stage == kStages - 1 ? 0 : stage + 1; };
  if (lane == 0) own.parts[0].kept = own.parts[1].kept = false;
  Reader<Weight, kRows> reader(p, walk, lane);
  Request<Weight> request = reader.request();
  typename Arithmetic<Weight::kDtype, kRows>::Sums sums{};
  uint32_t faulty = 0;
  int filled = 0, used = 0;  // stages
  int pending = 0;           // steps between them
  for (int ahead = 1;; ++ahead) {
    if (reader.walk.more()) {
      reader.copy(request, own.stages[filled]);
      turn(filled);
      ++pending;
      reader.advance();
      request = reader.request();
    }
    ptx::copy_async_commit();
    if (ahead < kStages) continue;
    if (pending-- == 0) break;
    ptx::copy_async_wait<kStages - 1>();
    __syncwarp();
    const Stage<Weight, kRows>& stage = own.stages[used];
    multiply_step<Weight, kRows>(stage, lane, sums);
    faulty |= stage.faulty[lane];
    if (stage.ends) {
      finish<Weight, kRows>(p, stage.span, faulty, sums, lane, own);
      sums = {};
      faulty = 0;
    }
    turn(used);
    __syncwarp();  // before the stage is filled again
  }
}

// The sum with row i of x of a tile that warps of the threadblock share, `warp` being the first of these: its part, then those of the next.
template <class Weight, int kRows>
__device__ __forceinline__ void add_parts(const Stream& p, const WarpMemory<Weight, kRows>* warps, const Share& share, int warp,
                                          const Part<kRows>& part, int i, int lane) {
  float sum = part.sums[i][lane];
  for (int next = warp + 1; next < p.warps; ++next) {
    const Share other = share_of(p, share, next);
    if (other.begin >= min(part.tile.end, other.end)) break;
    sum += warps[next].parts[0].sums[i][lane];
  }
  const bool begins = part.tile.begin >= share.begin;
  if (begins && part.tile.end <= share.end) {
    write<Weight::kDtype>(p, part.tile, lane, i, sum);
  } else {
    p.partials[((2 * int64_t{blockIdx.x} + begins) * kRows + i) * kTileRows + lane] = sum;
  }
}

// Are all lines' starts in order? All threads of the block ask.
__device__ __forceinline__ bool is_in_order(const Stream& p) {
  bool sound = true;
  for (int64_t line = threadIdx.x; line < p.index.lines; line += blockDim.x) sound &= line_of(p, line).sound;
  return __syncthreads_and(sound) != 0;
}

template <class Weight, int kRows>
__global__ __launch_bounds__(kMostWarps<Weight, kRows>* kLanes, 1) void stream(const __grid_constant__ Stream p) {
  WarpMemory<Weight, kRows>* const warps = ptx::dynamic_shared<WarpMemory<Weight, kRows>>();
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const Share share = share_of(p, blockIdx.x), own = share_of(p, share, warp);
  const bool in_order = is_in_order(p);
  stream_tiles<Weight, kRows>(p, Walk(p, in_order, own, warp * p.deal.blocks + blockIdx.x), lane, warps[warp]);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.in_order = in_order;
  __syncthreads();
  for (int at = warp; at < 2 * p.warps * p.m; at += p.warps) {
    const int first = at / (2 * p.m), which = at / p.m % 2;
    const bool begins = which == 1 || first == 0;  // the tile, as far as the threadblock is concerned
    if (begins && warps[first].parts[which].kept) add_parts(p, warps, share, first, warps[first].parts[which], at % p.m, lane);
  }
}

constexpr int kJoinThreads = 128;

// What `stream` has left of y: tiles that several threadblocks share, lines without blocks, and faulty starts. A block does one row of x.
template <LinearDtype kDtype, int kRows>
__global__ __launch_bounds__(kJoinThreads) void join(const __grid_constant__ Stream p) {
  const int64_t row = int64_t{blockIdx.x} * kJoinThreads + threadIdx.x;
  if (row >= p.rows) return;
  const int64_t number = row / p.block_rows, inside = row % p.block_rows;
  const int tile_row = static_cast<int>(inside % kTileRows), i = static_cast<int>(blockIdx.y);
  const Line line = line_of(p, number);
  const bool in_order = *p.in_order != 0;
  const Tile tile = tile_of(p, number, inside / kTileRows, line, in_order);
  if (tile.begin == tile.end) write<kDtype>(p, tile, tile_row, i, line.sound ? 0.0f : not_a_number());
  if (tile.begin == tile.end || !in_order) return;
  const int64_t first = p.deal.block_of(tile.begin / kStepPieces), last = p.deal.block_of((tile.end - 1) / kStepPieces);
  if (first == last) return;
  float sum = 0;
  for (int64_t threadblock = first; threadblock <= last; ++threadblock)
    sum += p.partials[((2 * threadblock + (threadblock == first)) * kRows + i) * kTileRows + tile_row];
  write<kDtype>(p, tile, tile_row, i, sum);
}

// ---------------------------------------------------------------------------------------------------------------- launching

template <class Weight, int kRows>
cudaError_t launch_stream(Stream p, const Device& device, void* workspace, cudaStream_t stream_of_work) {
  const int64_t fit = device.shared_bytes / int64_t{sizeof(WarpMemory<Weight, kRows>)};
  p.warps = static_cast<int>(fit < kMostWarps<Weight, kRows> ? fit : kMostWarps<Weight, kRows>);
  if (p.warps == 0) return cudaErrorInvalidConfiguration;
  const int64_t steps = (p.pieces + kStepPieces - 1) / kStepPieces;
  p.deal = {0, steps, steps == 0 ? 1 : steps < device.multiprocessors ? steps : device.multiprocessors};
  p.in_order = static_cast<uint32_t*>(workspace);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(workspace) + kFlagBytes);
  const int64_t shared_bytes = int64_t{sizeof(WarpMemory<Weight, kRows>)} * p.warps;
  const LaunchSize size{p.deal.blocks, p.warps * kLanes, shared_bytes, device.shared_bytes};
  const cudaError_t error = launch_kernel(stream<Weight, kRows>, size, stream_of_work, p);
  if (error != cudaSuccess) return error;
  return launch_kernel(join<Weight::kDtype, kRows>, {blocks_across(p.rows, kJoinThreads), kJoinThreads, 0, 0, p.m}, stream_of_work, p);
}

inline int64_t stream_workspace_bytes(int64_t m, const Device& device) {
  const int64_t rows = m <= 8 ? 8 : kMostStreamRows;
  return kFlagBytes + int64_t{device.multiprocessors} * 2 * rows * kTileRows * static_cast<int64_t>(sizeof(float));
}

// Weight<kDtype>  the kind of W
template <template <LinearDtype> class Weight>
cudaError_t launch_stream(const Stream& p, LinearDtype dtype, const Device& device, void* workspace, cudaStream_t stream_of_work) {
  if (p.rows == 0 || p.m == 0) return cudaSuccess;
  const auto run = dtype == kBfloat16  ? p.m <= 8 ? launch_stream<Weight<kBfloat16>, 8> : launch_stream<Weight<kBfloat16>, 16>
                   : dtype == kFloat16 ? p.m <= 8 ? launch_stream<Weight<kFloat16>, 8> : launch_stream<Weight<kFloat16>, 16>
                   : p.m == 1          ? launch_stream<Weight<kFloat32>, 1>
                   : p.m == 2          ? launch_stream<Weight<kFloat32>, 2>
                   : p.m <= 4          ? launch_stream<Weight<kFloat32>, 4>
                   : p.m <= 8          ? launch_stream<Weight<kFloat32>, 8>
                                       : launch_stream<Weight<kFloat32>, 16>;
  return run(p, device, workspace, stream_of_work);
}

}  // namespace bitmask::cuda::streaming
