// A 2:4 W and x in shared memory, a stage of 64 columns at a time, and metadata as mma.sp takes them.
//
// A stage is two chunks of 32 columns, each in a block of its own if need be: a chunk is where its values, its metadata and its columns of
// x begin. Even threads copy the first chunk of every stage, odd ones the second.
//
//   of a row           chunk 0               chunk 1
//   values, bytes      |0 ......... 31|      |32 ........ 63|     pieces of 16, swizzled: ldmatrix reads one piece of 8 rows, which
//   x, bytes           |0 ......... 63|      |64 ....... 127|     must lie in different banks
//   metadata, bytes    |t = 0 | t = 1 |      |t = 2 | t = 3 |     by the lane (t = lane % 4) that brings these 16 columns' codes
#pragma once

#include <ptx.cuh>

#include <cstdint>

#include "block_lines.cuh"
#include "deal.cuh"

namespace bitmask::cuda {

constexpr int kThreads = 256;
constexpr int kStages = 3;  // two are on their way while one is multiplied
constexpr int kChunkColumns = 32;
constexpr int kPieceColumns = 16;  // whose codes a lane brings

// ---------------------------------------------------------------------------------------------------------------- metadata

constexpr uint32_t kSoundGroups = 0x33333333;  // any will do

// Nibbles that are not zero are groups without exactly two bits.
__device__ __forceinline__ uint32_t faults_of(uint32_t bits) {
  const uint32_t pairs = bits - (bits >> 1 & 0x55555555);
  return ((pairs & 0x33333333) + (pairs >> 2 & 0x33333333)) ^ 0x22222222;
}

// The bits with sound groups in place of those that are faulty.
__device__ __forceinline__ uint32_t repair(uint32_t bits, uint32_t faults) {
  const uint32_t faulty = ((faults | faults >> 1 | faults >> 2) & 0x11111111) * 15;
  return (bits & ~faulty) | (kSoundGroups & faulty);
}

// Eight codes of eight sound groups, all at a time: of each nibble the lower column that is set in the lower two bits, the higher one
// above.
__device__ __forceinline__ uint32_t codes_of(uint32_t bits) {
  constexpr uint32_t kOnes = 0x11111111;
  const uint32_t bits1 = bits >> 1, bits2 = bits >> 2, bits3 = bits >> 3;
  const uint32_t low0 = ~bits & bits1 & kOnes;      // the lower column is 1
  const uint32_t low1 = ~bits & ~bits1 & kOnes;     // it is 2
  const uint32_t high0 = (bits3 | ~bits2) & kOnes;  // the higher one is 1 or 3
  const uint32_t high1 = (bits3 | bits2) & kOnes;   // it is 2 or 3
  return low0 | low1 << 1 | high0 << 2 | high1 << 3;
}

// ---------------------------------------------------------------------------------------------------------------- the work

// What the kernels are told.
struct Product {
  TwoFourParams params;
  int64_t row_bytes;   // of the metadata of a row of a block
  int64_t chunks;      // that cover such a row
  int64_t pieces;      // of kPieceColumns, of such a row
  bool words_aligned;  // metadata of chunks, to 4 bytes
  bool y_aligned;      // its rows, to 16 bytes
  int64_t row_tiles;   // of a line
  int64_t x_tiles;     // of x
  Deal deal;           // blocks: a tile is one stage, however long its line may be
  Join join;
};

// Rows of W times rows of x, and the whole line or, without blocks, all of W's columns.
struct Tile {
  int64_t line;
  int64_t row;    // in each block of the line, the first one
  int64_t x_row;  // the first one

  int64_t rows;    // in the blocks, from the first one on
  int64_t x_rows;  // likewise

  __device__ __forceinline__ int64_t row_of_w(const Product& p) const { return line * p.params.block_rows + row; }
};

// How a threadblock's tile is divided among its warps.
template <int kTileRows, int kTileXRows>
struct Tiling {
  static constexpr int kRows = kTileRows;    // of W
  static constexpr int kXRows = kTileXRows;  // of x
  static constexpr int kRowWarps = kRows <= 64 ? 1 : kRows / 64;
  static constexpr int kXWarps = kThreads / 32 / kRowWarps;
  static constexpr int kFragments = kRows / kRowWarps / 16;  // rows of W that a warp takes, in sixteens
  static constexpr int kTiles = kXRows / kXWarps / 8;        // rows of x that it takes, in eights
  static constexpr int kYStride = kRows + 8;                 // of y's rows in shared memory, elements: keeps stores in different banks

  struct Stage {
    uint8_t values[kRows][64];
    uint8_t x[kXRows][128];
    uint8_t metadata[kRows][8];
  };
  struct Shared {
    Stage stages[kStages];
  };
  static_assert(kXRows * kYStride * sizeof(uint16_t) <= sizeof(Shared), "a tile of y lies where the stages did");

