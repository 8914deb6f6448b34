// The table of CPU kernels: plain pointers and sizes, one table per instruction set (isa_<name>.cpp fills it), one chosen at run time
// (dispatch.cpp). Kernels are single-threaded, allocate nothing and throw nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layout.h"
#include "../two_four_patterns.h"

namespace bitmask::cpu {

// Compress and decompress for one element width. `dense` is row-major [rows, cols]; `bitmasks` is [rows, bitmask_bytes(cols)].
struct CodecKernels {
  // Writes every row of `bitmasks` (padding bits zero) and the number of its set bits to `counts` [rows].
  void (*build_bitmasks)(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* counts);

  // Writes the elements marked in `bitmasks`, in order, to `values`, never past `values` + nnz elements, whatever the bitmasks say.
  void (*pack_values)(const void* dense, const uint8_t* bitmasks, int64_t rows, int64_t cols, void* values, int64_t nnz);

  // Writes every element of `dense`, taking marked ones in order from `values`, never reading past `values` + nnz elements, whatever
  // the bitmasks say.
  void (*expand_values)(const void* values, int64_t nnz, const uint8_t* bitmasks, int64_t rows, int64_t cols, void* dense);
};

// y = x W^T + bias for one dtype of x, W, bias and y, with W [rows, cols] compressed. x [m, cols] is repacked first, once for all rows of
// W, into the lanes that the vector unit multiplies: `group_bytes` for each group of columns of each row of x.
//
// stream and multiply do the rows [begin, end) of W, that is these columns of y [m, rows], and return the first row that is faulty (what
// has been written to y is then worthless), or `end`. `bias` [rows] may be null.
struct LinearKernels {
  int64_t group_bytes;     // of repacked x
  int64_t streaming_rows;  // the most rows of x that stream takes
  int64_t panel_rows;      // rows of x in one panel
  int64_t block_rows;      // the most rows of x that multiply takes; whole panels
  int64_t tile_rows;       // the most rows of W that one call of multiply takes
  int64_t scratch_bytes;   // of multiply, aligned to a cache line

  // Row by row: `lanes` holds `rows` rows of x one after the other.
  void (*pack_rows)(const void* x, int64_t rows, int64_t cols, void* lanes);
  // `panel` interleaves the lanes of `rows` <= panel_rows rows of x; absent rows are zero.
  void (*pack_panel)(const void* x, int64_t rows, int64_t cols, void* panel);

  // For few rows of x: each weight is expanded in registers and multiplied there, so that W is one stream of bytes.
  int64_t (*stream)(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* lanes, int64_t m, const void* bias, void* y);
  // For more rows of x: a tile of W is expanded into the cache, and a register-blocked product reuses it for every row of x.
  int64_t (*multiply)(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* panels, int64_t m, const void* bias, void* y,
                      void* scratch);

  // The gradient of x: y = g W, [m, cols] from g [m, rows], m <= block_rows. Does the columns [begin, end) of W, begin a multiple of a
  // group, and returns the first row whose offsets cannot be, or w.rows. It sees only parts of rows, so the caller proves W; unproven, y is
  // worthless. `readers` is memory of reader_bytes for each row of W.
  int64_t gradient_group_bytes;  // of a row of g in a panel
  int64_t gradient_scratch_bytes;
  int64_t reader_bytes;
  void (*pack_gradient)(const void* g, int64_t m, int64_t rows, void* panel);
  int64_t (*multiply_transposed)(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* panels, int64_t m, void* y, void* readers,
                                 void* scratch);
};

// Products with a block-sparse W [rows, cols] for one dtype. What is multiplied with W is repacked first, once for all blocks that meet it;
// how, only the kernels know. Bytes of packed memory are those of whole cache lines; it is aligned to one, and may be null if there are
// none. The order of `w` is null but for multiply_transposed, its lines may be null but for sample; m > 0 but for sample.
struct BlockKernels {
  // y = x W^T + bias, x [m, cols], y [m, rows], for few rows of x: bound by the bytes of W. Does the lines [begin, end), which are block
  // rows, for m <= streaming_rows. `bias` [rows] may be null. Rows of y begin y_cols elements apart: `w` may be some rows of a larger one.
  int64_t streaming_rows;
  int64_t (*rows_bytes)(int64_t m, int64_t cols, int64_t block_cols);
  void (*pack_rows)(const void* x, int64_t m, int64_t cols, int64_t block_cols, void* rows);
  void (*stream)(const BlockMatrix& w, int64_t begin, int64_t end, const void* rows, int64_t m, const void* bias, void* y, int64_t y_cols,
                 void* scratch);

  // The same for more rows of x, m <= most_rows; and y = g W, g [m, rows], y [m, cols], where lines are block columns. Rows are packed by
  // tiles of tile_rows: those from row i on, i a multiple of tile_rows, begin tiles_bytes(i, cols) bytes after the first.
  int64_t tile_rows;
  int64_t most_rows;  // a multiple of tile_rows
  int64_t (*tiles_bytes)(int64_t m, int64_t cols);
  void (*pack_tiles)(const void* x, int64_t m, int64_t cols, void* tiles);
  void (*multiply)(const BlockMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y,
                   int64_t y_cols, void* scratch);
  void (*multiply_transposed)(const BlockMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, void* y, void* scratch);

