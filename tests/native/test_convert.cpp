// Tests the conversions between bitmasks and index lists of every table that this machine can run, against element-by-element references.
#include <cinttypes>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "testing.h"

using namespace bitmask;
using namespace bitmask::testing;
using cpu::ConvertKernels;
using cpu::ConvertValueKernels;

namespace {

using Indices = std::vector<int64_t>;

Bytes bytes_of(const Indices& indices) {
  Bytes bytes(indices.size() * 8);
  if (!indices.empty()) std::memcpy(bytes.data(), indices.data(), bytes.size());
  return bytes;
}

// A buffer of indices, watched at both ends.
struct IndexBuffer : Buffer {
  explicit IndexBuffer(int64_t count) : Buffer(count * 8) {}
  explicit IndexBuffer(const Indices& indices) : Buffer(bytes_of(indices)) {}
  int64_t* entries() { return reinterpret_cast<int64_t*>(data()); }
};

// Bits [rows, cols], padding zero.
struct Bits {
  int64_t rows, cols;
  Bytes masks;

  int64_t row_bytes() const { return bitmask_bytes(cols); }
  const uint8_t* row(int64_t index) const { return masks.data() + index * row_bytes(); }
  bool at(int64_t row_index, int64_t col) const { return bit(row(row_index), col); }
};

Bits make_bits(int64_t rows, int64_t cols, int percent) {
  Bits bits{rows, cols, Bytes(static_cast<size_t>(rows * bitmask_bytes(cols)), 0)};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      uint8_t& byte = bits.masks[static_cast<size_t>(row * bits.row_bytes() + col / 8)];
      if (random_below(100) < percent) byte = static_cast<uint8_t>(byte | 1 << (col % 8));
    }
  }
  return bits;
}

Indices columns_of(const Bits& bits, int64_t row) {
  Indices columns;
  for (int64_t col = 0; col < bits.cols; ++col) {
    if (bits.at(row, col)) columns.push_back(col);
  }
  return columns;
}

Bytes random_values(int64_t count, int64_t width) {
  Bytes values(static_cast<size_t>(count * width));
  for (uint8_t& byte : values) byte = static_cast<uint8_t>(random_word() >> 40);
  return values;
}

// ---------------------------------------------------------------------------------------------------------------- lists

void test_list(const ConvertKernels& kernels, const Bits& bits) {
  constexpr int64_t kFirst = 1000, kStart = 77;
  Indices columns, starts;
  for (int64_t row = 0; row < bits.rows; ++row) {
    starts.push_back(kStart + static_cast<int64_t>(columns.size()));
    for (const int64_t col : columns_of(bits, row)) columns.push_back(kFirst + col);
  }
  const int64_t count = static_cast<int64_t>(columns.size());
  Buffer masks(bits.masks);
  for (const int64_t most : {count, count - 1, count / 2, int64_t{0}, count + 100}) {
    if (most < 0) continue;
    IndexBuffer got(most), got_starts(bits.rows);
    const int64_t found =
        kernels.list_columns(masks.data(), bits.rows, bits.cols, kFirst, kStart, got.entries(), most, got_starts.entries());
    const size_t written = static_cast<size_t>(most < count ? most : count) * 8;
    const Bytes expected = bytes_of(columns), listed = got.bytes();
    check(found == count, "list_columns: found %" PRId64 " of %" PRId64, found, count);
    check(written == 0 || std::memcmp(listed.data(), expected.data(), written) == 0, "list_columns: wrong columns, most %" PRId64, most);
    check(got_starts.bytes() == bytes_of(starts), "list_columns: wrong starts");
    check(got.canaries_intact() && got_starts.canaries_intact(), "list_columns: wrote outside, most %" PRId64, most);
    check(kernels.list_columns(masks.data(), bits.rows, bits.cols, kFirst, kStart, got.entries(), most, nullptr) == count,
          "list_columns: needs starts");
  }
}

