// Tests the CPU kernels without torch: every kernel table that this machine can run, every element width, against slow references.
//
//   test_kernels [--brief] [ISA...]  ISAs that must be found here, best first; none given: whichever there are. Brief: for emulators
//   test_kernels --list              prints the names of those ISAs
//   test_kernels --dispatch          tests the choice of the table only, with BITMASK_ISA as it is
//   test_kernels --plant ERROR       has the kernels in use read past a buffer, which AddressSanitizer must report: expand, stream,
//   multiply, gradient, block_stream, block_multiply, block_transposed, block_sample, pack_24, unpack_24, metadata_24, prune_24,
//   transposable_24, list_columns, transpose_values, expand_blocks
//
// The codec is tested here, products in test_linear.cpp, test_linear_gradient.cpp, test_block.cpp and test_two_four_linear.cpp, packing and
// pruning of 2:4 in test_two_four_codec.cpp and test_two_four_prune.cpp, conversions in test_convert.cpp. Buffers are exactly as large as
// the kernels were promised. AddressSanitizer watches their ends; builds without it put canary bytes around them instead. Prints each
// failed check and "N passed, M failed".
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "testing.h"

using namespace bitmask;
using namespace bitmask::testing;
using cpu::CodecKernels;
using cpu::Kernels;

namespace {

// ---------------------------------------------------------------------------------------------------------------- references

// An element of `width` bytes made of parts of `part` bytes; with `sign`, the top bit of each part is a sign and negative zero is zero.
struct Kind {
  const char* name;
  int width_log2;
  int part;
  bool sign;

  int width() const { return 1 << width_log2; }
};

constexpr Kind kKinds[] = {
    {"bits8", 0, 1, false},  {"float8", 0, 1, true},    {"bits16", 1, 2, false},   {"float16", 1, 2, true},
    {"bits32", 2, 4, false}, {"float32", 2, 4, true},   {"complex32", 2, 2, true}, {"bits64", 3, 8, false},
    {"float64", 3, 8, true}, {"complex64", 3, 4, true}, {"bits128", 4, 16, false}, {"complex128", 4, 8, true},
};

ZeroTest zero_test(const Kind& kind) {
  ZeroTest test;
  for (int i = 0; i < 16; ++i) test.bytes[i] = kind.sign && i % kind.part == kind.part - 1 ? 0x7f : 0xff;
  return test;
}

// The zero rule in the words of its definition: parts that the host can compare are compared with zero, bits are looked at elsewhere.
bool is_zero(const uint8_t* element, const Kind& kind) {
  for (int at = 0; at < kind.width(); at += kind.part) {
    if (kind.sign && kind.part == 4) {
      float value;
      std::memcpy(&value, element + at, 4);
      if (!(value == 0)) return false;
    } else if (kind.sign && kind.part == 8) {
      double value;
      std::memcpy(&value, element + at, 8);
      if (!(value == 0)) return false;
    } else {
      for (int i = 0; i < kind.part; ++i) {
        const bool top = i == kind.part - 1;
        if ((kind.sign && top ? element[at + i] << 1 & 0xff : element[at + i]) != 0) return false;
      }
    }
  }
  return true;
}

// A [rows, cols] matrix of W-byte elements with its compressed form.
struct Matrix {
  int64_t rows, cols;
  int width;
  Bytes dense, bitmasks, values;
  std::vector<int64_t> counts;

  int64_t row_bytes() const { return (cols + 7) / 8; }
  int64_t nnz() const { return static_cast<int64_t>(values.size()) / width; }
  const uint8_t* element(int64_t row, int64_t col) const { return dense.data() + (row * cols + col) * width; }
};

void compress_reference(const Kind& kind, Matrix& matrix) {
  matrix.bitmasks.assign(static_cast<size_t>(matrix.rows * matrix.row_bytes()), 0);
  matrix.values.clear();
  matrix.counts.assign(static_cast<size_t>(matrix.rows), 0);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    for (int64_t col = 0; col < matrix.cols; ++col) {
      const uint8_t* element = matrix.element(row, col);
      if (is_zero(element, kind)) continue;
      uint8_t& mask = matrix.bitmasks[static_cast<size_t>(row * matrix.row_bytes() + col / 8)];
      mask = static_cast<uint8_t>(mask | 1 << (col % 8));
      matrix.values.insert(matrix.values.end(), element, element + matrix.width);
      ++matrix.counts[static_cast<size_t>(row)];
    }
  }
}

