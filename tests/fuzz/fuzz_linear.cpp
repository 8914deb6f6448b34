// Fuzzes linear and the gradient of x with untrusted bitmasks, row offsets and values: every kernel of every table that this machine can
// run must return the first faulty row of its range (that of the gradient: the first whose offsets cannot be), write no column of y outside
// of it, and get the sums right where no row is faulty. Every buffer is exactly as large as promised, so that AddressSanitizer sees each
// byte too far.
//
// Input:
//
//   0     dtype (mod 4), 4 elements are small integers, whose sums are exact   8 no bias
//   1     rows of x, less one (mod as many as are worth it)
//   2, 3  first row of the range, and number of its rows (mod those there are); for the gradient, group of the first column and columns
//   4     parts with fewer than 48 rows as fuzzing.h says, bias, x, g
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "../native/formats.h"
#include "fuzzing.h"

using namespace bitmask;
using namespace bitmask::fuzzing;
using cpu::Kernels;
using cpu::LinearKernels;
using testing::Format;

namespace {

constexpr uint8_t kUntouched = 0xc5;

struct Input : Parts {
  int dtype;
  bool integers, biased;
  int64_t m_byte, begin, end, begin_col, end_col;
  Bytes bias, x, g;  // x and g have rows enough for every m

  const Format& format() const { return testing::kFormats[dtype]; }
};

// The most rows of x that are worth it: in the second panel, one row.
int64_t most_m(const LinearKernels& kernels) { return std::max(kernels.streaming_rows, kernels.panel_rows + 1); }

// Makes small integers of elements of any bits.
void make_integers(const Format& format, Bytes& elements) {
  for (size_t at = 0; at < elements.size(); at += static_cast<size_t>(format.width)) {
    format.store(format.encode(elements[at] % 33 - 16), &elements[at]);
  }
}

Input read_input(const uint8_t* data, size_t size, int64_t x_rows) {
  Reader reader(data, size);
  const int kind = reader.byte();
  const int64_t m_byte = reader.byte(), first = reader.byte(), count = reader.byte();
  const int dtype = kind % cpu::kLinearDtypes, width = testing::kFormats[dtype].width;
  Input input{read_parts(reader, width, 48), dtype, (kind & 4) != 0, (kind & 8) == 0, m_byte, 0, 0, 0, 0, {}, {}, {}};
  input.begin = input.rows == 0 ? 0 : first % input.rows;
  input.end = input.begin + count % (input.rows - input.begin + 1);
  input.begin_col = first % (input.cols / kGroup + 1) * kGroup;
  input.end_col = input.begin_col + count % (input.cols - input.begin_col + 1);
  input.bias = reader.take(input.rows * width);
  input.x = reader.take(x_rows * input.cols * width);
  input.g = reader.take(x_rows * input.rows * width);
  if (input.integers) {
    for (Bytes* elements : {&input.values, &input.bias, &input.x, &input.g}) make_integers(input.format(), *elements);
  }
  return input;
}

void require(bool ok, const char* kernel, const Kernels& kernels, const Input& input, int64_t m, const char* promise) {
  if (ok) return;
  std::fprintf(stderr,
               "%s, %s, %s, [%" PRId64 ", %" PRId64 "], nnz %" PRId64 ", rows %" PRId64 " to %" PRId64 ", columns %" PRId64 " to %" PRId64
               ", m %" PRId64 ": %s\n",
               kernels.isa, kernel, input.format().name, input.rows, input.cols, input.nnz, input.begin, input.end, input.begin_col,
               input.end_col, m, promise);
  std::abort();
}

double element(const Input& input, const Bytes& elements, int64_t index) {
  return input.format().decode(input.format().load(elements.data() + index * input.width));
}

// y [m, rows] as it must be after a call that found no fault: sums in the columns of the range.
Bytes multiply_reference(const Input& input, int64_t m) {
  Bytes y(static_cast<size_t>(m * input.rows * input.width), kUntouched);
  for (int64_t row = input.begin; row < input.end; ++row) {
    for (int64_t i = 0; i < m; ++i) {
      double sum = input.biased ? element(input, input.bias, row) : 0;
      int64_t at = input.row_offsets[static_cast<size_t>(row)];
      for (int64_t col = 0; col < input.cols; ++col) {
        if (input.bit(row, col)) sum += element(input, input.values, at++) * element(input, input.x, i * input.cols + col);
      }
      input.format().store(input.format().encode(sum), y.data() + (i * input.rows + row) * input.width);
    }
  }
  return y;
}

void test_result(const char* kernel, const Kernels& kernels, const Input& input, int64_t m, int64_t faulty, const Bytes& y) {
  const int64_t expected = first_faulty_reference(input, input.begin, input.end);
  require(faulty == expected, kernel, kernels, input, m, "returns another row than the reference");
  for (int64_t at = 0; at < static_cast<int64_t>(y.size()); ++at) {
    const int64_t row = at / input.width % input.rows;
    const bool inside = input.begin <= row && row < input.end;
    require(inside || y[static_cast<size_t>(at)] == kUntouched, kernel, kernels, input, m, "writes outside of its columns");
  }
  if (input.integers && expected == input.end) {
    require(y == multiply_reference(input, m), kernel, kernels, input, m, "gives other sums than the reference");
  }
}

// y [m, cols] as it must be after a gradient of rows without fault.
Bytes gradient_reference(const Input& input, int64_t m) {
  Bytes y(static_cast<size_t>(m * input.cols * input.width), kUntouched);
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> sums(static_cast<size_t>(input.cols), 0);
    for (int64_t row = 0; row < input.rows; ++row) {
      int64_t at = input.row_offsets[static_cast<size_t>(row)];
      const double factor = element(input, input.g, i * input.rows + row);
      for (int64_t col = 0; col < input.cols; ++col) {
        if (input.bit(row, col)) sums[static_cast<size_t>(col)] += factor * element(input, input.values, at++);
      }
    }
    for (int64_t col = input.begin_col; col < input.end_col; ++col) {
      input.format().store(input.format().encode(sums[static_cast<size_t>(col)]), y.data() + (i * input.cols + col) * input.width);
    }
  }
  return y;
}