  static __device__ __forceinline__ Tile tile_of(const Product& p, int64_t index) {
    const int64_t row = index / p.x_tiles % p.row_tiles * kRows, x_row = index % p.x_tiles * kXRows;
    return {index / p.x_tiles / p.row_tiles, row, x_row, p.params.block_rows - row, p.params.m - x_row};
  }
};

// ---------------------------------------------------------------------------------------------------------------- copying

// The bytes of a chunk's metadata in a row, at most four.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bytes, int64_t count, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint32_t*>(bytes);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(i < count ? bytes[i] : 0) << (8 * i);
  return word;
}

// What a thread copies: its chunk of every stage of a tile, some pieces of some rows of it.
template <class T>
struct Copier {
  static constexpr int kWords = (T::kRows + 127) / 128;  // of metadata
  using Stage = typename T::Stage;

  const Product& p;
  const Tile& tile;
  const BlockLine& line;
  int64_t block, part, position;  // of the chunk that comes next: in which block, which one of it, where that block is
  bool sound = true;              // the blocks of the chunks so far
  uint32_t words[kWords] = {};    // of metadata, on their way

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int chunk() { return thread() % 2; }  // of a stage

  __device__ __forceinline__ Copier(const Product& p, const Tile& tile, const BlockLine& line, int64_t stage)
      : p(p), tile(tile), line(line), block(line.begin + (2 * stage + chunk()) / p.chunks), part((2 * stage + chunk()) % p.chunks) {
    find();
  }

  __device__ __forceinline__ void find() { position = p.params.has_blocks() && block < line.end ? p.params.index.positions[block] : 0; }

  // Asks for a stage. Past the edges of W there are zeros; where there are no rows there is anything. Metadata are brought to registers.
  __device__ __forceinline__ void copy(Stage& stage) {
    const bool inside = block < line.end, there = inside && (!p.params.has_blocks() || line.holds(p.params.index, block, position));
    sound = sound && there == inside;
    const int64_t col = there ? position * p.params.block_cols + part * kChunkColumns : p.params.cols;
    const int left = static_cast<int>(p.params.cols - col < kChunkColumns ? p.params.cols - col : kChunkColumns);
    copy_x(stage, col, left);
    copy_values(stage, left);
    load_words(there);
    for (part += 2; part >= p.chunks; part -= p.chunks) {
      ++block;
      if (part < 2 * p.chunks) find();
    }
  }

  // `left`: columns of W.
  __device__ __forceinline__ void copy_x(Stage& stage, int64_t col, int left) const {
    constexpr int kStep = kThreads / 8;  // rows that all threads copy at a time
    const int quarter = thread() / 2 % 4, row = thread() / 8;
    const int bytes = 8 * quarter < left ? 16 : 0;
    const uint16_t* src =
        static_cast<const uint16_t*>(p.params.x) + (tile.x_row + row) * p.params.cols + (bytes > 0 ? col + 8 * quarter : 0);
    uint8_t* const dst = stage.x[row] + ((4 * chunk() + quarter) ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < T::kXRows; i += kStep) {
      if (row + i < tile.x_rows) ptx::copy_async_16(dst + i * sizeof(stage.x[0]), src, bytes);
      src += kStep * p.params.cols;
    }
  }

  __device__ __forceinline__ void copy_values(Stage& stage, int left) const {
    constexpr int kStep = kThreads / 4;
    const int half = thread() / 2 % 2, row = thread() / 4, columns = left - kPieceColumns * half;
    const int bytes = columns <= 0 ? 0 : columns < kPieceColumns ? columns : 16;  // two bytes for two columns
    const int64_t stride = p.params.block_cols / 2;
    const int64_t first = ((block * p.params.block_rows + tile.row + row) * stride + part * (kChunkColumns / 2) + 8 * half);
    const uint16_t* src = static_cast<const uint16_t*>(p.params.values) + (bytes > 0 ? first : 0);
    uint8_t* const dst = stage.values[row] + ((2 * chunk() + half) ^ row / 2 % 4) * 16;
#pragma unroll
    for (int i = 0; i < T::kRows; i += kStep) {
      if (row + i < T::kRows && row + i < tile.rows) ptx::copy_async_16(dst + i * sizeof(stage.values[0]), src, bytes);
      src += kStep * stride;
    }
  }

  __device__ __forceinline__ void load_words(bool there) {
    const int row = thread() / 2;
    const uint8_t* src = p.params.metadata + (block * p.params.block_rows + tile.row + row) * p.row_bytes + 4 * part;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (there && row + 128 * i < T::kRows && row + 128 * i < tile.rows)
        words[i] = load_word(src + 128 * i * p.row_bytes, p.row_bytes - 4 * part, p.words_aligned);
    }
  }

  // Stores the metadata of the stage that was asked for last.
  __device__ __forceinline__ void keep(Stage& stage) const {
    const int row = thread() / 2;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (row + 128 * i < T::kRows) *reinterpret_cast<uint32_t*>(stage.metadata[row + 128 * i] + 4 * chunk()) = words[i];
    }
  }
};

}  // namespace bitmask::cuda
