// Fuzzes the products with a block-sparse weight with an untrusted index: either copying it throws std::invalid_argument, and so it must
// if and only if a rule is broken, or every kernel of every table that this machine can run stays inside of its memory, writes no line
// outside of its range, and gets the sums right. Every buffer is exactly as large as promised, so that AddressSanitizer sees each byte too
// far.
//
// Input, numbers least significant byte first:
//
//   0     dtype (mod 4), 4 elements are small integers, whose sums are exact   8 no bias
//         16 entries of the index have one byte, with a sign, else eight       32 an index without a fault: a bit for each block
//   1, 2  rows and columns of the weight (mod 64)      3, 4  rows and columns of a block, less one (mod 33)
//   5     rows of x, less one (mod 100)                6  number of blocks (mod 64; not with 32)
//   7, 8  the first line of the range and the number of its lines, or blocks (mod those there are)
//   9     mod 4: which part of the transposed index to change, 3 being none; / 4: which entry of it (mod those there are)
//   10    by what to replace that entry (8 bytes)
//   18    crow_indices, col_indices, values, bias, x, g
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "../../csrc/block_index.h"
#include "../native/formats.h"
#include "fuzzing.h"

using namespace bitmask;
using namespace bitmask::fuzzing;
using cpu::BlockKernels;
using cpu::Kernels;
using testing::Format;

namespace {

constexpr uint8_t kUntouched = 0xc5;

using Numbers = std::vector<int64_t>;

struct Input {
  int dtype;
  bool integers, biased;
  int64_t rows, cols, block_rows, block_cols, m;
  int64_t first, count;  // of the range
  int64_t replaced, replacement;
  Numbers starts, positions;
  Bytes values, bias, x, g;