  // The kept blocks [begin, end) of g^T x, g [m, rows], x [m, cols], m <= sampled_rows: adds to `earlier`, sums of earlier rows (null:
  // none), and writes `sums` or, if that is null, rounded elements to `values`, zero where a block reaches past W. All three are
  // [blocks][block_rows][block_cols] in the order of the lines, which are block rows. pack_columns packs the blocks [first, last) of
  // columns of x or g, each as wide as the blocks of W are in that direction.
  int64_t sampled_rows;
  int64_t (*columns_bytes)(int64_t m, int64_t cols, int64_t block);
  void (*pack_columns)(const void* x, int64_t m, int64_t cols, int64_t block, int64_t first, int64_t last, void* columns);
  void (*sample)(const BlockMatrix& w, int64_t begin, int64_t end, const void* g_columns, const void* x_columns, int64_t m,
                 const void* earlier, void* sums, void* values);

  int64_t sum_bytes;      // of one unrounded element
  int64_t scratch_bytes;  // of a call of stream, multiply or multiply_transposed, aligned to a cache line
};

// 2:4 for one element width. `dense` is row-major [rows, cols], cols a multiple of 4; `values` is [rows, cols / 2], `metadata`
// [rows, bitmask_bytes(cols)]. Which two of a group with fewer non-zeros are stored, FORMAT.md says.
struct TwoFourCodecKernels {
  // Packs rows whose groups have at most two non-zeros; returns the first row that has another group (what has been written is then
  // worthless), or `rows`.
  int64_t (*pack)(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, void* values, uint8_t* metadata);
  // Packs the two largest magnitudes of each group; of equal ones the first.
  void (*pack_largest)(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, Magnitude magnitude, void* values,
                       uint8_t* metadata);
  // Writes every element of `dense`; returns the first row whose metadata is faulty (what has been written is then worthless), or `rows`.
  int64_t (*unpack)(const void* values, const uint8_t* metadata, int64_t rows, int64_t cols, void* dense);
  // Sets to zero what pack_largest would not store, in place.
  void (*prune)(void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, Magnitude magnitude);
};

// 2:4 products for one dtype: y = x W^T + bias. stream and multiply do the rows [begin, end) of W, that is these columns of y [m, rows],
// and return the first row whose metadata is faulty (what has been written to y is then worthless), or `end`. `bias` [rows] may be null.
struct TwoFourLinearKernels {
  // For few rows of x, m <= streaming_rows, repacked by LinearKernels::pack_rows.
  int64_t streaming_rows;
  int64_t (*stream)(const TwoFourMatrix& w, int64_t begin, int64_t end, const void* lanes, int64_t m, const void* bias, void* y);

  // For more rows of x, m <= most_rows; null where it gains nothing over LinearKernels::multiply, which takes W as a bitmask matrix. Rows
  // are packed by tiles of tile_rows: those from row i on, i a multiple of tile_rows, begin tiles_bytes(i, cols) bytes after the first; the
  // bytes are those of whole cache lines. What W drops is not multiplied, so an infinity or NaN of x that meets it would be lost:
  // pack_tiles returns whether all of x is finite, and where it is not LinearKernels::multiply must do the product.
  int64_t tile_rows;
  int64_t most_rows;      // a multiple of tile_rows
  int64_t scratch_bytes;  // aligned to a cache line
  int64_t (*tiles_bytes)(int64_t m, int64_t cols);
  bool (*pack_tiles)(const void* x, int64_t m, int64_t cols, void* tiles);
  int64_t (*multiply)(const TwoFourMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y,
                      void* scratch);

  // Prunes in place to 2:4 in rows and in columns: of each 4 x 4 elements the eight of the largest sum of magnitudes. rows and cols are
  // multiples of 4.
  void (*prune_transposable)(void* dense, int64_t rows, int64_t cols);
};

// Some blocks of block_rows rows of a [.., cols] matrix, cols a multiple of block_cols.
struct BlockLine {
  const int64_t* positions;  // [blocks]: the block columns, ascending, below cols / block_cols
  int64_t blocks;
  int64_t block_rows;
  int64_t block_cols;
  int64_t cols;
};

// Conversions of the values of a bitmask matrix for one element width. Bits and indices are the caller's own and proven.
struct ConvertValueKernels {
  // Takes the values of a tile [rows, cols] of a matrix to where they lie in the transposed one. Rows of `bits` lie `stride` bytes apart;
  // row_next [rows] and col_next [cols] say where the first value of each row lies in `values`, and of each column in `transposed`; both
  // are left pointing past the tile.
  void (*transpose_values)(const void* values, const uint8_t* bits, int64_t rows, int64_t cols, int64_t stride, int64_t* row_next,
                           int64_t* col_next, void* transposed);