// One row; every third column is not kept where `some` is set.
void test_mark(const ConvertKernels& kernels, const Bits& bits, bool some) {
  constexpr int64_t kFirstKept = 13;
  const Indices columns = columns_of(bits, 0);
  const int64_t count = static_cast<int64_t>(columns.size());
  Bytes kept(static_cast<size_t>(bitmask_bytes(kFirstKept + count)), 0), expected(static_cast<size_t>(bits.row_bytes()), 0);
  int64_t expected_marked = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (some && i % 3 == 0) continue;
    uint8_t& keep = kept[static_cast<size_t>((kFirstKept + i) / 8)];
    keep = static_cast<uint8_t>(keep | 1 << ((kFirstKept + i) % 8));
    const int64_t col = columns[static_cast<size_t>(i)];
    expected[static_cast<size_t>(col / 8)] = static_cast<uint8_t>(expected[static_cast<size_t>(col / 8)] | 1 << (col % 8));
    ++expected_marked;
  }
  IndexBuffer list(columns);
  Buffer keeps(kept), got(Bytes(expected.size(), 0));
  int64_t marked = -1;
  const int64_t done =
      kernels.mark_columns(list.entries(), count, some ? keeps.data() : nullptr, kFirstKept, bits.cols, got.data(), &marked);
  check(done == count && marked == expected_marked, "mark_columns: did %" PRId64 ", marked %" PRId64, done, marked);
  check(got.bytes() == expected && got.canaries_intact(), "mark_columns: wrong bits, some %d", some);
}

void test_mark_faults(const ConvertKernels& kernels) {
  constexpr int64_t kCols = 200;
  const struct {
    const char* fault;
    Indices columns;
    int64_t at;
  } cases[] = {
      {"negative", {-1}, 0},   {"too large", {3, kCols}, 1},  {"far too large", {3, 4, INT64_MAX}, 2}, {"most negative", {3, INT64_MIN}, 1},
      {"repeated", {3, 3}, 1}, {"descending", {3, 70, 69}, 2}};
  for (const auto& wrong : cases) {
    IndexBuffer list(wrong.columns);
    Buffer bits(Bytes(static_cast<size_t>(bitmask_bytes(kCols)), 0));
    int64_t marked;
    const int64_t done =
        kernels.mark_columns(list.entries(), static_cast<int64_t>(wrong.columns.size()), nullptr, 0, kCols, bits.data(), &marked);
    check(done == wrong.at && bits.canaries_intact(), "mark_columns: %s found at %" PRId64, wrong.fault, done);
  }
}

// Entries of a COO tensor of sizes [3, 4] and a last dimension that does not matter here.
void test_start_rows(const ConvertKernels& kernels, bool planted) {
  const Indices sizes{3, 4};
  constexpr int64_t kRows = 12, kEntries = 40;
  Indices rows(static_cast<size_t>(kEntries)), indices(static_cast<size_t>(2 * kEntries)), starts(kRows + 1, kEntries);
  int64_t row = random_below(2);
  for (int64_t i = 0; i < kEntries; ++i) {
    if (row < kRows - 1 && random_below(3) == 0) row += 1 + random_below(kRows - 1 - row < 3 ? 1 : 3);
    rows[static_cast<size_t>(i)] = row;
    indices[static_cast<size_t>(i)] = row / 4;
    indices[static_cast<size_t>(kEntries + i)] = row % 4;
  }
  for (int64_t i = 0; i < kEntries; ++i) {  // rows begin with their own first entry, or the next row's
    for (int64_t r = i == 0 ? 0 : rows[static_cast<size_t>(i - 1)] + 1; r <= rows[static_cast<size_t>(i)]; ++r)
      starts[static_cast<size_t>(r)] = i;
  }
  const int64_t fault = random_below(kEntries), kinds[] = {-1, sizes[0], INT64_MAX, INT64_MIN};
  if (planted) indices[static_cast<size_t>(fault)] = kinds[random_below(4)];
  IndexBuffer entries(indices), got(kRows + 1);
  for (const int64_t border : {int64_t{0}, kEntries / 3, kEntries}) {
    const int64_t first = kernels.start_rows(entries.entries(), kEntries, sizes.data(), 2, kRows, 0, border, got.entries());
    const int64_t second = kernels.start_rows(entries.entries(), kEntries, sizes.data(), 2, kRows, border, kEntries, got.entries());
    if (planted) {
      check(first == (fault < border ? fault : border) && second == (fault < border ? second : fault), "start_rows: fault at %" PRId64,
            fault);
    } else {
      check(first == border && second == kEntries && got.bytes() == bytes_of(starts), "start_rows: wrong, border %" PRId64, border);
    }
    check(got.canaries_intact(), "start_rows: wrote outside");
  }
}

