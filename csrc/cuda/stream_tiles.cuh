// How the values of a weight, whatever its blocks hold, are dealt to warps as one stream of bytes.
//
//   piece   16 bytes of the values of a row of a block
//   tile    32 rows of a line of blocks, all pieces of each; a strip is the same of one block
//   step    4 pieces of each of these rows
//
//   tiles   |--------|--------|--|--|--------------|    the pieces of all tiles are counted through, line by line, strip by strip: a share
//   warps   0     1     2     3     4     5     6       begins and ends anywhere in a tile
//
// If the lines' starts are out of order then pieces cannot be counted through, and the warps take whole tiles by turns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "block_lines.cuh"
#include "deal.cuh"
#include "kernels.h"

namespace bitmask::cuda::streaming {

constexpr int kTileRows = 32;  // of W
constexpr int kLaneRows = 4;   // of these
constexpr int kStepPieces = 4;
constexpr int kPieceBytes = 16;

// What the kernels are told.
struct Stream {
  BlockIndex index;  // starts are null where W is one block
  const uint8_t* values;
  const uint8_t* metadata;  // null unless the values are 2:4
  int64_t rows, cols, block_rows, block_cols;
  const void* x;
  const void* bias;
  void* y;
  int m;
  const Fault* fault;
  bool x_aligned;  // pieces of its rows, to 16 bytes
  bool w_aligned;  // the same of W, and metadata to what a piece has of them; only if the values are 2:4

  int64_t row_pieces, row_bytes, row_mask_bytes;  // of the values and the metadata of a row of a block
  int64_t strips;                                 // tiles that a line is cut into
  int64_t pieces;                                 // of all tiles
  Deal deal;                                      // their steps, to threadblocks
  int warps;                                      // of a threadblock
  float* partials;     // [threadblocks][2][kRows][kTileRows]: of the tile that it has not begun, and of the one that it does not end
  uint32_t* in_order;  // whether the lines' starts are
};

// Pieces of all tiles: what a threadblock takes, or a warp of it.
struct Share {
  int64_t begin, end;
};

__device__ __forceinline__ Share share_of(const Stream& p, int64_t threadblock) {
  return {min(p.deal.begin(threadblock) * kStepPieces, p.pieces), min(p.deal.begin(threadblock + 1) * kStepPieces, p.pieces)};
}

__device__ __forceinline__ Share share_of(const Stream& p, const Share& threadblock, int warp) {
  const Deal deal{1, (threadblock.end - threadblock.begin + kStepPieces - 1) / kStepPieces, p.warps};
  return {min(threadblock.begin + deal.begin(warp) * kStepPieces, threadblock.end),
          min(threadblock.begin + deal.begin(warp + 1) * kStepPieces, threadblock.end)};
}

// ---------------------------------------------------------------------------------------------------------------- tiles

struct Line {
  int64_t first, blocks;
  bool sound;
};

__device__ __forceinline__ Line line_of(const Stream& p, int64_t line) {
  if (p.index.starts == nullptr) return {0, 1, true};
  const BlockLine walk(p.index, line);
  return {walk.begin, walk.end - walk.begin, walk.sound};
}

struct Tile {
  int64_t line, strip;
  int64_t first;       // block of the line
  int64_t begin, end;  // pieces: of all tiles, one after the other or, if starts are out of order, of this one
};

__device__ __forceinline__ Tile tile_of(const Stream& p, int64_t line, int64_t strip, const Line& blocks, bool in_order) {
  const int64_t pieces = blocks.blocks * p.row_pieces;
  const int64_t begin = in_order ? blocks.first * p.row_pieces * p.strips + strip * pieces : 0;
  return {line, strip, blocks.first, begin, begin + pieces};
}

// The tile that has a piece, of lines that are in order: the last one that starts at or before its block.
__device__ inline Tile tile_with(const Stream& p, int64_t piece) {
  const int64_t block = piece / (p.row_pieces * p.strips);
  int64_t line = 0;
  if (p.index.starts != nullptr) {
    for (int64_t end = p.index.lines; line + 1 < end;) {
      const int64_t middle = line + (end - line) / 2;
      (p.index.starts[middle] <= block ? line : end) = middle;
    }
  }
  const Line blocks = line_of(p, line);
  const int64_t strip = (piece - blocks.first * p.row_pieces * p.strips) / (blocks.blocks * p.row_pieces);
  return tile_of(p, line, strip, blocks, true);
}

// What a warp does of a tile.
struct Span {
  Tile tile;
  int64_t begin, end;  // pieces
  bool begins, whole;  // the tile: none of it, or nothing but it, is done by another warp
};

// A warp's way through its share, tile by tile.
struct Walk {
  const Stream& p;
  bool in_order;
  int64_t last;    // in order: where the share ends
  int64_t number;  // otherwise that of the tile
  Tile tile;
  int64_t begin, at, end;  // the warp's pieces of the tile; those from `at` on are left

  // `warp`: of all warps, that are to take whole tiles by turns.
  __device__ __forceinline__ Walk(const Stream& params, bool ordered, const Share& share, int64_t warp)
      : p(params), in_order(ordered), last(share.end), number(warp), tile{}, begin(0), at(0), end(0) {
    if (!in_order) {
      number -= p.deal.blocks * p.warps;
      advance();
    } else if (share.begin < share.end) {
      enter(share.begin);
    }
  }

  __device__ __forceinline__ bool more() const { return at < end; }
  __device__ __forceinline__ Span span() const { return {tile, begin, end, begin == tile.begin, begin == tile.begin && end == tile.end}; }

  // To the next tile that has pieces, if there is one.
  __device__ __forceinline__ void advance() {
    at = end;
    if (in_order) {
      if (tile.end < last) enter(tile.end);
      return;
    }
    while (at >= end) {
      number += p.deal.blocks * p.warps;
      if (number >= p.index.lines * p.strips) return;
      const int64_t line = number / p.strips;
      tile = tile_of(p, line, number % p.strips, line_of(p, line), false);
      begin = at = tile.begin;
      end = tile.end;
    }
  }

 private:
  __device__ __forceinline__ void enter(int64_t piece) {
    tile = tile_with(p, piece);
    begin = at = piece;
    end = min(tile.end, last);
  }
};

}  // namespace bitmask::cuda::streaming
