// The CPU implementation of the product with a block-sparse weight whose kept blocks are 2:4. Each task unpacks some rows of its lines into
// memory that stays in the cache, then the kernels for dense blocks multiply with them: so memory brings little more than half of the
// bytes, and nothing is multiplied twice. No arithmetic here.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "block_products.h"

namespace bitmask {
namespace {

using cpu::TwoFourCodecKernels;

// What is unpacked at a time: lines that fit half of a second cache together, else one line, in which values come in the order of memory.
// A part of a line is some rows of each block, so that values come in small pieces; that takes 1.2 to 1.9 times as long as a line that
// leaves the second cache (4096x14336, blocks of 32 to 128, up to 16 rows of x, Zen 5). So lines are whole up to a share of a last cache;
// each thread keeps as much memory.
constexpr int64_t kLinesBytes = 512 << 10;
constexpr int64_t kLineBytes = 4 << 20;
constexpr int64_t kPartRows = 8;  // of which parts are multiples if they can: fewer are slow to unpack and to multiply

// The lines [begin, end) of a weight, or of a single line some rows of each block.
struct Window {
  int64_t begin, end;
  int64_t row, rows;  // of each block
};

// The weight, and its blocks as they lie in memory: rows of blocks are the rows of a 2:4 matrix.
struct Blocks {
  const BlockWeight& weight;
  const TwoFourParts& parts;
  const TwoFourCodecKernels& codec;

  int64_t row_bytes() const { return weight.sizes.block_cols * weight.width; }  // unpacked
  int64_t first_block(int64_t line) const { return weight.index.line_starts[static_cast<size_t>(line)]; }

  // The window from `row` of the line `begin` on: as much as may be unpacked at a time, but at least one row of each block.
  Window window(int64_t begin, int64_t end, int64_t row) const {
    const int64_t block_rows = weight.sizes.block_rows;
    const int64_t block_bytes = weight.index.blocks() == 0 ? 0 : block_rows * row_bytes();  // any size may meet if there are none
    const auto bytes_to = [&](int64_t line) { return (first_block(line) - first_block(begin)) * block_bytes; };
    if (bytes_to(begin + 1) > kLineBytes) return {begin, begin + 1, row, std::min(part_rows(bytes_to(begin + 1)), block_rows - row)};
    int64_t last = begin + 1;
    while (last < end && bytes_to(last + 1) <= kLinesBytes) ++last;
    return {begin, last, 0, block_rows};
  }

  // Writes the rows of the window to `dense` [blocks][rows][block_cols]; returns the first row that is faulty, of those of all blocks, or
  // their number.
  int64_t unpack(const Window& window, uint8_t* dense) const {
    const int64_t first = first_block(window.begin), count = first_block(window.end) - first, block_rows = weight.sizes.block_rows;
    if (window.rows == block_rows) return unpack_rows(first * block_rows, count * block_rows, dense);
    int64_t fault = parts.matrix.rows;
    for (int64_t block = 0; block < count; ++block) {
      const int64_t row = (first + block) * block_rows + window.row;
      fault = std::min(fault, unpack_rows(row, window.rows, dense + block * window.rows * row_bytes()));
    }
    return fault;
  }

  // The window as a weight by itself, whose line_starts are put into `starts`.
  BlockMatrix matrix(const Window& window, const uint8_t* dense, std::vector<int64_t>& starts) const {
    const BlockSizes& sizes = weight.sizes;
    const int64_t first = first_block(window.begin), top = window.begin * sizes.block_rows + window.row;
    const int64_t rows = std::min((window.end - window.begin) * window.rows, sizes.rows - top);
    starts.clear();
    for (int64_t line = window.begin; line <= window.end; ++line) starts.push_back(first_block(line) - first);
    return {dense, rows, sizes.cols, window.rows, sizes.block_cols, starts.data(), weight.index.positions.data() + first, nullptr, nullptr};
  }

 private:
  // Rows of each block in the parts of a line of so many bytes.
  int64_t part_rows(int64_t bytes) const {
    const int64_t rows = std::max<int64_t>(weight.sizes.block_rows / blocks_across(bytes, kLineBytes), 1);
    return rows < kPartRows ? rows : rows / kPartRows * kPartRows;
  }