// ---------------------------------------------------------------------------------------------------------------- transposed

// The tile [row, row + rows) x [col, col + cols) of a matrix.
struct Tile {
  int64_t row, col, rows, cols;
};

void test_transpose_bits(const ConvertKernels& kernels, const Bits& bits, const Tile& tile) {
  const int64_t stride = bitmask_bytes(bits.rows) + 3;  // farther apart than they need be
  Bytes expected(static_cast<size_t>(tile.cols * stride), Buffer::kCanaryByte);
  for (int64_t col = 0; col < tile.cols; ++col) {
    for (int64_t at = 0; at < bitmask_bytes(tile.rows) * 8; ++at) {
      uint8_t& byte = expected[static_cast<size_t>(col * stride + at / 8)];
      if (at % 8 == 0) byte = 0;
      if (at < tile.rows && bits.at(tile.row + at, tile.col + col)) byte = static_cast<uint8_t>(byte | 1 << (at % 8));
    }
  }
  Buffer masks(bits.masks), transposed(tile.cols * stride);
  kernels.transpose_bits(masks.data() + tile.row * bits.row_bytes() + tile.col / 8, tile.rows, tile.cols, bits.row_bytes(),
                         transposed.data(), stride);
  check(transposed.bytes() == expected && transposed.canaries_intact(), "transpose_bits: wrong");
}

void test_transpose_values(const ConvertValueKernels& kernels, const Bits& bits, const Tile& tile, int64_t width) {
  Indices row_next, col_next(static_cast<size_t>(tile.cols)), of_column(static_cast<size_t>(bits.cols), 0);
  int64_t nnz = 0;
  Indices in_order(static_cast<size_t>(bits.rows * bits.cols), -1);
  for (int64_t row = 0; row < bits.rows; ++row) {
    if (row >= tile.row && row < tile.row + tile.rows) row_next.push_back(nnz + count_reference(bits.row(row), tile.col / 8));
    for (const int64_t col : columns_of(bits, row)) in_order[static_cast<size_t>(row * bits.cols + col)] = nnz++;
  }
  const Bytes stored = random_values(nnz, width);
  Bytes expected(stored.size(), Buffer::kCanaryByte);
  int64_t place = 0;
  for (int64_t col = 0; col < bits.cols; ++col) {
    for (int64_t row = 0; row < bits.rows; ++row) {
      const int64_t from = in_order[static_cast<size_t>(row * bits.cols + col)];
      const bool inside = row >= tile.row && row < tile.row + tile.rows && col >= tile.col && col < tile.col + tile.cols;
      if (row == tile.row && col >= tile.col && col < tile.col + tile.cols) col_next[static_cast<size_t>(col - tile.col)] = place;
      if (from < 0) continue;
      if (inside) std::memcpy(expected.data() + place * width, stored.data() + from * width, static_cast<size_t>(width));
      ++place;
    }
  }
  Buffer values(stored), masks(bits.masks), transposed(nnz * width);
  IndexBuffer rows(row_next), cols(col_next);
  kernels.transpose_values(values.data(), masks.data() + tile.row * bits.row_bytes() + tile.col / 8, tile.rows, tile.cols, bits.row_bytes(),
                           rows.entries(), cols.entries(), transposed.data());
  check(transposed.bytes() == expected && transposed.canaries_intact(), "transpose_values: wrong, width %" PRId64, width);
  check(rows.canaries_intact() && cols.canaries_intact(), "transpose_values: wrote outside");
}

