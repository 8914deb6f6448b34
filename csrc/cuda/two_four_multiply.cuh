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
constexpr int kPieceColumns = 16;                      // whose codes a lane brings
constexpr int kValueBytes = 8;                         // for a byte of metadata
constexpr int kMetadataRow = 2 * kChunkColumns / 8;    // bytes of a row in a stage
constexpr int kValueRow = kMetadataRow * kValueBytes;  // likewise
constexpr int kXRow = 2 * kChunkColumns * 2;           // likewise

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

// What the kernels are told. Columns fit in 32 bits, so does a block's metadata.
struct TwoFourProduct {
  TwoFourParams params;
  int cols, block_cols;
  int chunks;               // that cover a row of a block
  int pieces;               // of kPieceColumns, of such a row
  int64_t row_bytes;        // of its metadata; values take kValueBytes as many
  int block_bytes;          // of a block's metadata, if there are blocks
  bool words_aligned;       // metadata of chunks, to 4 bytes
  bool y_aligned;           // its rows, to 16 bytes
  int64_t row_tiles;        // of a line
  int64_t x_tiles;          // of x
  const int32_t* schedule;  // [lines]: in which order they are dealt; null: any will do
  Deal deal;                // blocks: a tile is one stage, however long its line may be
  Join join;
};

// Rows of W times rows of x, and the whole line or, without blocks, all of W's columns.
struct TwoFourTile {
  int64_t line;
  int64_t row;    // in each block of the line, the first one
  int64_t x_row;  // of x, the first one
  int rows;       // that the blocks have of those of the tile; they may be past W
  int x_rows;     // that x has

  __device__ __forceinline__ int64_t row_of_w(const TwoFourProduct& p) const { return line * p.params.block_rows + row; }
};

// How a threadblock's tile is divided among its warps, and how it lies in shared memory.
//
// kTileRows   rows of W
// kTileXRows  rows of x
template <int kTileRows, int kTileXRows>
struct Tiling {
  static constexpr int kRows = kTileRows, kXRows = kTileXRows;
  static constexpr int kFragments = kRows == 16 ? 1 : kRows * kXRows <= 128 * 128 ? 2 : 4;  // rows of W that a warp takes, in sixteens
  static constexpr int kXWarps = kThreads / 32 / (kRows / 16 / kFragments);                 // that share these rows
  static constexpr int kTiles = kXRows / kXWarps / 8;                                       // rows of x that a warp takes, in eights
  static constexpr int kYStride = kRows + 8;  // of y's rows in shared memory, elements: keeps stores in different banks

  struct Stage {
    uint8_t values[kRows * kValueRow];
    uint8_t x[kXRows * kXRow];
    uint8_t metadata[kRows * kMetadataRow];
  };
  struct Shared {
    Stage stages[kStages];
  };
  static_assert(kXRows * kYStride * sizeof(uint16_t) <= sizeof(Shared), "a tile of y lies where the stages did");

  static __device__ __forceinline__ TwoFourTile tile_of(const TwoFourProduct& p, int64_t index) {
    const int64_t row = index / p.x_tiles % p.row_tiles * kRows, x_row = index % p.x_tiles * kXRows;
    const int64_t rows = p.params.block_rows - row, x_rows = p.params.m - x_row;
    const int64_t rank = index / p.x_tiles / p.row_tiles, line = p.schedule == nullptr ? rank : p.schedule[rank];
    return {line, row, x_row, static_cast<int>(rows < kRows ? rows : kRows), static_cast<int>(x_rows < kXRows ? x_rows : kXRows)};
  }
};

// ---------------------------------------------------------------------------------------------------------------- copying

// Of what is `bytes` past the beginning of an array, which may be null where it has no elements.
__device__ __forceinline__ uintptr_t address(const void* array, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(array) + static_cast<uintptr_t>(bytes);
}

// The bytes of a chunk's metadata in a row, at most four.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bytes, int count, bool aligned) {
  if (aligned) return *reinterpret_cast<const uint32_t*>(bytes);
  uint32_t word = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(i < count ? bytes[i] : 0) << (8 * i);
  return word;
}

// What a thread copies: its chunk of every stage of a tile, a piece each of some rows of it.
//
// T  the tiling
template <class T>
struct Copier {
  using Stage = typename T::Stage;
  static constexpr int kRowsOfX = kThreads / 8;  // that all threads copy at a time
  static constexpr int kRowsOfW = kThreads / 4;
  static constexpr int kRowsOfMetadata = kThreads / 2;
  static constexpr int kWords = (T::kRows + kRowsOfMetadata - 1) / kRowsOfMetadata;

