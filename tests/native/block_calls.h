// What the tests of the block-sparse kernels share: weights, and calls of a kernel in memory that is watched.
#pragma once

#include <numeric>

#include "products.h"

namespace bitmask::testing {

using cpu::BlockKernels;
using BlockSubject = SubjectOf<BlockKernels>;
using BlockSubjects = SubjectsOf<BlockKernels>;

// ---------------------------------------------------------------------------------------------------------------- weights

constexpr int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// A block-sparse weight [rows, cols]: a dense one, and which of its blocks are kept.
struct BlockWeight {
  Format format;
  int64_t rows, cols, block_rows, block_cols;
  std::vector<uint64_t> bits;
  std::vector<bool> kept;  // [row_count, col_count]

  int64_t row_count() const { return divide_up(rows, block_rows); }
  int64_t col_count() const { return divide_up(cols, block_cols); }
  int64_t block_bytes() const { return block_rows * block_cols * format.width; }
  bool keeps_block(int64_t row, int64_t col) const { return kept[static_cast<size_t>(row * col_count() + col)]; }
  bool keeps(int64_t row, int64_t col) const { return keeps_block(row / block_rows, col / block_cols); }
  int64_t blocks() const { return std::accumulate(kept.begin(), kept.end(), int64_t{0}); }
};

// Where the blocks lie in memory.
enum Order { kOfLines, kShuffled };

// The kept blocks in memory of exactly their size, lines being block rows or, transposed, block columns. Elements past the edges of the
// weight are NaN, because nothing may come of them.
class StoredBlocks {
 public:
  StoredBlocks(const BlockWeight& weight, bool transposed, Order order, int skew)
      : StoredBlocks(weight, walk(weight, transposed, order), order, skew) {}

  const BlockMatrix& matrix() const { return matrix_; }

 private:
  struct Walk {
    std::vector<int64_t> line_starts, positions, lines, places;
    Bytes values;
  };

  static Walk walk(const BlockWeight& weight, bool transposed, Order order) {
    Walk walk;
    walk.line_starts.push_back(0);
    const int64_t lines = transposed ? weight.col_count() : weight.row_count();
    const int64_t positions = transposed ? weight.row_count() : weight.col_count();
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t position = 0; position < positions; ++position) {
        if (!(transposed ? weight.keeps_block(position, line) : weight.keeps_block(line, position))) continue;
        walk.places.push_back(static_cast<int64_t>(walk.positions.size()));
        walk.positions.push_back(position);
        walk.lines.push_back(line);
      }
      walk.line_starts.push_back(static_cast<int64_t>(walk.positions.size()));
    }
    for (size_t i = walk.places.size(); order == kShuffled && i > 1; --i) {
      std::swap(walk.places[i - 1], walk.places[static_cast<size_t>(random_below(static_cast<int64_t>(i)))]);
    }
    walk.values.assign(walk.places.size() * static_cast<size_t>(weight.block_bytes()), 0xff);
    for (size_t at = 0; at < walk.places.size(); ++at) {
      const int64_t row = transposed ? walk.positions[at] : walk.lines[at], col = transposed ? walk.lines[at] : walk.positions[at];
      store_block(weight, row * weight.block_rows, col * weight.block_cols, walk.values.data() + walk.places[at] * weight.block_bytes());
    }
    return walk;
  }

  static void store_block(const BlockWeight& weight, int64_t row, int64_t col, uint8_t* dst) {
    for (int64_t i = row; i < std::min(row + weight.block_rows, weight.rows); ++i) {
      for (int64_t j = col; j < std::min(col + weight.block_cols, weight.cols); ++j) {
        weight.format.store(weight.bits[static_cast<size_t>(i * weight.cols + j)],
                            dst + ((i - row) * weight.block_cols + j - col) * weight.format.width);
      }
    }
  }

  static Bytes bytes_of(const std::vector<int64_t>& numbers) {
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(numbers.data());
    return Bytes(bytes, bytes + numbers.size() * 8);
  }

  StoredBlocks(const BlockWeight& weight, const Walk& walk, Order order, int skew)
      : values_(walk.values, skew),
        line_starts_(bytes_of(walk.line_starts)),
        positions_(bytes_of(walk.positions)),
        lines_(bytes_of(walk.lines)),
        order_(bytes_of(walk.places)) {
    const auto numbers = [](Buffer& buffer) { return reinterpret_cast<const int64_t*>(buffer.data()); };
    matrix_ = {values_.data(),      weight.rows,       weight.cols,
               weight.block_rows,   weight.block_cols, numbers(line_starts_),
               numbers(positions_), numbers(lines_),   order == kOfLines ? nullptr : numbers(order_)};
  }

  Buffer values_, line_starts_, positions_, lines_, order_;
  BlockMatrix matrix_;
};

