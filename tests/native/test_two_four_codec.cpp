// Tests packing, unpacking and pruning of 2:4: every kernel table that this machine can run, every element width, every way in which
// magnitudes compare, against groups of four that are looked at one by one.
#include "../../csrc/cpu/kernels.h"
#include "testing.h"
#include "two_four_reference.h"

using namespace bitmask;
using namespace bitmask::testing;
using namespace bitmask::testing::two_four;
using cpu::Kernels;
using cpu::TwoFourCodecKernels;

namespace {

void test_pack(const TwoFourCodecKernels& codec, const Kind& kind, const Matrix& matrix, int skew) {
  Buffer dense(matrix.dense, skew), values(static_cast<int64_t>(matrix.values.size()), skew),
      metadata(static_cast<int64_t>(matrix.metadata.size()), skew);
  const int64_t row = codec.pack(dense.data(), matrix.rows, matrix.cols, zero_test(kind), values.data(), metadata.data());
  check(row == matrix.first_crowd, "pack returns row %" PRId64 " instead of %" PRId64, row, matrix.first_crowd);
  check(values.canaries_intact() && metadata.canaries_intact(), "pack writes outside of its range");
  if (matrix.first_crowd == matrix.rows) check(values.bytes() == matrix.values && metadata.bytes() == matrix.metadata, "pack is wrong");
}

void test_largest(const TwoFourCodecKernels& codec, const Kind& kind, const Matrix& matrix, int skew) {
  Buffer dense(matrix.dense, skew), values(static_cast<int64_t>(matrix.values.size()), skew),
      metadata(static_cast<int64_t>(matrix.metadata.size()), skew);
  codec.pack_largest(dense.data(), matrix.rows, matrix.cols, zero_test(kind), kind.magnitude, values.data(), metadata.data());
  check(values.bytes() == matrix.values, "pack_largest packs other values");
  check(metadata.bytes() == matrix.metadata, "pack_largest marks other columns");
  check(values.canaries_intact() && metadata.canaries_intact(), "pack_largest writes outside of its range");

  codec.prune(dense.data(), matrix.rows, matrix.cols, zero_test(kind), kind.magnitude);
  check(dense.bytes() == matrix.pruned, "prune keeps other elements");
  check(dense.canaries_intact(), "prune writes outside of its range");
}

void test_unpack(const Kernels& kernels, const Kind& kind, const Matrix& matrix, int skew) {
  Buffer values(matrix.values, skew), metadata(matrix.metadata, skew), dense(static_cast<int64_t>(matrix.dense.size()), skew);
  const int64_t faulty = first_faulty_reference(matrix.metadata, matrix.rows, matrix.cols);
  const int64_t row =
      kernels.two_four_codec[kind.width_log2].unpack(values.data(), metadata.data(), matrix.rows, matrix.cols, dense.data());
  check(row == faulty, "unpack returns row %" PRId64 " instead of %" PRId64, row, faulty);
  check(faulty < matrix.rows || dense.bytes() == matrix.pruned, "unpack gives other elements");
  check(dense.canaries_intact(), "unpack writes outside of its range");
  const int64_t checked = kernels.first_faulty_metadata(metadata.data(), matrix.rows, matrix.cols);
  check(checked == faulty, "first_faulty_metadata returns row %" PRId64 " instead of %" PRId64, checked, faulty);
}

// One nibble of the metadata is replaced, then another one as well: each that does not have two bits, each past the last column that is not
// zero.
void test_faults(const Kernels& kernels, const Kind& kind, const Matrix& honest) {
  Matrix matrix = honest;
  const int64_t nibbles = static_cast<int64_t>(honest.metadata.size()) * 2;
  for (int nibble = 0; nibble < 16; ++nibble) {
    matrix.metadata = honest.metadata;
    for (int fault = 0; fault < 2; ++fault) {
      const bool padding = honest.cols % 8 == 4 && random_below(2) == 0;
      const int64_t at = padding ? (random_below(honest.rows) + 1) * honest.row_bytes() * 2 - 1 : random_below(nibbles);
      set_nibble(matrix.metadata, at, nibble);
      const int64_t faulty = first_faulty_reference(matrix.metadata, matrix.rows, matrix.cols);
      if (faulty < matrix.rows) test_unpack(kernels, kind, matrix, kSkews[random_below(3)]);
    }
  }
  for (uint8_t& byte : matrix.metadata) byte = static_cast<uint8_t>(random_word());
  if (first_faulty_reference(matrix.metadata, matrix.rows, matrix.cols) < matrix.rows) test_unpack(kernels, kind, matrix, 0);
  std::fill(matrix.metadata.begin(), matrix.metadata.end(), static_cast<uint8_t>(0xff));
  test_unpack(kernels, kind, matrix, 0);
}

void test_shape(const Kernels& kernels, const Kind& kind, int64_t rows, int64_t cols) {
  const TwoFourCodecKernels& codec = kernels.two_four_codec[kind.width_log2];
  const Matrix fitting = pack_reference(kind, rows, cols, random_dense(kind, rows, cols, false));
  const Matrix crowded = pack_reference(kind, rows, cols, random_dense(kind, rows, cols, true));
  for (const int skew : kSkews) {
    test_pack(codec, kind, fitting, skew);
    test_pack(codec, kind, crowded, skew);
    test_largest(codec, kind, fitting, skew);
    test_largest(codec, kind, crowded, skew);
    test_unpack(kernels, kind, fitting, skew);
    test_unpack(kernels, kind, crowded, skew);
  }
  if (rows * cols > 0) test_faults(kernels, kind, fitting);
}

// Every set of non-zeros in every four of a group and of a tail, where all others have two.
void test_every_nibble(const Kernels& kernels, const Kind& kind) {
  const TwoFourCodecKernels& codec = kernels.two_four_codec[kind.width_log2];
  constexpr int64_t kRows = 3, kCols = 64 + 20;
  for (int64_t four = 0; four < kRows * kCols / 4; ++four) {
    for (int nonzero = 0; nonzero < 16; ++nonzero) {
      Bytes dense(static_cast<size_t>(kRows * kCols * kind.width()));
      for (int64_t other = 0; other < kRows * kCols / 4; ++other) {
        fill_four(&dense[static_cast<size_t>(other * 4 * kind.width())], kind, other == four ? nonzero : kTwo[random_below(6)], true);
      }
      const Matrix matrix = pack_reference(kind, kRows, kCols, dense);
      test_pack(codec, kind, matrix, 0);
      test_largest(codec, kind, matrix, 0);
    }
  }
}

void test_every_four(const Kernels& kernels, const Kind& kind) {
  const Bytes dense = every_four(kind);
  const int64_t cols = static_cast<int64_t>(dense.size()) / 64 / kind.width();
  test_largest(kernels.two_four_codec[kind.width_log2], kind, pack_reference(kind, 64, cols, dense), 0);
}

void test_kernels(const Kernels& kernels, bool brief) {
  for (const Kind& kind : kKinds) {
    const std::string name = std::string(kernels.isa) + " 2:4 " + kind.name;
    for (const int64_t rows : {0, 1, 2, 5}) {
      for (const int64_t cols : {0, 4, 8, 12, 16, 60, 64, 68, 72, 124, 128, 132, 188, 200, 1000, 1028}) {
        if (brief && (rows == 2 || cols > 200)) continue;
        place = name + " [" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
        test_shape(kernels, kind, rows, cols);
      }
    }
    place = name + " narrow";
    for (const int64_t cols : {4, 8, 16, 20}) test_shape(kernels, kind, 100, cols);
    place = name + " every nibble";
    if (!brief && !kSanitized) test_every_nibble(kernels, kind);
    place = name + " every four";
    test_every_four(kernels, kind);
  }
}

}  // namespace

void bitmask::testing::test_two_four_codec(bool brief) {
  for (int i = 0; i < cpu::isa_count(); ++i) {
    cpu::force_isa(cpu::isa_name(i));
    test_kernels(cpu::kernels(), brief);
  }
}