  int64_t unpack_rows(int64_t row, int64_t rows, uint8_t* dense) const {
    const TwoFourMatrix& w = parts.matrix;
    const uint8_t* const values = static_cast<const uint8_t*>(w.values) + row * row_bytes() / 2;
    const int64_t fault = codec.unpack(values, w.metadata + row * bitmask_bytes(w.cols), rows, w.cols, dense);
    return fault == rows ? w.rows : row + fault;
  }
};

// Lowers a number that tasks share.
void lower(std::atomic<int64_t>& least, int64_t number) {
  int64_t known = least;
  while (number < known && !least.compare_exchange_weak(known, number)) {
  }
}

// Calls product(window as a weight, its first row, scratch) for the lines [begin, end), window by window; lowers `fault` to the first
// faulty row, whose window is left out.
template <typename Product>
void for_each_window(const Blocks& blocks, int64_t begin, int64_t end, std::atomic<int64_t>& fault, const Product& product) {
  const BlockSizes& sizes = blocks.weight.sizes;
  const int64_t scratch_bytes = (blocks.weight.kernels.scratch_bytes + 63) / 64 * 64;
  std::vector<int64_t> starts;
  for (Window window{begin, begin, 0, 0}; window.begin < end;) {
    window = blocks.window(window.begin, end, window.row);
    const int64_t count = blocks.first_block(window.end) - blocks.first_block(window.begin);
    uint8_t* const memory = static_cast<uint8_t*>(scratch(scratch_bytes + count * window.rows * blocks.row_bytes()));
    const int64_t found = blocks.unpack(window, memory + scratch_bytes), top = window.begin * sizes.block_rows + window.row;
    lower(fault, found);
    // Rows past the weight are proven all the same.
    if (found == blocks.parts.matrix.rows && top < sizes.rows) product(blocks.matrix(window, memory + scratch_bytes, starts), top, memory);
    const bool ends = window.row + window.rows == sizes.block_rows;
    window = {ends ? window.end : window.begin, end, ends ? 0 : window.row + window.rows, 0};
  }
}

[[noreturn]] void fail_block(int64_t row, const BlockSizes& sizes, const TwoFourMatrix& w) {
  fail_metadata(w.metadata + row * bitmask_bytes(w.cols),
                "block " + std::to_string(row / sizes.block_rows) + ", row " + std::to_string(row % sizes.block_rows), w.cols);
}

Tensor bsr_linear_24(const Tensor& x, const Tensor& values, const Tensor& metadata, const Tensor& crow_indices, const Tensor& col_indices,
                     int64_t out_features, const std::optional<Tensor>& bias) {
  const TwoFourParts parts = two_four_blocks_of(values, metadata);
  const BlockOperands operands = linear_operands(x, parts.element.dtype, parts.sizes[0], parts.sizes[1], parts.sizes[2], crow_indices,
                                                 col_indices, out_features, bias);
  const BlockWeight weight = weight_of(operands, parts.values);

  const Tensor y = empty(with_last_size(x, out_features), parts.element.dtype);
  const int64_t m = rows_of(x), width = weight.width;
  if (m == 0 || out_features == 0) return y;
  const BlockKernels& kernels = weight.kernels;
  const Blocks blocks{weight, parts, cpu::kernels().two_four_codec[__builtin_ctz(static_cast<unsigned>(width))]};
  const Tensor rows = contiguous("x", x), offset = bias ? contiguous("bias", *bias) : rows;
  const auto bias_of = [&](int64_t row) { return bias ? const_bytes(offset) + row * width : nullptr; };
  std::atomic<int64_t> fault{parts.matrix.rows};
  if (m <= kernels.streaming_rows) {
    stream(weight, const_bytes(rows), m, [&](int64_t begin, int64_t end, const void* packed) {
      for_each_window(blocks, begin, end, fault, [&](const BlockMatrix& w, int64_t row, void* memory) {
        const int64_t lines = blocks_across(w.rows, w.block_rows);
        kernels.stream(w, 0, lines, packed, m, bias_of(row), mutable_bytes(y) + row * width, out_features, memory);
      });
    });
  } else {
    multiply(weight, const_bytes(rows), m, mutable_bytes(y),
             [&](int64_t begin, int64_t end, const void* tiles, int64_t count, uint8_t* to) {
               for_each_window(blocks, begin, end, fault, [&](const BlockMatrix& w, int64_t row, void* memory) {
                 const int64_t lines = blocks_across(w.rows, w.block_rows);
                 kernels.multiply(w, 0, lines, tiles, count, bias_of(row), to + row * width, out_features, memory);
               });
             });
  }
  if (fault < parts.matrix.rows) fail_block(fault, weight.sizes, parts.matrix);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bitmask, CPU, m) { m.impl("bsr_linear_24", TORCH_BOX(&bsr_linear_24)); }

}  // namespace bitmask