// What expanding `nnz` values by any bitmasks must give: marked elements past the last value are zero.
Bytes expand_reference(const Bytes& values, const Bytes& bitmasks, int64_t rows, int64_t cols, int width) {
  Bytes dense(static_cast<size_t>(rows * cols * width), 0);
  const int64_t row_bytes = (cols + 7) / 8, nnz = static_cast<int64_t>(values.size()) / width;
  int64_t taken = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      if (!bit(bitmasks.data() + row * row_bytes, col) || taken == nnz) continue;
      std::memcpy(dense.data() + (row * cols + col) * width, values.data() + taken * width, static_cast<size_t>(width));
      ++taken;
    }
  }
  return dense;
}

// The first `nnz` elements that any bitmasks mark.
Bytes pack_reference(const Bytes& dense, const Bytes& bitmasks, int64_t rows, int64_t cols, int width, int64_t nnz) {
  Bytes values;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      if (!bit(bitmasks.data() + row * ((cols + 7) / 8), col) || static_cast<int64_t>(values.size()) == nnz * width) continue;
      const uint8_t* element = dense.data() + (row * cols + col) * width;
      values.insert(values.end(), element, element + width);
    }
  }
  return values;
}

// ---------------------------------------------------------------------------------------------------------------- matrices

// How many elements are not zero: a share of all, or one alone.
struct Density {
  const char* name;
  double share;  // negative: a single element
};

constexpr Density kDensities[] = {{"0", 0}, {"one", -1}, {"0.1", 0.1}, {"0.5", 0.5}, {"0.9", 0.9}, {"1", 1}};

// A non-zero element: random bits, a single bit, or one whose last part is a NaN with a payload.
void fill_element(uint8_t* element, const Kind& kind) {
  const int width = kind.width();
  do {
    const int64_t shape = random_below(4);
    for (int i = 0; i < width; ++i) element[i] = shape == 0 ? 0 : static_cast<uint8_t>(random_word() >> 32);
    if (shape == 0) element[random_below(width)] = static_cast<uint8_t>(1 << random_below(8));
    if (shape == 1) {
      element[width - 1] = static_cast<uint8_t>(element[width - 1] | 0x7f);
      if (width > 1) element[width - 2] = static_cast<uint8_t>(element[width - 2] | 0xf0);
    }
  } while (is_zero(element, kind));
}

// A zero element: where signs count as zero, half of the parts are negative zeros.
void fill_zero(uint8_t* element, const Kind& kind) {
  std::memset(element, 0, static_cast<size_t>(kind.width()));
  if (!kind.sign) return;
  for (int at = kind.part - 1; at < kind.width(); at += kind.part) element[at] = random_below(2) == 0 ? 0x80 : 0;
}

Matrix make_matrix(const Kind& kind, int64_t rows, int64_t cols, const Density& density) {
  Matrix matrix{rows, cols, kind.width(), Bytes(static_cast<size_t>(rows * cols * kind.width())), {}, {}, {}};
  const int64_t elements = rows * cols;
  const int64_t alone = elements > 0 ? random_below(elements) : 0;
  for (int64_t i = 0; i < elements; ++i) {
    const bool kept = density.share < 0 ? i == alone : static_cast<double>(random_below(1 << 20)) < density.share * (1 << 20);
    uint8_t* element = matrix.dense.data() + i * kind.width();
    kept ? fill_element(element, kind) : fill_zero(element, kind);
  }
  compress_reference(kind, matrix);
  return matrix;
}

// ---------------------------------------------------------------------------------------------------------------- codec