// ---------------------------------------------------------------------------------------------------------------- packing

// Calls piece(first, last) for [first, last) at once, or for parts of it in any order that begin at multiples of `step`.
template <class Piece>
void for_pieces(int64_t first, int64_t last, int64_t step, const Piece& piece) {
  const int64_t cuts = (last - first - 1) / step;
  if (cuts < 1 || random_below(3) == 0) return piece(first, last);
  const int64_t middle = first + (1 + random_below(cuts)) * step;
  const bool in_order = random_below(2) == 0;
  if (in_order) for_pieces(first, middle, step, piece);
  for_pieces(middle, last, step, piece);
  if (!in_order) for_pieces(first, middle, step, piece);
}

// `bytes` of NaN, where all of them are written before they are read.
inline Bytes unpacked(int64_t bytes) {
  check(bytes % 64 == 0, "%" PRId64 " packed bytes are not whole cache lines", bytes);
  return Bytes(static_cast<size_t>(bytes), 0xff);
}

// The first m of the rows [cols] as a kernel takes them.
struct Packing {
  const BlockKernels& kernels;
  const uint8_t* rows;
  int64_t m, cols, width;
  int skew;

  // Calls pack(rows) with the rows in memory of exactly their size.
  template <class Pack>
  void watch(const Buffer& packed, const Pack& pack) const {
    const Bytes used(rows, rows + m * cols * width);
    Buffer given(used, skew);
    pack(given.data());
    check(packed.canaries_intact() && given.bytes() == used, "packing writes outside, m %" PRId64, m);
  }