  // Writes every element of a line of blocks, `expanded` [blocks][block_rows][block_cols], from its rows of `bitmasks`. Never reads past
  // `values` + nnz elements.
  void (*expand_blocks)(const void* values, int64_t nnz, const uint8_t* bitmasks, const BlockLine& line, void* expanded);

  // What CodecKernels do with dense rows, with those of a line of blocks [blocks][block_rows][block_cols].
  void (*build_bitmasks)(const void* blocks, const BlockLine& line, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* counts);
  void (*pack_values)(const void* blocks, const BlockLine& line, const uint8_t* bitmasks, void* values, int64_t nnz);
};

// Conversions between bitmasks and the index lists of torch's sparse layouts.
struct ConvertKernels {
  // Lists the columns of the set bits of `rows` rows, each plus `first`, never past `columns` + most entries; row_starts [rows] (may be
  // null) gets the number of set bits before each row, plus `start`. Returns the number of set bits.
  int64_t (*list_columns)(const uint8_t* bitmasks, int64_t rows, int64_t cols, int64_t first, int64_t start, int64_t* columns, int64_t most,
                          int64_t* row_starts);

  // The reverse for one row, whose `bits` are zero. Of columns [count] those are marked whose bit in `kept`, counted from first_kept on,
  // is set (null: all); `marked` gets their number. Columns are read once each. Returns the index of the first one that is not in [0,
  // cols) or not above the one before it (what has been written is then worthless), or `count`.
  int64_t (*mark_columns)(const int64_t* columns, int64_t count, const uint8_t* kept, int64_t first_kept, int64_t cols, uint8_t* bits,
                          int64_t* marked);

  // Of COO entries that are ordered by rows, [begin, end) of nnz, the first of each row: row_starts[r] for the rows r above that of entry
  // begin - 1, up to that of entry end - 1; if `end` is nnz, up to `rows`, the number of rows. The row is what the first `dims` indices of
  // `indices` [.., nnz] say, those of `sizes` flattened. Returns the first entry with an index out of range or of a row less than the one
  // before (row_starts are then worthless), or `end`.
  int64_t (*start_rows)(const int64_t* indices, int64_t nnz, const int64_t* sizes, int64_t dims, int64_t rows, int64_t begin, int64_t end,
                        int64_t* row_starts);

  // Transposes the bits of a tile [rows, cols]; rows of `bits` lie `stride` bytes apart, of `transposed` transposed_stride.
  void (*transpose_bits)(const uint8_t* bits, int64_t rows, int64_t cols, int64_t stride, uint8_t* transposed, int64_t transposed_stride);

  // A bit for each block of block_cols columns, of which cols is a multiple: whether any of the `rows` rows has a bit set there.
  void (*mark_blocks)(const uint8_t* bitmasks, int64_t rows, int64_t cols, int64_t block_cols, uint8_t* marks);

  ConvertValueKernels values[kWidths];  // indexed by log2 of the element width in bytes
};

// Dtypes that have linear kernels, in the order of Kernels::linear.
enum LinearDtype { kFloat32, kBfloat16, kFloat16, kFloat64, kLinearDtypes };

// Element widths that have 2:4 kernels: 1 << 0 ... 1 << 3 bytes.
constexpr int kTwoFourWidths = 4;

struct Kernels {
  const char* isa;
  CodecKernels codec[kWidths];  // indexed by log2 of the element width in bytes
  LinearKernels linear[kLinearDtypes];
  BlockKernels block[kLinearDtypes];
  TwoFourCodecKernels two_four_codec[kTwoFourWidths];  // indexed by log2 of the element width in bytes
  TwoFourLinearKernels two_four_linear[kLinearDtypes];

  ConvertKernels convert;

  // Set bits in `bytes` bytes.
  int64_t (*count_bits)(const uint8_t* bits, int64_t bytes);

  // Proves `rows` rows: offsets within [0, nnz], each row's popcount leading to the next offset (`end` after the last row), padding bits
  // zero. Returns the first faulty row, or `rows` if there is none. Reads bitmasks and offsets only.
  int64_t (*first_faulty_row)(const uint8_t* bitmasks, const int64_t* row_offsets, int64_t rows, int64_t cols, int64_t end, int64_t nnz);

  // The first row of 2:4 metadata that is faulty, or `rows` if there is none.
  int64_t (*first_faulty_metadata)(const uint8_t* metadata, int64_t rows, int64_t cols);
};

// The tables; an ISA that this architecture cannot have is absent from the build (see dispatch.cpp).
const Kernels& kernels_scalar();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#elif defined(__aarch64__)
const Kernels& kernels_neon();
#endif

// The table in use: the best one that this machine can run, unless BITMASK_ISA or force_isa() says otherwise.
const Kernels& kernels();

// Number and names of the tables this machine can run, best first.
int isa_count();
const char* isa_name(int index);

// Makes `name` the table in use; nullptr or "" goes back to the best. False, and no change, if this machine cannot run it.
bool force_isa(const char* name);

}  // namespace bitmask::cpu