  const Format& format() const { return testing::kFormats[dtype]; }
  int64_t width() const { return format().width; }
  int64_t row_lines() const { return blocks_across(rows, block_rows); }
  int64_t col_lines() const { return blocks_across(cols, block_cols); }
  int64_t blocks() const { return static_cast<int64_t>(positions.size()); }
  double element(const Bytes& elements, int64_t index) const { return format().decode(format().load(elements.data() + index * width())); }
};

// Makes small integers of elements of any bits.
void make_integers(const Format& format, Bytes& elements) {
  for (size_t at = 0; at < elements.size(); at += static_cast<size_t>(format.width)) {
    format.store(format.encode(elements[at] % 33 - 16), &elements[at]);
  }
}

// An index of the blocks that bits name.
void read_honest_index(Reader& reader, Input& input) {
  input.starts.push_back(0);
  for (int64_t line = 0; line < input.row_lines(); ++line) {
    int bits = 0;
    for (int64_t position = 0; position < input.col_lines(); ++position) {
      if (position % 8 == 0) bits = reader.byte();
      if ((bits >> (position % 8) & 1) != 0) input.positions.push_back(position);
    }
    input.starts.push_back(input.blocks());
  }
}

void read_any_index(Reader& reader, Input& input, int64_t blocks, bool narrow) {
  const auto entry = [&] { return narrow ? static_cast<int8_t>(reader.byte()) : reader.number(8); };
  for (int64_t i = 0; i <= input.row_lines(); ++i) input.starts.push_back(entry());
  for (int64_t i = 0; i < blocks; ++i) input.positions.push_back(entry());
}

Input read_input(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  const int kind = reader.byte();
  Input input{};
  input.dtype = kind % cpu::kLinearDtypes;
  input.integers = (kind & 4) != 0;
  input.biased = (kind & 8) == 0;
  input.rows = reader.byte() % 64;
  input.cols = reader.byte() % 64;
  input.block_rows = 1 + reader.byte() % 33;
  input.block_cols = 1 + reader.byte() % 33;
  input.m = 1 + reader.byte() % 100;
  const int64_t blocks = reader.byte() % 64;
  input.first = reader.byte();
  input.count = reader.byte();
  input.replaced = reader.byte();
  input.replacement = reader.number(8);
  (kind & 32) != 0 ? read_honest_index(reader, input) : read_any_index(reader, input, blocks, (kind & 16) != 0);
  input.starts.shrink_to_fit();
  input.positions.shrink_to_fit();
  input.values = reader.take(input.blocks() * input.block_rows * input.block_cols * input.width());
  input.bias = reader.take(input.rows * input.width());
  input.x = reader.take(input.m * input.cols * input.width());
  input.g = reader.take(input.m * input.rows * input.width());
  if (input.integers) {
    for (Bytes* elements : {&input.values, &input.bias, &input.x, &input.g}) make_integers(input.format(), *elements);
  }
  return input;
}

void require(bool ok, const char* what, const Input& input, const char* promise) {
  if (ok) return;
  std::fprintf(stderr, "%s, %s, [%" PRId64 ", %" PRId64 "] of %" PRId64 "x%" PRId64 ", %" PRId64 " blocks, m %" PRId64 ": %s\n", what,
               input.format().name, input.rows, input.cols, input.block_rows, input.block_cols, input.blocks(), input.m, promise);
  std::abort();
}

// ---------------------------------------------------------------------------------------------------------------- the index

// Whether starts and positions break no rule.
bool can_be(const Numbers& starts, const Numbers& positions, int64_t limit) {
  const int64_t blocks = static_cast<int64_t>(positions.size());
  if (starts.front() != 0 || starts.back() != blocks || !std::is_sorted(starts.begin(), starts.end())) return false;
  for (size_t line = 0; line + 1 < starts.size(); ++line) {
    for (size_t i = static_cast<size_t>(starts[line]); i < static_cast<size_t>(starts[line + 1]); ++i) {
      const bool first = i == static_cast<size_t>(starts[line]);
      if (positions[i] < (first ? 0 : positions[i - 1] + 1) || positions[i] >= limit) return false;
    }
  }
  return true;
}

// Whether an order, with a transposed index that can be, names each block once, as they lie row by row.
bool can_be_order(const BlockIndex& index, const Numbers& order) {
  std::vector<std::pair<int64_t, int64_t>> places(order.size(), {-1, -1});
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] < 0 || order[i] >= index.blocks() || places[static_cast<size_t>(order[i])].first >= 0) return false;
    places[static_cast<size_t>(order[i])] = {index.positions[i], index.lines[i]};
  }
  return std::is_sorted(places.begin(), places.end());
}