// ---------------------------------------------------------------------------------------------------------------- blocks

// The block columns of a row of blocks that hold anything.
Indices occupied(const Bits& bits, int64_t block_cols) {
  Indices positions;
  for (int64_t block = 0; block < bits.cols / block_cols; ++block) {
    bool any = false;
    for (int64_t row = 0; row < bits.rows; ++row) {
      for (int64_t col = block * block_cols; col < (block + 1) * block_cols; ++col) any = any || bits.at(row, col);
    }
    if (any) positions.push_back(block);
  }
  return positions;
}

void test_blocks(const ConvertKernels& kernels, const Bits& bits, int64_t block_cols, int width_log2) {
  const int64_t width = int64_t{1} << width_log2;
  const Indices positions = occupied(bits, block_cols);
  const int64_t count = static_cast<int64_t>(positions.size());
  Bytes marks(static_cast<size_t>(bitmask_bytes(bits.cols / block_cols)), 0);
  for (const int64_t block : positions) {
    marks[static_cast<size_t>(block / 8)] = static_cast<uint8_t>(marks[static_cast<size_t>(block / 8)] | 1 << (block % 8));
  }
  Buffer masks(bits.masks), got_marks(static_cast<int64_t>(marks.size()));
  kernels.mark_blocks(masks.data(), bits.rows, bits.cols, block_cols, got_marks.data());
  check(got_marks.bytes() == marks && got_marks.canaries_intact(), "mark_blocks: wrong");

  // Elements of the blocks, and those that are marked row by row: all of them non-zero.
  const int64_t nnz = count_reference(bits.masks.data(), static_cast<int64_t>(bits.masks.size()));
  Bytes stored = random_values(nnz, width), blocks(static_cast<size_t>(count * bits.rows * block_cols * width), 0);
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(byte | 1);
  Indices counts;
  int64_t next = 0;
  for (int64_t row = 0; row < bits.rows; ++row) {
    counts.push_back(count_reference(bits.row(row), bits.row_bytes()));
    int64_t block = 0;
    for (const int64_t col : columns_of(bits, row)) {
      while (positions[static_cast<size_t>(block)] < col / block_cols) ++block;
      std::memcpy(blocks.data() + ((block * bits.rows + row) * block_cols + col % block_cols) * width, stored.data() + next++ * width,
                  static_cast<size_t>(width));
    }
  }

  const ConvertValueKernels& value_kernels = kernels.values[width_log2];
  IndexBuffer at(positions);
  const cpu::BlockLine line{at.entries(), count, bits.rows, block_cols, bits.cols};
  Buffer values(stored), expanded(static_cast<int64_t>(blocks.size()));
  value_kernels.expand_blocks(values.data(), nnz, masks.data(), line, expanded.data());
  check(expanded.bytes() == blocks && expanded.canaries_intact(), "expand_blocks: wrong, width %" PRId64, width);

  Buffer from(blocks), got_masks(static_cast<int64_t>(bits.masks.size())), packed(nnz * width);
  IndexBuffer got_counts(bits.rows);
  ZeroTest all_bits;
  std::memset(all_bits.bytes, 0xff, sizeof(all_bits.bytes));
  value_kernels.build_bitmasks(from.data(), line, all_bits, got_masks.data(), got_counts.entries());
  check(got_masks.bytes() == bits.masks && got_counts.bytes() == bytes_of(counts), "build_bitmasks of blocks: wrong, width %" PRId64,
        width);
  value_kernels.pack_values(from.data(), line, masks.data(), packed.data(), nnz);
  check(packed.bytes() == stored, "pack_values of blocks: wrong, width %" PRId64, width);
  check(got_masks.canaries_intact() && got_counts.canaries_intact() && packed.canaries_intact(), "of blocks: wrote outside");

  if (nnz == 0) return;  // fewer values than bits: nothing is read or written past them
  Buffer fewer(Bytes(stored.begin(), stored.end() - width)), less((nnz - 1) * width);
  value_kernels.expand_blocks(fewer.data(), nnz - 1, masks.data(), line, expanded.data());
  value_kernels.pack_values(from.data(), line, masks.data(), less.data(), nnz - 1);
  check(expanded.canaries_intact() && less.canaries_intact(), "fewer values: wrote outside, width %" PRId64, width);
  check(less.bytes() == Bytes(stored.begin(), stored.end() - width), "pack_values of blocks: wrong where there are fewer");
}

