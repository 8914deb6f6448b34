// Fuzzes decompression of untrusted bitmasks, row offsets and values, as the library does it: first_faulty_row() proves the data, and what
// it passes is expanded by every kernel table that this machine can run. The kernels' promise to stay within bounds whatever the bitmasks
// say is tried on all data, proven or not. Every buffer is exactly as large as promised, so that AddressSanitizer sees each byte too far.
//
// Input: log2 of the element width (mod 5), then parts with fewer than 8 rows as fuzzing.h says. The top four bits of the flags are the row
// where a second thread would begin.
#include <algorithm>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "fuzzing.h"

using namespace bitmask;
using namespace bitmask::fuzzing;
using cpu::CodecKernels;
using cpu::Kernels;

namespace {

struct Input : Parts {
  int width_log2;
  int64_t split;  // rows from here on are expanded by themselves
};

Input read_input(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  const int width_log2 = reader.byte() % kWidths;
  const Parts parts = read_parts(reader, 1 << width_log2, 8);
  return {parts, width_log2, parts.rows == 0 ? 0 : (parts.flags >> 4) % parts.rows};
}

void require(bool ok, const Kernels& kernels, const Input& input, const char* promise) {
  if (ok) return;
  std::fprintf(stderr, "%s, width %d, [%" PRId64 ", %" PRId64 "], nnz %" PRId64 ": %s\n", kernels.isa, input.width, input.rows, input.cols,
               input.nnz, promise);
  std::abort();
}

// What expanding the values from the first-th on must give: marked elements past the last value are zero.
Bytes expand_reference(const Input& input, int64_t first) {
  Bytes dense(static_cast<size_t>(input.rows * input.cols * input.width), 0);
  for (int64_t row = 0; row < input.rows; ++row) {
    for (int64_t col = 0; col < input.cols; ++col) {
      if (!input.bit(row, col) || first == input.nnz) continue;
      std::memcpy(dense.data() + (row * input.cols + col) * input.width, input.values.data() + first++ * input.width,
                  static_cast<size_t>(input.width));
    }
  }
  return dense;
}

// Bitmasks that agree with nothing must neither read nor write out of bounds, and packing must undo expanding.
void test_bounds(const Kernels& kernels, const Input& input, const Bytes& expected) {
  const CodecKernels& codec = kernels.codec[input.width_log2];
  Bytes dense(expected.size(), 0xc5);
  codec.expand_values(input.values.data(), input.nnz, input.bitmasks.data(), input.rows, input.cols, dense.data());
  require(dense == expected, kernels, input, "expand_values gives other elements than the reference");

  int64_t marked = 0;
  for (int64_t row = 0; row < input.rows; ++row) {
    for (int64_t col = 0; col < input.cols; ++col) marked += input.bit(row, col);
  }
  Bytes values(input.values.size());
  codec.pack_values(dense.data(), input.bitmasks.data(), input.rows, input.cols, values.data(), input.nnz);
  values.resize(static_cast<size_t>((marked < input.nnz ? marked : input.nnz) * input.width));
  require(std::equal(values.begin(), values.end(), input.values.begin()), kernels, input, "pack_values does not undo expand_values");
}

// Expands the rows [begin, end) of proven data from their own values alone into their place in `dense`.
void expand_rows(const Kernels& kernels, const Input& input, int64_t begin, int64_t end, Bytes& dense) {
  if (begin == end) return;
  const int64_t start = input.row_offsets[static_cast<size_t>(begin)];
  const int64_t stop = end < input.rows ? input.row_offsets[static_cast<size_t>(end)] : input.nnz;
  const Bytes values(input.values.begin() + start * input.width, input.values.begin() + stop * input.width);
  const Bytes bitmasks(input.bitmasks.begin() + begin * input.row_bytes, input.bitmasks.begin() + end * input.row_bytes);
  kernels.codec[input.width_log2].expand_values(values.data(), stop - start, bitmasks.data(), end - begin, input.cols,
                                                dense.data() + begin * input.cols * input.width);
}

// Data without a fault expands in parts as in one piece, the later part first so that the earlier one must leave it alone. Compressed
// again, it keeps all but the values that were stored as zeros.
void test_proven(const Kernels& kernels, const Input& input, const Bytes& expected) {
  Bytes dense(expected.size(), 0xc5);
  expand_rows(kernels, input, input.split, input.rows, dense);
  expand_rows(kernels, input, 0, input.split, dense);
  require(dense == expected, kernels, input, "proven data expands to other elements than the reference");

  ZeroTest all_bits;
  std::memset(all_bits.bytes, 0xff, sizeof(all_bits.bytes));
  Bytes bitmasks(input.bitmasks.size());
  std::vector<int64_t> counts(static_cast<size_t>(input.rows));
  kernels.codec[input.width_log2].build_bitmasks(dense.data(), input.rows, input.cols, all_bits, bitmasks.data(), counts.data());
  Bytes rebuilt(bitmasks.size(), 0);
  std::vector<int64_t> recounted(counts.size(), 0);
  for (int64_t row = 0; row < input.rows; ++row) {
    for (int64_t col = 0; col < input.cols; ++col) {
      bool nonzero = false;
      for (int64_t i = 0; i < input.width; ++i) nonzero |= dense[static_cast<size_t>((row * input.cols + col) * input.width + i)] != 0;
      uint8_t& byte = rebuilt[static_cast<size_t>(row * input.row_bytes + col / 8)];
      byte = static_cast<uint8_t>(byte | nonzero << (col % 8));
      recounted[static_cast<size_t>(row)] += nonzero;
      require(!nonzero || input.bit(row, col), kernels, input, "an unmarked element came out non-zero");
    }
  }
  require(bitmasks == rebuilt && counts == recounted, kernels, input, "build_bitmasks marks other elements than the reference");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<const Kernels*> tables = runnable_tables();
  const Input input = read_input(data, size);
  const int64_t faulty = first_faulty_reference(input, 0, input.rows);
  const bool proven = faulty == input.rows;
  const Bytes from_first = expand_reference(input, 0);
  const Bytes from_offset = proven && input.rows > 0 ? expand_reference(input, input.row_offsets[0]) : Bytes();
  for (const Kernels* table : tables) {
    const Kernels& kernels = *table;
    require(
        kernels.first_faulty_row(input.bitmasks.data(), input.row_offsets.data(), input.rows, input.cols, input.nnz, input.nnz) == faulty,
        kernels, input, "first_faulty_row gives another row than the reference");
    test_bounds(kernels, input, from_first);
    if (proven) test_proven(kernels, input, from_offset);
  }
  return 0;
}
