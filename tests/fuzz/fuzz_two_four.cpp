// Fuzzes 2:4. Unpacking untrusted metadata and values: every table that this machine can run must return the first faulty row, and without
// one the right elements, which packing takes back. Packing and pruning any elements: the right row is refused, nothing but what should go
// is lost. Every buffer is exactly as large as promised, so that AddressSanitizer sees each byte too far.
//
// Input, numbers least significant byte first:
//
//   0     log2 of the element width (mod 4)   4, 8 how magnitudes compare, in the order of Magnitude
//         16 zeros have any sign, where magnitudes have one
//         32 metadata without a fault         64 elements with at most two non-zeros in each four
//   1     rows (mod 9)      2  columns / 4 (mod 81)
//   3     metadata, values, elements
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzzing.h"

using namespace bitmask;
using namespace bitmask::fuzzing;
using cpu::Kernels;
using cpu::TwoFourCodecKernels;

namespace {

struct Input {
  int width_log2, width;
  bool any_sign;
  Magnitude magnitude;
  int64_t rows, cols, row_bytes;
  Bytes metadata, values, dense;

  bool bit(const Bytes& bits, int64_t row, int64_t col) const {
    return (bits[static_cast<size_t>(row * row_bytes + col / 8)] >> (col % 8) & 1) != 0;
  }
  uint64_t element(const Bytes& elements, int64_t index) const {
    uint64_t bits = 0;
    std::memcpy(&bits, elements.data() + index * width, static_cast<size_t>(width));
    return bits;
  }
  uint64_t sign() const { return uint64_t{1} << (8 * width - 1); }
  bool is_zero(uint64_t bits) const { return bits == 0 || (any_sign && bits == sign()); }
  // One more than the magnitude, or zero.
  unsigned __int128 rank(uint64_t bits) const {
    if (is_zero(bits)) return 0;
    const unsigned __int128 one = 1, all = one << (8 * width);
    if (magnitude == Magnitude::kUnsigned) return one + bits;
    if (magnitude == Magnitude::kSigned) return one + (bits < sign() ? bits : all - bits);
    return one + (magnitude == Magnitude::kNoNegativeZero && bits == sign() ? bits : bits % sign());
  }
  ZeroTest zero_test() const {
    ZeroTest test;
    for (int i = 0; i < 16; ++i) test.bytes[i] = any_sign && i % width == width - 1 ? 0x7f : 0xff;
    return test;
  }
};

void require(bool ok, const Kernels& kernels, const Input& input, const char* promise) {
  if (ok) return;
  std::fprintf(stderr, "%s, width %d, [%" PRId64 ", %" PRId64 "]: %s\n", kernels.isa, input.width, input.rows, input.cols, promise);
  std::abort();
}

// The zeros that are stored with the non-zeros of `mask`, at most two.
int complete(int mask) {
  switch (mask) {
    case 1:
      return 0x5;
    case 2:
      return 0x6;
    case 0:
    case 4:
    case 8:
      return 0xc;
    default:
      return mask;
  }
}

int count(int mask) { return __builtin_popcount(static_cast<unsigned>(mask)); }

Input read_input(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  const int kind = reader.byte();
  Input input{};
  input.width_log2 = kind % 4;
  input.width = 1 << input.width_log2;
  input.magnitude = static_cast<Magnitude>(kind >> 2 & 3);
  input.any_sign = (kind & 16) != 0 && input.magnitude == Magnitude::kSignMagnitude;
  input.rows = reader.byte() % 9;
  input.cols = reader.byte() % 81 * 4;
  input.row_bytes = bitmask_bytes(input.cols);
  input.metadata = reader.take(input.rows * input.row_bytes);
  input.values = reader.take(input.rows * input.cols / 2 * input.width);
  input.dense = reader.take(input.rows * input.cols * input.width);
  for (int64_t at = 0; at < input.rows * input.row_bytes && (kind & 32) != 0; ++at) {
    const auto honest = [](int nibble) { return count(nibble) == 2 ? nibble : complete(nibble & -nibble); };
    uint8_t& byte = input.metadata[static_cast<size_t>(at)];
    const bool half = input.cols % 8 == 4 && at % input.row_bytes == input.row_bytes - 1;
    byte = static_cast<uint8_t>(honest(byte & 15) | (half ? 0 : honest(byte >> 4) << 4));
  }
  for (int64_t at = 0; at < input.rows * input.cols && (kind & 64) != 0; ++at) {
    if ((at % 4 + at / 4) % 4 < 2) std::memset(&input.dense[static_cast<size_t>(at * input.width)], 0, static_cast<size_t>(input.width));
  }
  return input;
}

// ---------------------------------------------------------------------------------------------------------------- unpacking

int64_t first_faulty_reference(const Input& input) {
  for (int64_t row = 0; row < input.rows; ++row) {
    for (int64_t col = 0; col < input.row_bytes * 8; col += 4) {
      int marked = 0;
      for (int64_t i = col; i < col + 4; ++i) marked += input.bit(input.metadata, row, i);
      if (marked != (col < input.cols ? 2 : 0)) return row;
    }
  }
  return input.rows;
}

Bytes unpack_reference(const Input& input) {
  Bytes dense(input.dense.size(), 0);
  int64_t taken = 0;
  for (int64_t row = 0; row < input.rows; ++row) {
    for (int64_t col = 0; col < input.cols; ++col) {
      if (!input.bit(input.metadata, row, col)) continue;
      std::memcpy(dense.data() + (row * input.cols + col) * input.width, input.values.data() + taken++ * input.width,
                  static_cast<size_t>(input.width));
    }
  }
  return dense;
}

void test_unpack(const Kernels& kernels, const Input& input) {
  const TwoFourCodecKernels& codec = kernels.two_four_codec[input.width_log2];
  const int64_t faulty = first_faulty_reference(input);
  require(kernels.first_faulty_metadata(input.metadata.data(), input.rows, input.cols) == faulty, kernels, input,
          "first_faulty_metadata gives another row than the reference");
  Bytes dense(input.dense.size(), 0xc5);
  const int64_t row = codec.unpack(input.values.data(), input.metadata.data(), input.rows, input.cols, dense.data());
  require(row == faulty, kernels, input, "unpack gives another row than the reference");
  if (faulty < input.rows) return;
  require(dense == unpack_reference(input), kernels, input, "unpack gives other elements than the reference");

  Bytes values(input.values.size()), metadata(input.metadata.size()), again(dense.size(), 0xc5);
  require(codec.pack(dense.data(), input.rows, input.cols, input.zero_test(), values.data(), metadata.data()) == input.rows, kernels, input,
          "pack refuses what has been unpacked");
  require(codec.unpack(values.data(), metadata.data(), input.rows, input.cols, again.data()) == input.rows, kernels, input,
          "unpack refuses what has been packed");
  for (int64_t i = 0; i < input.rows * input.cols; ++i) {
    const uint64_t before = input.element(dense, i), after = input.element(again, i);
    require(before == after || (after == 0 && input.is_zero(before)), kernels, input, "pack loses an element");
  }
}

// ---------------------------------------------------------------------------------------------------------------- packing

// Which columns of the four elements from `first` on are stored.
int stored_reference(const Input& input, int64_t first) {
  int mask = 0;
  for (int i = 0; i < 4; ++i) {
    const auto own = input.rank(input.element(input.dense, first + i));
    int larger = 0;
    for (int j = 0; j < 4; ++j) {
      const auto other = input.rank(input.element(input.dense, first + j));
      larger += other > own || (other == own && j < i);
    }
    mask |= (own != 0 && larger < 2) << i;
  }
  return complete(mask);
}

void test_pack(const Kernels& kernels, const Input& input) {
  const TwoFourCodecKernels& codec = kernels.two_four_codec[input.width_log2];
  Bytes metadata(input.metadata.size(), 0), values, pruned(input.dense.size(), 0);
  int64_t crowded = input.rows;
  for (int64_t at = 0; at < input.rows * input.cols; at += 4) {
    const int64_t row = at / input.cols, col = at % input.cols;
    const int stored = stored_reference(input, at);
    uint8_t& byte = metadata[static_cast<size_t>(row * input.row_bytes + col / 8)];
    byte = static_cast<uint8_t>(byte | stored << (col % 8));
    int nonzero = 0;
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const element = input.dense.data() + (at + i) * input.width;
      nonzero += !input.is_zero(input.element(input.dense, at + i));
      if ((stored >> i & 1) == 0) continue;
      values.insert(values.end(), element, element + input.width);
      std::memcpy(pruned.data() + (at + i) * input.width, element, static_cast<size_t>(input.width));
    }
    if (nonzero > 2 && row < crowded) crowded = row;
  }