// ---------------------------------------------------------------------------------------------------------------- programs

std::string size_text(int64_t rows, int64_t cols, int percent) {
  return " [" + std::to_string(rows) + ", " + std::to_string(cols) + "] " + std::to_string(percent) + "%";
}

void test_isa(const cpu::Kernels& table, bool brief) {
  const ConvertKernels& kernels = table.convert;
  place = table.isa;
  test_mark_faults(kernels);
  for (int i = 0; i < 50; ++i) test_start_rows(kernels, i % 2 == 0);
  for (const int percent : {0, 3, 50, 100}) {
    for (const int64_t cols : {0, 1, 7, 8, 63, 64, 65, 130, 300}) {
      for (const int64_t rows : {0, 1, 3}) {
        place = std::string(table.isa) + size_text(rows, cols, percent);
        const Bits bits = make_bits(rows, cols, percent);
        test_list(kernels, bits);
        if (rows > 0) test_mark(kernels, bits, false);
        if (rows > 0) test_mark(kernels, bits, true);
      }
    }
    const int64_t sides[][2] = {{1, 1}, {3, 70}, {70, 3}, {64, 64}, {65, 129}, {130, 600}};
    for (const auto& [rows, cols] : sides) {
      place = std::string(table.isa) + size_text(rows, cols, percent);
      const Bits bits = make_bits(rows, cols, percent);
      const int64_t row = rows / 2 / 64 * 64, col = cols / 2 / 64 * 64;
      for (const Tile& tile : {Tile{0, 0, rows, cols}, Tile{row, col, rows - row, cols - col}, Tile{0, col, rows, cols - col}}) {
        test_transpose_bits(kernels, bits, tile);
        for (int width_log2 = 0; width_log2 < kWidths; ++width_log2) {
          test_transpose_values(kernels.values[width_log2], bits, tile, int64_t{1} << width_log2);
        }
      }
    }
    const int64_t blocks[][3] = {{1, 1, 9}, {3, 1, 70}, {2, 5, 13}, {16, 16, 8}, {4, 64, 3}, {1, 65, 4}, {2, 100, 25}, {2, 1500, 2}};
    for (const auto& [rows, block_cols, across] : blocks) {
      if (brief && block_cols > 1000) continue;
      place = std::string(table.isa) + size_text(rows, block_cols * across, percent) + " blocks of " + std::to_string(block_cols);
      const Bits bits = make_bits(rows, block_cols * across, percent);
      for (int width_log2 = 0; width_log2 < kWidths; ++width_log2) test_blocks(kernels, bits, block_cols, width_log2);
    }
  }
}

}  // namespace

void bitmask::testing::test_convert(bool brief) {
  for (int i = 0; i < cpu::isa_count(); ++i) {
    cpu::force_isa(cpu::isa_name(i));
    test_isa(cpu::kernels(), brief);
  }
}