void test_build(const CodecKernels& codec, const Kind& kind, const Matrix& matrix, int skew) {
  Buffer dense(matrix.dense, skew), bitmasks(static_cast<int64_t>(matrix.bitmasks.size()), skew), counts(matrix.rows * 8);
  codec.build_bitmasks(dense.data(), matrix.rows, matrix.cols, zero_test(kind), bitmasks.data(), reinterpret_cast<int64_t*>(counts.data()));
  check(bitmasks.bytes() == matrix.bitmasks, "build_bitmasks: wrong bitmasks, skew %d", skew);
  Bytes expected(static_cast<size_t>(matrix.rows * 8));
  if (matrix.rows > 0) std::memcpy(expected.data(), matrix.counts.data(), expected.size());
  check(counts.bytes() == expected, "build_bitmasks: wrong counts, skew %d", skew);
  check(bitmasks.canaries_intact() && counts.canaries_intact() && dense.bytes() == matrix.dense, "build_bitmasks: wrote outside, skew %d",
        skew);
}

// `bits` may mark more or fewer elements than `nnz`.
void test_pack(const CodecKernels& codec, const Matrix& matrix, const Bytes& bits, int64_t nnz, int skew) {
  Buffer dense(matrix.dense, skew), bitmasks(bits, skew), values(nnz * matrix.width, skew);
  codec.pack_values(dense.data(), bitmasks.data(), matrix.rows, matrix.cols, values.data(), nnz);
  const Bytes expected = pack_reference(matrix.dense, bits, matrix.rows, matrix.cols, matrix.width, nnz);
  Bytes got = values.bytes();
  got.resize(expected.size());  // values that no bit stands for are not defined
  check(got == expected, "pack_values: wrong values, nnz %" PRId64 ", skew %d", nnz, skew);
  check(values.canaries_intact(), "pack_values: wrote outside, nnz %" PRId64 ", skew %d", nnz, skew);
}

void test_expand(const CodecKernels& codec, const Matrix& matrix, const Bytes& bits, const Bytes& stored, int skew) {
  const int64_t nnz = static_cast<int64_t>(stored.size()) / matrix.width;
  Buffer values(stored, skew), bitmasks(bits, skew), dense(static_cast<int64_t>(matrix.dense.size()), skew);
  codec.expand_values(values.data(), nnz, bitmasks.data(), matrix.rows, matrix.cols, dense.data());
  const Bytes expected = expand_reference(stored, bits, matrix.rows, matrix.cols, matrix.width);
  check(dense.bytes() == expected, "expand_values: wrong elements, nnz %" PRId64 ", skew %d", nnz, skew);
  check(dense.canaries_intact(), "expand_values: wrote outside, nnz %" PRId64 ", skew %d", nnz, skew);
}