  const TwoFourProduct& p;
  const int64_t* positions;     // of the line's blocks; null if W is one block
  uintptr_t x;                  // address: where the thread's first piece is, in the first columns of W
  uintptr_t values;             // in the first block of the line
  uintptr_t metadata;           // likewise
  int rows, x_rows;             // of the tile
  int blocks;                   // of the line
  int block, part;              // the chunk that comes next: in which block it is, which one of it
  int position;                 // where that block is
  uint32_t words[kWords] = {};  // of metadata, on their way

  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int chunk() { return thread() % 2; }        // of a stage
  static __device__ __forceinline__ int quarter() { return thread() / 2 % 4; }  // of a chunk of x
  static __device__ __forceinline__ int half() { return thread() / 2 % 2; }     // of a chunk of values
  static __device__ __forceinline__ int row_of_x() { return thread() / 8; }
  static __device__ __forceinline__ int row_of_w() { return thread() / 4; }
  static __device__ __forceinline__ int row_of_metadata() { return thread() / 2; }

  // From a stage on. The line has been proven.
  __device__ __forceinline__ Copier(const TwoFourProduct& p, const TwoFourTile& tile, const BlockLine& line, int stage)
      : p(p),
        positions(p.params.has_blocks() ? p.params.index.positions + line.begin : nullptr),
        rows(tile.rows),
        x_rows(tile.x_rows),
        blocks(static_cast<int>(line.end - line.begin)),
        block((2 * stage + chunk()) / p.chunks),
        part((2 * stage + chunk()) % p.chunks) {
    const int64_t row = line.begin * p.params.block_rows + tile.row;
    x = ptx::opaque(address(p.params.x, (tile.x_row + row_of_x()) * p.params.cols * 2 + 16 * quarter()));
    values = ptx::opaque(address(p.params.values, (row + row_of_w()) * p.row_bytes * kValueBytes + 16 * half()));
    metadata = ptx::opaque(address(p.params.metadata, (row + row_of_metadata()) * p.row_bytes));
    find();
  }

  __device__ __forceinline__ void find() { position = positions != nullptr && block < blocks ? static_cast<int>(positions[block]) : 0; }

  // Asks for a stage. Past the edges of W there are zeros; where there are no rows there is anything. Metadata are brought to registers.
  __device__ __forceinline__ void copy(Stage& stage) {
    const int col = position * p.block_cols + part * kChunkColumns, left = block < blocks ? p.cols - col : 0;
    const int64_t before = static_cast<int64_t>(block) * p.block_bytes + 4 * part;  // bytes of metadata, before the chunk's
    copy_x(stage, col, left);
    copy_values(stage, before, left);
    if (block < blocks) load_words(before);
    for (part += 2; part >= p.chunks; part -= p.chunks) {
      ++block;
      if (part < 2 * p.chunks) find();
    }
  }

  // `left`: columns of W from `col` on. Where there is none, no address is read.
  __device__ __forceinline__ void copy_x(Stage& stage, int col, int left) const {
    const int bytes = 8 * quarter() < left ? 16 : 0;
    uintptr_t src = x + static_cast<uintptr_t>(2 * static_cast<int64_t>(col));
    uint8_t* dst = stage.x;
    dst += row_of_x() * kXRow + ((4 * chunk() + quarter()) ^ row_of_x() % 8) * 16;
#pragma unroll
    for (int i = 0; i < T::kXRows; i += kRowsOfX) {
      if (row_of_x() + i < x_rows) ptx::copy_async_16(dst + i * kXRow, reinterpret_cast<const void*>(src), bytes);
      src += static_cast<uintptr_t>(2 * kRowsOfX * p.params.cols);
    }
  }

  __device__ __forceinline__ void copy_values(Stage& stage, int64_t before, int left) const {
    const int columns = left - kPieceColumns * half();
    const int bytes = columns <= 0 ? 0 : columns < kPieceColumns ? columns : 16;  // two bytes for two columns
    uintptr_t src = values + static_cast<uintptr_t>(kValueBytes * before);
    uint8_t* dst = stage.values;
    dst += row_of_w() * kValueRow + ((2 * chunk() + half()) ^ row_of_w() / 2 % 4) * 16;
#pragma unroll
    for (int i = 0; i < T::kRows; i += kRowsOfW) {
      if (row_of_w() + i < rows) ptx::copy_async_16(dst + i * kValueRow, reinterpret_cast<const void*>(src), bytes);
      src += static_cast<uintptr_t>(kRowsOfW * kValueBytes * p.row_bytes);
    }
  }

  __device__ __forceinline__ void load_words(int64_t before) {
    const int count = static_cast<int>(p.row_bytes) - 4 * part;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (row_of_metadata() + i * kRowsOfMetadata >= rows) continue;
      const uintptr_t src = metadata + static_cast<uintptr_t>(before + i * kRowsOfMetadata * p.row_bytes);
      words[i] = load_word(reinterpret_cast<const uint8_t*>(src), count, p.words_aligned);
    }
  }

  // Stores the metadata of the stage that was asked for last.
  __device__ __forceinline__ void keep(Stage& stage) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int row = row_of_metadata() + i * kRowsOfMetadata;
      if (row < T::kRows) *reinterpret_cast<uint32_t*>(stage.metadata + row * kMetadataRow + 4 * chunk()) = words[i];
    }
  }
};

}  // namespace bitmask::cuda