  Bytes got_values(values.size(), 0xc5), got_metadata(metadata.size(), 0xc5), dense = input.dense;
  const int64_t row = codec.pack(dense.data(), input.rows, input.cols, input.zero_test(), got_values.data(), got_metadata.data());
  require(row == crowded, kernels, input, "pack refuses another row than the reference");
  require(crowded < input.rows || (got_values == values && got_metadata == metadata), kernels, input, "pack differs from the reference");
  codec.pack_largest(dense.data(), input.rows, input.cols, input.zero_test(), input.magnitude, got_values.data(), got_metadata.data());
  require(got_values == values && got_metadata == metadata, kernels, input, "pack_largest differs from the reference");
  codec.prune(dense.data(), input.rows, input.cols, input.zero_test(), input.magnitude);
  require(dense == pruned, kernels, input, "prune differs from the reference");
}

// Each block of 4 x 4 keeps its elements or loses them, not more than two of a row or column, and every table does the same.
void test_transposable(const Kernels& kernels, const Input& input, int dtype, Bytes& first) {
  const int64_t rows = input.rows / 4 * 4;
  Bytes dense(input.dense.begin(), input.dense.begin() + rows * input.cols * input.width);
  kernels.two_four_linear[dtype].prune_transposable(dense.data(), rows, input.cols);
  for (int64_t at = 0; at < rows * input.cols; ++at) {
    const uint64_t after = input.element(dense, at);
    require(after == 0 || after == input.element(input.dense, at), kernels, input, "prune_transposable makes up an element");
    const int64_t row = at / input.cols, col = at % input.cols;
    int in_row = 0, in_col = 0;
    for (int64_t i = 0; i < 4; ++i) {
      in_row += input.element(dense, row * input.cols + col / 4 * 4 + i) != 0;
      in_col += input.element(dense, (row / 4 * 4 + i) * input.cols + col) != 0;
    }
    require(in_row <= 2 && in_col <= 2, kernels, input, "prune_transposable keeps more than two elements");
  }
  if (first.empty()) first = dense;
  require(dense == first, kernels, input, "prune_transposable differs from that of another table");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<const Kernels*> tables = runnable_tables();
  const Input input = read_input(data, size);
  Bytes pruned[cpu::kLinearDtypes];
  for (const Kernels* kernels : tables) {
    test_unpack(*kernels, input);
    test_pack(*kernels, input);
    if (input.width == 4) test_transposable(*kernels, input, cpu::kFloat32, pruned[cpu::kFloat32]);
    if (input.width == 2) test_transposable(*kernels, input, cpu::kBfloat16, pruned[cpu::kBfloat16]);
    if (input.width == 2) test_transposable(*kernels, input, cpu::kFloat16, pruned[cpu::kFloat16]);
    if (input.width == 8) test_transposable(*kernels, input, cpu::kFloat64, pruned[cpu::kFloat64]);
  }
  return 0;
}