// Bitmasks that agree with nothing: all ones (padding too), random, and numbers of values around those that the honest ones mark.
void test_hostile(const CodecKernels& codec, const Matrix& matrix) {
  const Bytes ones(matrix.bitmasks.size(), 0xff);
  Bytes noise(matrix.bitmasks.size());
  for (uint8_t& byte : noise) byte = static_cast<uint8_t>(random_word() >> 40);
  const int64_t nnz = matrix.nnz();
  for (const Bytes* bits : {&ones, static_cast<const Bytes*>(&noise), &matrix.bitmasks}) {
    for (const int64_t claimed : {int64_t{0}, int64_t{1}, nnz / 2, nnz - 1, nnz, nnz + 1}) {
      if (claimed < 0) continue;
      Bytes stored = matrix.values;
      stored.resize(static_cast<size_t>(claimed * matrix.width), 0x5a);
      test_pack(codec, matrix, *bits, claimed, 0);
      test_expand(codec, matrix, *bits, stored, 0);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- proofs

void test_count_bits(const Kernels& kernels) {
  for (int64_t bytes = 0; bytes <= 5000; bytes += bytes < 300 ? 1 : 611) {
    for (const bool ones : {false, true}) {
      Bytes bits(static_cast<size_t>(bytes), 0xff);
      for (uint8_t& byte : bits) byte = ones ? 0xff : static_cast<uint8_t>(random_word() >> 40);
      Buffer buffer(bits, static_cast<int>(bytes % 3));
      check(kernels.count_bits(buffer.data(), bytes) == count_reference(bits.data(), bytes), "count_bits: %" PRId64 " bytes, all ones %d",
            bytes, ones);
    }
  }
}

// Row offsets and bitmasks, each free to be wrong.
struct Claim {
  Bytes bitmasks;
  std::vector<int64_t> row_offsets;
  int64_t end, nnz;
};

void test_claim(const Kernels& kernels, const Matrix& matrix, const Claim& claim, const char* fault, int64_t at) {
  Buffer bitmasks(claim.bitmasks), row_offsets(static_cast<int64_t>(claim.row_offsets.size()) * 8);
  if (matrix.rows > 0) std::memcpy(row_offsets.data(), claim.row_offsets.data(), claim.row_offsets.size() * 8);
  const int64_t got = kernels.first_faulty_row(bitmasks.data(), reinterpret_cast<const int64_t*>(row_offsets.data()), matrix.rows,
                                               matrix.cols, claim.end, claim.nnz);
  const int64_t expected = first_faulty_reference(claim.bitmasks, claim.row_offsets, matrix.rows, matrix.cols, claim.end, claim.nnz);
  const bool planted = fault != nullptr;
  check(got == expected && planted == (got < matrix.rows), "first_faulty_row: %s at row %" PRId64 ": got %" PRId64 ", expected %" PRId64,
        planted ? fault : "no fault", at, got, expected);
}

// The row's padding bits set, without a change of its number of bits where it has bits to give.
Bytes move_bit_to_padding(const Matrix& matrix, int64_t row) {
  Bytes bitmasks = matrix.bitmasks;
  uint8_t* bits = bitmasks.data() + row * matrix.row_bytes();
  uint8_t& last = bits[matrix.row_bytes() - 1];
  last = static_cast<uint8_t>(last | 0x80);
  for (int64_t col = 0; col < matrix.cols; ++col) {
    if (!bit(bits, col)) continue;
    bits[col / 8] = static_cast<uint8_t>(bits[col / 8] & ~(1 << (col % 8)));
    break;
  }
  return bitmasks;
}

void test_proof(const Kernels& kernels, const Matrix& matrix) {
  Claim honest{matrix.bitmasks, {}, matrix.nnz(), matrix.nnz()};
  int64_t offset = 0;
  for (const int64_t count : matrix.counts) {
    honest.row_offsets.push_back(offset);
    offset += count;
  }
  test_claim(kernels, matrix, honest, nullptr, 0);
  if (matrix.rows == 0) return;

  // A part of a larger matrix: offsets need not start at zero, nor the end be the last.
  Claim shifted = honest;
  for (int64_t& start : shifted.row_offsets) start += 7;
  shifted.end += 7;
  shifted.nnz += 20;
  test_claim(kernels, matrix, shifted, nullptr, 0);

  // Offsets that agree with each other and with the bitmasks, but not with the values.
  for (const int64_t distance : {int64_t{-1}, honest.nnz + 1, int64_t{1}}) {
    Claim claim = honest;
    for (int64_t& start : claim.row_offsets) start += distance;
    claim.end += distance;
    test_claim(kernels, matrix, claim, "shifted offsets", matrix.rows - 1);
  }

  for (int64_t row = 0; row < matrix.rows; ++row) {
    const int64_t start = honest.row_offsets[static_cast<size_t>(row)];
    const struct {
      const char* fault;
      int64_t offset;
    } bad_offsets[] = {{"negative offset", -1},
                       {"offset past the values", honest.nnz + 1},
                       {"INT64_MIN", INT64_MIN},
                       {"INT64_MAX", INT64_MAX},
                       {"offset one too large", start + 1},
                       {"offset one too small", start - 1},
                       {"INT64_MIN + nnz", INT64_MIN + honest.nnz}};
    for (const auto& bad : bad_offsets) {
      Claim claim = honest;
      claim.row_offsets[static_cast<size_t>(row)] = bad.offset;
      test_claim(kernels, matrix, claim, bad.fault, row);
    }
    if (row > 0 && matrix.nnz() > 0) {
      Claim claim = honest;
      claim.row_offsets[static_cast<size_t>(row - 1)] = honest.nnz;
      claim.row_offsets[static_cast<size_t>(row)] = 0;
      test_claim(kernels, matrix, claim, "decreasing offsets", row);
    }
    if (matrix.cols > 0) {
      Claim claim = honest;
      const int64_t col = random_below(matrix.cols);
      uint8_t& byte = claim.bitmasks[static_cast<size_t>(row * matrix.row_bytes() + col / 8)];
      byte = static_cast<uint8_t>(byte ^ 1 << (col % 8));
      test_claim(kernels, matrix, claim, "wrong popcount", row);
    }
    if (matrix.cols % 8 != 0) {
      Claim claim = honest;
      claim.bitmasks = move_bit_to_padding(matrix, row);
      test_claim(kernels, matrix, claim, "padding bit", row);
    }
  }
  for (const int64_t end : {honest.end + 1, honest.end - 1, int64_t{-1}, INT64_MIN, INT64_MAX}) {
    Claim claim = honest;
    claim.end = end;
    test_claim(kernels, matrix, claim, "wrong end", matrix.rows - 1);
    claim.nnz = honest.nnz + 1;
    test_claim(kernels, matrix, claim, "wrong end below nnz", matrix.rows - 1);
  }
  if (matrix.nnz() > 0) {
    Claim claim = honest;
    --claim.nnz;
    test_claim(kernels, matrix, claim, "values missing", matrix.rows - 1);
  }
}

// ---------------------------------------------------------------------------------------------------------------- programs

void test_isa(const Kernels& kernels) {
  place = kernels.isa;
  test_count_bits(kernels);
  for (const Kind& kind : kKinds) {
    const CodecKernels& codec = kernels.codec[kind.width_log2];
    for (const int64_t rows : {0, 1, 2, 3, 5}) {
      for (const int64_t cols : {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 200, 1000}) {
        for (const Density& density : kDensities) {
          place = std::string(kernels.isa) + " " + kind.name + " (width " + std::to_string(kind.width()) + ") [" + std::to_string(rows) +
                  ", " + std::to_string(cols) + "] density " + density.name;
          const Matrix matrix = make_matrix(kind, rows, cols, density);
          for (const int skew : kSkews) {
            test_build(codec, kind, matrix, skew);
            test_pack(codec, matrix, matrix.bitmasks, matrix.nnz(), skew);
            test_expand(codec, matrix, matrix.bitmasks, matrix.values, skew);
          }
          if (!kind.sign && rows <= 3) {  // what follows depends on bits alone
            test_hostile(codec, matrix);
            test_proof(kernels, matrix);
          }
        }
      }
    }
  }
}

void test_dispatch(int expected_count, char** expected) {
  place = "dispatch";
  const int count = cpu::isa_count();
  check(count >= 1 && std::strcmp(cpu::isa_name(count - 1), "scalar") == 0, "scalar is not the last resort");
  if (expected_count > 0) check(count == expected_count, "%d ISAs instead of %d", count, expected_count);
  for (int i = 0; i < expected_count && i < count; ++i) {
    check(std::strcmp(cpu::isa_name(i), expected[i]) == 0, "ISA %d is %s instead of %s", i, cpu::isa_name(i), expected[i]);
  }

  const char* asked = std::getenv("BITMASK_ISA");
  const char* initial = cpu::isa_name(0);
  for (int i = 0; asked != nullptr && i < count; ++i) {
    if (std::strcmp(asked, cpu::isa_name(i)) == 0) initial = asked;
  }
  check(std::strcmp(cpu::kernels().isa, initial) == 0, "starts with %s instead of %s", cpu::kernels().isa, initial);

  for (int i = 0; i < count; ++i) {
    const char* name = cpu::isa_name(i);
    check(cpu::force_isa(name) && std::strcmp(cpu::kernels().isa, name) == 0, "%s cannot be forced", name);
    for (const char* unknown : {"sse9", "AVX2", "scala", "scalarx", " "}) {
      check(!cpu::force_isa(unknown) && std::strcmp(cpu::kernels().isa, name) == 0, "\"%s\" is accepted over %s", unknown, name);
    }
    for (const char* none : {static_cast<const char*>(nullptr), ""}) {
      cpu::force_isa(name);
      check(cpu::force_isa(none) && std::strcmp(cpu::kernels().isa, cpu::isa_name(0)) == 0, "no way back from %s", name);
    }
  }
}

void test_isas() {
  for (int i = 0; i < cpu::isa_count(); ++i) {
    cpu::force_isa(cpu::isa_name(i));
    test_isa(cpu::kernels());
  }
}

// Has the kernels for a block-sparse weight, which is one block, read a byte past its values, or half of what should be packed.
void read_past_a_block(const cpu::BlockKernels& block, const char* error) {
  constexpr int64_t kSide = 16;
  const int64_t line_starts[] = {0, 1}, first[] = {0};
  const int64_t rows_bytes = block.rows_bytes(1, kSide, kSide), tiles_bytes = block.tiles_bytes(kSide, kSide),
                columns_bytes = block.columns_bytes(kSide, kSide, kSide);
  Buffer values(kSide * kSide * 4 - 1), y(kSide * kSide * 4), scratch(block.scratch_bytes);
  Buffer rows(Bytes(static_cast<size_t>(rows_bytes), 0)), tiles(Bytes(static_cast<size_t>(tiles_bytes), 0)),
      g_columns(Bytes(static_cast<size_t>(columns_bytes), 0)), x_columns(Bytes(static_cast<size_t>(columns_bytes / 2), 0));
  const BlockMatrix lying{values.data(), kSide, kSide, kSide, kSide, line_starts, first, first, nullptr};
  if (std::strcmp(error, "block_stream") == 0) block.stream(lying, 0, 1, rows.data(), 1, nullptr, y.data(), kSide, scratch.data());
  if (std::strcmp(error, "block_multiply") == 0) block.multiply(lying, 0, 1, tiles.data(), kSide, nullptr, y.data(), kSide, scratch.data());
  if (std::strcmp(error, "block_transposed") == 0) block.multiply_transposed(lying, 0, 1, tiles.data(), kSide, y.data(), scratch.data());
  if (std::strcmp(error, "block_sample") == 0) {
    block.sample(lying, 0, 1, g_columns.data(), x_columns.data(), kSide, nullptr, nullptr, y.data());
  }
}

// Has the kernels for 2:4 read a byte past the elements, values or metadata of 64 columns.
void read_past_a_group(const Kernels& kernels, const char* error) {
  const cpu::TwoFourCodecKernels& codec = kernels.two_four_codec[0];
  ZeroTest all_bits;
  std::memset(all_bits.bytes, 0xff, sizeof(all_bits.bytes));
  Buffer elements(Bytes(63, 0)), few_values(31), few_bits(Bytes(7, 0x33)), floats(4 * 64 * 4 - 1);
  Buffer values(32), metadata(Bytes(8, 0x33)), dense(64);
  if (std::strcmp(error, "pack_24") == 0) codec.pack(elements.data(), 1, 64, all_bits, values.data(), metadata.data());
  if (std::strcmp(error, "unpack_24") == 0) codec.unpack(few_values.data(), metadata.data(), 1, 64, dense.data());
  if (std::strcmp(error, "metadata_24") == 0) kernels.first_faulty_metadata(few_bits.data(), 1, 64);
  if (std::strcmp(error, "prune_24") == 0) codec.prune(elements.data(), 1, 64, all_bits, Magnitude::kUnsigned);
  if (std::strcmp(error, "transposable_24") == 0) kernels.two_four_linear[cpu::kFloat32].prune_transposable(floats.data(), 4, 64);
}

// Has conversions read a byte past a bitmask, or past the values.
void read_past_a_list(const cpu::ConvertKernels& convert, const char* error) {
  Buffer values(63), bits(Bytes(7, 0xff)), whole_bits(Bytes(8, 0xff)), columns(64 * 8), elements(64);
  int64_t first[64] = {}, next[64];
  for (int64_t i = 0; i < 64; ++i) next[i] = i;
  const cpu::BlockLine line{first, 1, 1, 64, 64};
  if (std::strcmp(error, "list_columns") == 0) {
    convert.list_columns(bits.data(), 1, 64, 0, 0, reinterpret_cast<int64_t*>(columns.data()), 64, nullptr);
  }
  if (std::strcmp(error, "transpose_values") == 0) {
    convert.values[0].transpose_values(values.data(), whole_bits.data(), 1, 64, 8, first, next, elements.data());
  }
  if (std::strcmp(error, "expand_blocks") == 0) {
    convert.values[0].expand_blocks(values.data(), 64, whole_bits.data(), line, elements.data());
  }
}

// Has the kernels in use read a byte past the values: a build under AddressSanitizer must not survive this.
void read_past_a_buffer(const char* error) {
  const Kernels& kernels = cpu::kernels();
  const cpu::LinearKernels& linear = kernels.linear[cpu::kFloat32];
  Buffer bytes(63), floats(255), bitmasks(Bytes(8, 0xff)), row_offsets(Bytes(8, 0)), dense(256),
      panel(linear.panel_rows * linear.group_bytes), gradient_panel(linear.panel_rows * linear.gradient_group_bytes),
      readers(linear.reader_bytes);
  Buffer scratch(linear.scratch_bytes), gradient_scratch(linear.gradient_scratch_bytes);
  std::memset(panel.data(), 0, static_cast<size_t>(linear.panel_rows * linear.group_bytes));
  const BitmaskMatrix lying{floats.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(row_offsets.data()), 1, 64, 64};
  std::printf("reading past a buffer with %s in %s\n", kernels.isa, error);
  std::fflush(stdout);
  if (std::strcmp(error, "expand") == 0) kernels.codec[0].expand_values(bytes.data(), 64, bitmasks.data(), 1, 64, dense.data());
  if (std::strcmp(error, "stream") == 0) linear.stream(lying, 0, 1, panel.data(), 1, nullptr, dense.data());
  if (std::strcmp(error, "multiply") == 0) linear.multiply(lying, 0, 1, panel.data(), 1, nullptr, dense.data(), scratch.data());
  if (std::strcmp(error, "gradient") == 0) {
    linear.multiply_transposed(lying, 0, 64, gradient_panel.data(), 1, dense.data(), readers.data(), gradient_scratch.data());
  }
  read_past_a_block(kernels.block[cpu::kFloat32], error);
  read_past_a_group(kernels, error);
  read_past_a_list(kernels.convert, error);
}

}  // namespace

int main(int argc, char** argv) {
  const char* option = argc > 1 ? argv[1] : "";
  if (std::strcmp(option, "--list") == 0) {
    for (int i = 0; i < cpu::isa_count(); ++i) std::printf("%s\n", cpu::isa_name(i));
    return 0;
  }
  if (std::strcmp(option, "--plant") == 0 && argc == 3) {
    read_past_a_buffer(argv[2]);
    return 0;
  }
  const bool dispatch_only = std::strcmp(option, "--dispatch") == 0, brief = std::strcmp(option, "--brief") == 0;
  const int names = brief ? 2 : 1;
  test_dispatch(dispatch_only ? 0 : argc - names, argv + names);
  if (!dispatch_only) {
    test_isas();
    test_linear(brief);
    test_linear_gradient(brief);
    test_block(brief);
    test_two_four_codec(brief);
    test_two_four_prune(brief);
    test_two_four_linear(brief);
    test_convert(brief);
  }
  std::printf("%" PRId64 " passed, %" PRId64 " failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