  void rows_into(Buffer& packed, int64_t block_cols) const {
    watch(packed, [&](const uint8_t* given) { kernels.pack_rows(given, m, cols, block_cols, packed.data()); });
  }
  void tiles_into(Buffer& packed) const {
    watch(packed, [&](const uint8_t* given) {
      for_pieces(0, m, kernels.tile_rows, [&](int64_t first, int64_t last) {
        kernels.pack_tiles(given + first * cols * width, last - first, cols, packed.data() + kernels.tiles_bytes(first, cols));
      });
    });
  }
  void columns_into(Buffer& packed, int64_t block) const {
    watch(packed, [&](const uint8_t* given) {
      for_pieces(0, divide_up(cols, block), 1,
                 [&](int64_t first, int64_t last) { kernels.pack_columns(given, m, cols, block, first, last, packed.data()); });
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------- calls

enum BlockWay { kBlockStream, kBlockMultiply, kBlockTransposed, kBlockSample };
constexpr BlockWay kBlockWays[] = {kBlockStream, kBlockMultiply, kBlockTransposed, kBlockSample};
constexpr const char* kBlockWayNames[] = {"stream", "multiply", "transposed", "sample"};

// The lines [begin, end) of a product; of a sample, the kept blocks.
struct BlockCall {
  BlockWay way;
  int64_t m, begin, end;
  bool biased;
  Order order;
  int chunks;  // of the rows that are sampled
  int skew;
  int64_t gap;  // elements between rows of y

  int64_t y_cols(const BlockWeight& weight) const { return (way == kBlockTransposed ? weight.cols : weight.rows) + gap; }
};

inline void check_surroundings(const BlockSubject& subject, const Buffer& packed, const Bytes& before, const BlockCall& call) {
  check(subject.scratch.canaries_intact(), "%s: writes outside of its scratch memory", kBlockWayNames[call.way]);
  check(packed.bytes() == before, "%s: writes to what was packed for it", kBlockWayNames[call.way]);
}

// Multiplies the first call.m of `rows` (x, or g) with the weight into y.
inline void run_product(BlockSubject& subject, const BlockWeight& weight, const Bytes& rows, const Bytes& bias, const BlockCall& call,
                        Buffer& y) {
  const BlockKernels& kernels = subject.kernels;
  const bool transposed = call.way == kBlockTransposed;
  const int64_t width = weight.format.width, cols = transposed ? weight.rows : weight.cols;
  const Packing packing{kernels, rows.data(), call.m, cols, width, call.skew};
  const StoredBlocks stored(weight, transposed, call.order, call.skew);
  Buffer packed(
      unpacked(call.way == kBlockStream ? kernels.rows_bytes(call.m, cols, weight.block_cols) : kernels.tiles_bytes(call.m, cols))),
      offsets(bias, call.skew);
  call.way == kBlockStream ? packing.rows_into(packed, weight.block_cols) : packing.tiles_into(packed);
  const Bytes before = packed.bytes();
  const int64_t y_cols = call.y_cols(weight), written = y_cols - call.gap, block = transposed ? weight.block_cols : weight.block_rows;
  for_pieces(0, call.m, call.way == kBlockStream ? call.m : kernels.tile_rows, [&](int64_t first, int64_t last) {
    const uint8_t* const some = packed.data() + (first == 0 ? 0 : kernels.tiles_bytes(first, cols));
    uint8_t* const sums = y.data() + first * y_cols * width;
    poison_scratch(subject);
    if (transposed) {
      kernels.multiply_transposed(stored.matrix(), call.begin, call.end, some, last - first, sums, subject.scratch.data());
    } else {
      const auto multiply = call.way == kBlockStream ? kernels.stream : kernels.multiply;
      multiply(stored.matrix(), call.begin, call.end, some, last - first, call.biased ? offsets.data() : nullptr, sums, y_cols,
               subject.scratch.data());
    }
  });
  check_surroundings(subject, packed, before, call);
  check(!written_outside(y, y_cols * width, std::min(call.begin * block, written) * width, std::min(call.end * block, written) * width),
        "%s: m %" PRId64 ", lines %" PRId64 " to %" PRId64 ": writes outside", kBlockWayNames[call.way], call.m, call.begin, call.end);
}

// The kept blocks [call.begin, call.end) of g^T x into `values`, from the first call.m rows of g and x, chunk by chunk.
inline void run_sample(BlockSubject& subject, const BlockWeight& weight, const Bytes& g, const Bytes& x, const BlockCall& call,
                       Buffer& values) {
  const BlockKernels& kernels = subject.kernels;
  const int64_t width = weight.format.width, sum_block = weight.block_rows * weight.block_cols * kernels.sum_bytes;
  const StoredBlocks stored(weight, false, kOfLines, call.skew);
  BlockMatrix pattern = stored.matrix();
  pattern.values = nullptr;
  Buffer first_sums(weight.blocks() * sum_block, call.skew), other_sums(weight.blocks() * sum_block, call.skew);
  Buffer* earlier = nullptr;
  for (int chunk = 0; chunk < call.chunks; ++chunk) {
    const int64_t first = call.m * chunk / call.chunks, m = call.m * (chunk + 1) / call.chunks - first;
    Buffer g_columns(unpacked(kernels.columns_bytes(m, weight.rows, weight.block_rows))),
        x_columns(unpacked(kernels.columns_bytes(m, weight.cols, weight.block_cols)));
    Packing{kernels, g.data() + first * weight.rows * width, m, weight.rows, width, call.skew}.columns_into(g_columns, weight.block_rows);
    Packing{kernels, x.data() + first * weight.cols * width, m, weight.cols, width, call.skew}.columns_into(x_columns, weight.block_cols);
    const Bytes g_before = g_columns.bytes(), x_before = x_columns.bytes();
    // Sums are added to where they are, or elsewhere.
    Buffer* const sums = chunk + 1 == call.chunks ? nullptr : random_below(2) == 0 ? &first_sums : &other_sums;
    kernels.sample(pattern, call.begin, call.end, g_columns.data(), x_columns.data(), m, earlier == nullptr ? nullptr : earlier->data(),
                   sums == nullptr ? nullptr : sums->data(), sums == nullptr ? values.data() : nullptr);
    earlier = sums;
    check_surroundings(subject, g_columns, g_before, call);
    check_surroundings(subject, x_columns, x_before, call);
  }
  for (const Buffer* sums : {&first_sums, &other_sums}) {
    check(!written_outside(*sums, weight.blocks() * sum_block, call.begin * sum_block, call.end * sum_block),
          "sample: m %" PRId64 ", blocks %" PRId64 " to %" PRId64 ": writes sums outside", call.m, call.begin, call.end);
  }
  check(
      !written_outside(values, weight.blocks() * weight.block_bytes(), call.begin * weight.block_bytes(), call.end * weight.block_bytes()),
      "sample: m %" PRId64 ", blocks %" PRId64 " to %" PRId64 ": writes values outside", call.m, call.begin, call.end);
}

}  // namespace bitmask::testing