// Whether take() does not throw what it must throw if a rule is broken.
template <class Take>
bool accepts(const Take& take) {
  try {
    take();
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

// ---------------------------------------------------------------------------------------------------------------- products

BlockMatrix matrix_of(const Input& input, const BlockIndex& index) {
  return {input.values.data(),    input.rows,         input.cols,
          input.block_rows,       input.block_cols,   index.line_starts.data(),
          index.positions.data(), index.lines.data(), index.order.empty() ? nullptr : index.order.data()};
}

// A range of what there are `count` of.
struct Range {
  int64_t begin, end;

  Range(const Input& input, int64_t count) : begin(count == 0 ? 0 : input.first % count), end(begin + input.count % (count - begin + 1)) {}
};

// y [m, y_cols] as a product of rows [m, depth] with the lines must leave it.
Bytes product_reference(const Input& input, const BlockMatrix& w, const Range& lines, bool transposed) {
  const int64_t y_cols = transposed ? w.cols : w.rows, depth = transposed ? w.rows : w.cols;
  const int64_t side = transposed ? w.block_cols : w.block_rows, across = transposed ? w.block_rows : w.block_cols;
  Bytes y(static_cast<size_t>(input.m * y_cols * input.width()), kUntouched);
  for (int64_t i = 0; i < input.m; ++i) {
    for (int64_t col = lines.begin * side; col < std::min(lines.end * side, y_cols); ++col) {
      const int64_t line = col / side;
      double sum = input.biased && !transposed ? input.element(input.bias, col) : 0;
      for (int64_t at = w.line_starts[line]; at < w.line_starts[line + 1]; ++at) {
        for (int64_t k = 0; k < across && w.positions[at] * across + k < depth; ++k) {
          const int64_t row_inside = transposed ? k : col % side, col_inside = transposed ? col % side : k;
          const int64_t place = w.order == nullptr ? at : w.order[at];
          sum += input.element(transposed ? input.g : input.x, i * depth + w.positions[at] * across + k) *
                 input.element(input.values, (place * w.block_rows + row_inside) * w.block_cols + col_inside);
        }
      }
      input.format().store(input.format().encode(sum), y.data() + (i * y_cols + col) * input.width());
    }
  }
  return y;
}

Bytes sample_reference(const Input& input, const BlockMatrix& w, const Range& blocks) {
  const int64_t elements = w.block_rows * w.block_cols;
  Bytes values(static_cast<size_t>(input.blocks() * elements * input.width()), kUntouched);
  for (int64_t at = blocks.begin * elements; at < blocks.end * elements; ++at) {
    const int64_t row = w.lines[at / elements] * w.block_rows + at % elements / w.block_cols;
    const int64_t col = w.positions[at / elements] * w.block_cols + at % elements % w.block_cols;
    double sum = 0;
    for (int64_t i = 0; i < input.m && row < w.rows && col < w.cols; ++i) {
      sum += input.element(input.g, i * w.rows + row) * input.element(input.x, i * w.cols + col);
    }
    input.format().store(input.format().encode(sum), values.data() + at * input.width());
  }
  return values;
}

// `got`, rows of `cols` elements, must be untouched outside of the columns [begin, end); inside it must be the expected one where sums are
// exact. Zeros have any sign.
void test_result(const char* kernel, const Input& input, const Bytes& got, const Bytes& expected, int64_t cols, int64_t begin,
                 int64_t end) {
  const Format& format = input.format();
  for (int64_t at = 0; at < static_cast<int64_t>(expected.size()); at += input.width()) {
    const int64_t col = at / input.width() % cols;
    const uint64_t bits = format.load(got.data() + at), wanted = format.load(expected.data() + at);
    if (col < begin || col >= end) require(bits == wanted, kernel, input, "writes outside of its range");
    if (input.integers) require(format.decode(bits) == format.decode(wanted), kernel, input, "gives other sums than the reference");
  }
}

void* scratch_of(const BlockKernels& kernels) {
  static std::map<const BlockKernels*, Bytes> scratches;
  Bytes& scratch = scratches[&kernels];
  scratch.resize(static_cast<size_t>(kernels.scratch_bytes));
  return scratch.data();
}

Bytes packed_memory(int64_t bytes) { return Bytes(static_cast<size_t>(bytes), 0xff); }

using Tables = std::vector<const Kernels*>;

void test_rows(const Tables& tables, const Input& input, const BlockMatrix& w) {
  const Range lines(input, input.row_lines());
  const Bytes expected = product_reference(input, w, lines, false);
  const int64_t begin = lines.begin * w.block_rows, end = lines.end * w.block_rows;
  const void* const bias = input.biased ? input.bias.data() : nullptr;
  for (const Kernels* table : tables) {
    const BlockKernels& kernels = table->block[input.dtype];
    if (input.m <= kernels.streaming_rows) {
      Bytes rows = packed_memory(kernels.rows_bytes(input.m, w.cols, w.block_cols)), y(expected.size(), kUntouched);
      kernels.pack_rows(input.x.data(), input.m, w.cols, w.block_cols, rows.data());
      kernels.stream(w, lines.begin, lines.end, rows.data(), input.m, bias, y.data(), w.rows, scratch_of(kernels));
      test_result("stream", input, y, expected, w.rows, begin, end);
    }
    Bytes tiles = packed_memory(kernels.tiles_bytes(input.m, w.cols)), y(expected.size(), kUntouched);
    kernels.pack_tiles(input.x.data(), input.m, w.cols, tiles.data());
    kernels.multiply(w, lines.begin, lines.end, tiles.data(), input.m, bias, y.data(), w.rows, scratch_of(kernels));
    test_result("multiply", input, y, expected, w.rows, begin, end);
  }
}

void test_sample(const Tables& tables, const Input& input, const BlockMatrix& w) {
  const Range blocks(input, input.blocks());
  const Bytes expected = sample_reference(input, w, blocks);
  const int64_t elements = w.block_rows * w.block_cols;
  for (const Kernels* table : tables) {
    const BlockKernels& kernels = table->block[input.dtype];
    Bytes g_columns = packed_memory(kernels.columns_bytes(input.m, w.rows, w.block_rows)),
          x_columns = packed_memory(kernels.columns_bytes(input.m, w.cols, w.block_cols)), values(expected.size(), kUntouched);
    kernels.pack_columns(input.g.data(), input.m, w.rows, w.block_rows, 0, input.row_lines(), g_columns.data());
    kernels.pack_columns(input.x.data(), input.m, w.cols, w.block_cols, 0, input.col_lines(), x_columns.data());
    kernels.sample(w, blocks.begin, blocks.end, g_columns.data(), x_columns.data(), input.m, nullptr, nullptr, values.data());
    test_result("sample", input, values, expected, input.blocks() * elements, blocks.begin * elements, blocks.end * elements);
  }
}

void test_columns(const Tables& tables, const Input& input, const BlockMatrix& w) {
  const Range lines(input, input.col_lines());
  const Bytes expected = product_reference(input, w, lines, true);
  for (const Kernels* table : tables) {
    const BlockKernels& kernels = table->block[input.dtype];
    Bytes tiles = packed_memory(kernels.tiles_bytes(input.m, w.rows)), y(expected.size(), kUntouched);
    kernels.pack_tiles(input.g.data(), input.m, w.rows, tiles.data());
    kernels.multiply_transposed(w, lines.begin, lines.end, tiles.data(), input.m, y.data(), scratch_of(kernels));
    test_result("transposed", input, y, expected, w.cols, lines.begin * w.block_cols, lines.end * w.block_cols);
  }
}

// The transposed index, an entry of which may be another.
void test_transposed(const Tables& tables, const Input& input, const BlockIndex& index) {
  BlockIndex parts = transpose(index, input.col_lines());
  require(can_be(parts.line_starts, parts.positions, input.row_lines()) && can_be_order(parts, parts.order), "transpose", input,
          "gives an index that cannot be");
  const int64_t which = input.replaced % 4;
  Numbers* const replaced[] = {&parts.line_starts, &parts.positions, &parts.order};
  if (which < 3 && !replaced[which]->empty()) {
    (*replaced[which])[static_cast<size_t>(input.replaced / 4) % replaced[which]->size()] = input.replacement;
  }
  BlockIndex taken;
  const bool accepted = accepts([&] {
    taken =
        copy_block_index(kByColumn, parts.line_starts.data(), input.col_lines(), parts.positions.data(), input.blocks(), input.row_lines());
  });
  require(accepted == can_be(parts.line_starts, parts.positions, input.row_lines()), "ccol_indices", input, "wrongly accepted or refused");
  if (!accepted) return;
  const bool ordered = accepts([&] { add_order(taken, parts.order.data()); });
  require(ordered == can_be_order(taken, parts.order), "order", input, "wrongly accepted or refused");
  if (!ordered) return;
  test_columns(tables, input, matrix_of(input, taken));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Tables tables = runnable_tables();
  const Input input = read_input(data, size);
  BlockIndex index;
  const bool accepted = accepts([&] {
    index = copy_block_index(kByRow, input.starts.data(), input.row_lines(), input.positions.data(), input.blocks(), input.col_lines());
  });
  require(accepted == can_be(input.starts, input.positions, input.col_lines()), "crow_indices", input, "wrongly accepted or refused");
  if (!accepted) return 0;
  const BlockMatrix w = matrix_of(input, index);
  test_rows(tables, input, w);
  test_sample(tables, input, w);
  test_transposed(tables, input, index);
  return 0;
}