void test_gradient(const Kernels& kernels, const Input& input, const BitmaskMatrix& w) {
  static std::map<const LinearKernels*, Bytes> scratches;
  const LinearKernels& linear = kernels.linear[input.dtype];
  Bytes& scratch = scratches[&linear];
  scratch.resize(static_cast<size_t>(linear.gradient_scratch_bytes));
  const int64_t m = 1 + input.m_byte % most_m(linear), panels = (m + linear.panel_rows - 1) / linear.panel_rows;
  const int64_t g_row = input.rows * input.width, lanes_row = (input.rows + kGroup - 1) / kGroup * linear.gradient_group_bytes;
  const Bytes g(input.g.begin(), input.g.begin() + m * g_row);
  Bytes packed(static_cast<size_t>(panels * linear.panel_rows * lanes_row)), readers(static_cast<size_t>(input.rows * linear.reader_bytes)),
      y(static_cast<size_t>(m * input.cols * input.width), kUntouched);
  for (int64_t i = 0; i < m; i += linear.panel_rows) {
    linear.pack_gradient(g.data() + i * g_row, std::min(linear.panel_rows, m - i), input.rows, packed.data() + i * lanes_row);
  }
  const int64_t faulty =
      linear.multiply_transposed(w, input.begin_col, input.end_col, packed.data(), m, y.data(), readers.data(), scratch.data());
  require(faulty == first_impossible_reference(input), "gradient", kernels, input, m, "returns another row than the reference");
  for (int64_t at = 0; at < static_cast<int64_t>(y.size()); ++at) {
    const int64_t col = at / input.width % input.cols;
    const bool inside = input.begin_col <= col && col < input.end_col;
    require(inside || y[static_cast<size_t>(at)] == kUntouched, "gradient", kernels, input, m, "writes outside of its columns");
  }
  if (input.integers && first_faulty_reference(input, 0, input.rows) == input.rows) {
    require(y == gradient_reference(input, m), "gradient", kernels, input, m, "gives other sums than the reference");
  }
}

void test_kernels(const Kernels& kernels, const Input& input) {
  static std::map<const LinearKernels*, Bytes> scratches;
  const LinearKernels& linear = kernels.linear[input.dtype];
  Bytes& scratch = scratches[&linear];
  scratch.resize(static_cast<size_t>(linear.scratch_bytes));
  const BitmaskMatrix w{input.values.data(), input.bitmasks.data(), input.row_offsets.data(), input.rows, input.cols, input.nnz};
  test_gradient(kernels, input, w);
  const void* const bias = input.biased ? input.bias.data() : nullptr;
  const int64_t x_row = input.cols * input.width, lanes_row = (input.cols + kGroup - 1) / kGroup * linear.group_bytes;

  const int64_t few = 1 + input.m_byte % linear.streaming_rows;
  const Bytes few_x(input.x.begin(), input.x.begin() + few * x_row);
  Bytes lanes(static_cast<size_t>(few * lanes_row)), few_y(static_cast<size_t>(few * input.rows * input.width), kUntouched);
  linear.pack_rows(few_x.data(), few, input.cols, lanes.data());
  const int64_t streamed = linear.stream(w, input.begin, input.end, lanes.data(), few, bias, few_y.data());
  test_result("stream", kernels, input, few, streamed, few_y);

  const int64_t m = 1 + input.m_byte % most_m(linear), panels = (m + linear.panel_rows - 1) / linear.panel_rows;
  const Bytes x(input.x.begin(), input.x.begin() + m * x_row);
  Bytes packed(static_cast<size_t>(panels * linear.panel_rows * lanes_row)),
      y(static_cast<size_t>(m * input.rows * input.width), kUntouched);
  for (int64_t i = 0; i < m; i += linear.panel_rows) {
    linear.pack_panel(x.data() + i * x_row, std::min(linear.panel_rows, m - i), input.cols, packed.data() + i * lanes_row);
  }
  if (input.end - input.begin > linear.tile_rows) return;
  const int64_t multiplied = linear.multiply(w, input.begin, input.end, packed.data(), m, bias, y.data(), scratch.data());
  test_result("multiply", kernels, input, m, multiplied, y);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<const Kernels*> tables = runnable_tables();
  int64_t x_rows = 0;
  for (const Kernels* table : tables) {
    for (const LinearKernels& kernels : table->linear) x_rows = std::max(x_rows, most_m(kernels));
  }
  const Input input = read_input(data, size, x_rows);
  for (const Kernels* table : tables) test_kernels(*table, input);
  return 0;
}
