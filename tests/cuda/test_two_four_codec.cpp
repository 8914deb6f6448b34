// Tests 2:4 packing, unpacking and pruning on a GPU: each launcher against groups of four that are looked at one by one, for every element
// width and every way in which magnitudes compare, on buffers that are exactly as large as promised and aligned to an element only.
#include <algorithm>

#include "../../csrc/cuda/kernels.h"
#include "../native/transposable_reference.h"
#include "../native/two_four_reference.h"
#include "testing.h"

namespace bitmask::testing {
namespace {

using namespace two_four;
using cuda::Fault;
using cuda::kNoFault;

// ---------------------------------------------------------------------------------------------------------------- checks

// The word that a launcher reports to; holds no verdict at first.
struct FaultBuffer : Buffer {
  FaultBuffer() : Buffer(8) {}
  Fault* word() { return reinterpret_cast<Fault*>(data()); }
};

Fault as_fault(int64_t row, int64_t rows) { return row < rows ? static_cast<Fault>(row) : kNoFault; }

// What is aligned to elements: `skew` elements from alignment.
struct Skewed : Buffer {
  Skewed(const Bytes& bytes, const Kind& kind, int skew) : Buffer(bytes, skew * kind.width()) {}
};

void check_pack(const Kind& kind, const Matrix& matrix, bool prune, int skew) {
  Skewed dense(matrix.dense, kind, skew), values(Bytes(matrix.values.size()), kind, 3 * skew);
  Buffer metadata(static_cast<int64_t>(matrix.metadata.size()), skew);
  FaultBuffer fault;
  const cudaError_t error = cuda::pack_24(dense.data(), {matrix.rows, matrix.cols}, kind.width(), zero_test(kind), kind.magnitude, prune,
                                          values.data(), metadata.data(), fault.word(), nullptr);
  check(error == cudaSuccess, "pack_24: %s", cudaGetErrorName(error));
  const Fault expected = prune ? kNoFault : as_fault(matrix.first_crowd, matrix.rows);
  check(*fault.word() == expected, "pack_24 finds %" PRId64 ", not %" PRId64 " (-1: none)", static_cast<int64_t>(*fault.word()),
        static_cast<int64_t>(expected));
  if (expected == kNoFault) {
    check(values.bytes() == matrix.values, "pack_24 packs other values");
    check(metadata.bytes() == matrix.metadata, "pack_24 marks other columns");
  }
  check(dense.bytes() == matrix.dense, "pack_24 writes to what it packs");
  for (const Buffer* buffer : std::initializer_list<const Buffer*>{&dense, &values, &metadata, &fault}) {
    check(buffer->canaries_intact(), "pack_24 wrote past a buffer");
  }
}

void check_prune(const Kind& kind, const Matrix& matrix, int skew) {
  Skewed dense(matrix.dense, kind, skew);
  const cudaError_t error =
      cuda::prune_24(dense.data(), {matrix.rows, matrix.cols}, kind.width(), zero_test(kind), kind.magnitude, nullptr);
  check(error == cudaSuccess, "prune_24: %s", cudaGetErrorName(error));
  check(dense.bytes() == matrix.pruned, "prune_24 keeps other elements");
  check(dense.canaries_intact(), "prune_24 wrote past a buffer");
}

// Unpacks the rows between one of `cuts` and the next, each part by itself, or proves them only.
void check_unpack(const Kind& kind, const Matrix& matrix, const std::vector<int64_t>& cuts, int skew, bool prove_only = false) {
  Skewed values(matrix.values, kind, skew);
  Buffer metadata(matrix.metadata, skew);
  FaultBuffer fault;
  const TwoFourMatrix w{prove_only ? nullptr : values.data(), metadata.data(), matrix.rows, matrix.cols};
  Bytes unpacked;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const int64_t bytes = prove_only ? 0 : (cuts[i + 1] - cuts[i]) * matrix.cols * kind.width();
    Skewed dense(Bytes(static_cast<size_t>(bytes)), kind, 3 * skew);
    const cudaError_t error = cuda::unpack_24(w, cuts[i], cuts[i + 1], kind.width(), dense.data(), i == 0, fault.word(), nullptr);
    check(error == cudaSuccess, "unpack_24: %s", cudaGetErrorName(error));
    check(dense.canaries_intact() && fault.canaries_intact(), "unpack_24 wrote past a buffer");
    const Bytes part = dense.bytes();
    unpacked.insert(unpacked.end(), part.begin(), part.end());
  }
  const Fault expected = as_fault(first_faulty_reference(matrix.metadata, matrix.rows, matrix.cols), matrix.rows);
  check(*fault.word() == expected, "unpack_24 finds %" PRId64 ", not %" PRId64 " (-1: none)", static_cast<int64_t>(*fault.word()),
        static_cast<int64_t>(expected));
  if (expected == kNoFault && !prove_only) check(unpacked == matrix.pruned, "unpack_24 gives other elements");
}

// As a whole, then in two parts.
void check_unpack(const Kind& kind, const Matrix& matrix, int skew, bool prove_only = false) {
  check_unpack(kind, matrix, {0, matrix.rows}, skew, prove_only);
  check_unpack(kind, matrix, {0, random_below(matrix.rows + 1), matrix.rows}, skew, prove_only);
}

void check_all(const Kind& kind, const Matrix& matrix, int skew) {
  check_pack(kind, matrix, false, skew);
  check_pack(kind, matrix, true, skew);
  check_prune(kind, matrix, skew);
  check_unpack(kind, matrix, skew);
  check_unpack(kind, matrix, skew, true);
}

void set_place(const char* family, const Kind& kind, int64_t rows, int64_t cols) {
  place = std::string(family) + " " + kind.name + " [" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

// ---------------------------------------------------------------------------------------------------------------- tests

TEST_FAMILY(two_four_codec_shapes) {
  const int64_t shapes[][2] = {{0, 0}, {0, 8}, {5, 0}, {1, 4}, {1, 8}, {3, 12}, {5, 16}, {2, 60}, {4, 64}, {3, 132}, {40, 4}, {33, 20}};
  for (const Kind& kind : kKinds) {
    for (const auto& [rows, cols] : shapes) {
      set_place("two_four_codec_shapes", kind, rows, cols);
      for (const bool crowded : {false, true}) {
        const Matrix matrix = pack_reference(kind, rows, cols, random_dense(kind, rows, cols, crowded));
        check_all(kind, matrix, static_cast<int>(random_below(4)));
      }
    }
  }
}

// Elements from every boundary that they may begin at.
TEST_FAMILY(two_four_codec_skews) {
  for (const Kind& kind : kKinds) {
    for (const int64_t cols : {8, 12}) {
      set_place("two_four_codec_skews", kind, 5, cols);
      const Matrix matrix = pack_reference(kind, 5, cols, random_dense(kind, 5, cols, false));
      for (int skew = 0; skew < 16; ++skew) check_all(kind, matrix, skew);
    }
  }
}

// Tiles of 64 bytes for each of 256 threads: to the byte, one more, and rows across them.
TEST_FAMILY(two_four_codec_tiles) {
  for (const Kind& kind : {kKinds[2], kKinds[7], kKinds[11], kKinds[15]}) {
    const int64_t elements = 256 * 64 / kind.width();
    const int64_t shapes[][2] = {{1, elements}, {1, elements + 8}, {5, elements / 4 + 8}, {3, elements / 2 + 4}};
    for (const auto& [rows, cols] : shapes) {
      set_place("two_four_codec_tiles", kind, rows, cols);
      check_all(kind, pack_reference(kind, rows, cols, random_dense(kind, rows, cols, false)), static_cast<int>(random_below(2)));
    }
  }
}

// All groups of eight numbers, among them both zeros, NaNs and the ends of the range.
TEST_FAMILY(two_four_codec_every_group) {
  for (const Kind& kind : kKinds) {
    place = std::string("two_four_codec_every_group ") + kind.name;
    const Bytes dense = every_four(kind);
    const Matrix matrix = pack_reference(kind, 64, static_cast<int64_t>(dense.size()) / 64 / kind.width(), dense);
    check_pack(kind, matrix, true, 0);
    check_prune(kind, matrix, 0);
  }
}

constexpr int kFaultyNibbles[] = {0, 1, 2, 4, 7, 8, 11, 13, 14, 15};
int faulty_nibble() { return kFaultyNibbles[random_below(10)]; }

// A faulty nibble in every place, then a second one, then noise.
TEST_FAMILY(two_four_codec_faults) {
  for (const Kind& kind : {kKinds[0], kKinds[7], kKinds[15]}) {
    for (const int64_t cols : {8, 20, 68}) {
      set_place("two_four_codec_faults", kind, 5, cols);
      const Matrix sound = pack_reference(kind, 5, cols, random_dense(kind, 5, cols, false));
      const int64_t nibbles = static_cast<int64_t>(sound.metadata.size()) * 2;
      for (int64_t at = 0; at < nibbles; ++at) {
        Matrix matrix = sound;
        set_nibble(matrix.metadata, at, faulty_nibble());
        check_unpack(kind, matrix, 0, random_below(2) == 0);
        set_nibble(matrix.metadata, random_below(nibbles), faulty_nibble());
        check_unpack(kind, matrix, static_cast<int>(random_below(2)), random_below(2) == 0);
      }
      Matrix noise = sound;
      for (uint8_t& byte : noise.metadata) byte = static_cast<uint8_t>(random_word());
      check_unpack(kind, noise, 0);
    }
  }
}

// Faults in many threads at once: the lowest row is found in any order.
TEST_FAMILY(two_four_codec_many_faults) {
  const Kind& kind = kKinds[7];
  place = "two_four_codec_many_faults";
  Matrix matrix = pack_reference(kind, 70, 68, random_dense(kind, 70, 68, false));
  for (int64_t row = 3; row < 70; ++row) matrix.metadata[static_cast<size_t>(row * 9 + random_below(9))] = 0xf7;
  const Matrix crowded = pack_reference(kind, 70, 68, random_dense(kind, 70, 68, true));
  for_each_seed(4, [&] {
    check_unpack(kind, matrix, 0);
    check_unpack(kind, matrix, 0, true);
    check_pack(kind, crowded, false, 0);
  });
}

TEST_FAMILY(two_four_codec_transposable) {
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (int numbers = 0; numbers < kNumbers; ++numbers) {
      const int64_t shapes[][2] = {{0, 8}, {4, 0}, {4, 4}, {8, 12}, {12, 68}};
      for (const auto& [rows, cols] : shapes) {
        place = std::string("two_four_codec_transposable ") + kFormats[dtype].name + " " + kNumbersNames[numbers] + " [" +
                std::to_string(rows) + ", " + std::to_string(cols) + "]";
        const Bytes elements = random_elements(kFormats[dtype], static_cast<Numbers>(numbers), rows, cols);
        Buffer weight(elements, static_cast<int>(random_below(2)) * kFormats[dtype].width);
        const cudaError_t error = cuda::prune_24_transposable(weight.data(), {rows, cols}, static_cast<cuda::LinearDtype>(dtype), nullptr);
        check(error == cudaSuccess, "prune_24_transposable: %s", cudaGetErrorName(error));
        check(weight.canaries_intact(), "prune_24_transposable wrote past a buffer");
        test_pruned(kFormats[dtype], rows, cols, elements, weight.bytes());
      }
    }
  }
}

// What a launcher refuses, it refuses before it touches anything but the verdict.
TEST_FAMILY(two_four_codec_refusals) {
  const Kind& kind = kKinds[7];
  uint8_t* const odd = reinterpret_cast<uint8_t*>(64 + 1);
  FaultBuffer fault;
  const auto pack = [&](const Geometry& g, int width, const void* dense, void* values) {
    return cuda::pack_24(dense, g, width, zero_test(kind), kind.magnitude, false, values, nullptr, fault.word(), nullptr);
  };
  const auto unpack = [&](const void* values, void* dense) {
    return cuda::unpack_24({values, nullptr, 4, 8}, 0, 4, 2, dense, true, fault.word(), nullptr);
  };
  check(pack({4, 8}, 2, odd, nullptr) == cudaErrorInvalidValue, "dense not aligned");
  check(pack({4, 8}, 2, nullptr, odd) == cudaErrorInvalidValue, "values not aligned");
  check(pack({4, 8}, 3, nullptr, nullptr) == cudaErrorInvalidValue, "width 3");
  check(pack({4, 8}, 16, nullptr, nullptr) == cudaErrorInvalidValue, "width 16");
  check(pack({int64_t{1} << 44, 8}, 8, nullptr, nullptr) == cudaErrorInvalidValue, "more tiles than a grid has");
  check(unpack(odd, fault.data()) == cudaErrorInvalidValue, "values not aligned");
  check(unpack(fault.data(), odd) == cudaErrorInvalidValue, "dense not aligned");
  check(cuda::prune_24(odd, {4, 8}, 2, zero_test(kind), kind.magnitude, nullptr) == cudaErrorInvalidValue, "dense not aligned");
  check(cuda::prune_24_transposable(odd, {4, 8}, cuda::kBfloat16, nullptr) == cudaErrorInvalidValue, "dense not aligned");
}

// ---------------------------------------------------------------------------------------------------------------- planted errors

PLANTED_ERROR(two_four_codec_fewer_values, "heap-buffer-overflow") {
  const Kind& kind = kKinds[7];
  const Matrix matrix = pack_reference(kind, 5, 68, random_dense(kind, 5, 68, false));
  Buffer values(Bytes(matrix.values.begin(), matrix.values.end() - 2)), metadata(matrix.metadata);
  Buffer dense(static_cast<int64_t>(matrix.dense.size()));
  FaultBuffer fault;
  cuda::unpack_24({values.data(), metadata.data(), 5, 68}, 0, 5, 2, dense.data(), true, fault.word(), nullptr);
}

PLANTED_ERROR(two_four_codec_less_metadata, "heap-buffer-overflow") {
  const Kind& kind = kKinds[7];
  const Matrix matrix = pack_reference(kind, 5, 68, random_dense(kind, 5, 68, false));
  Buffer dense(matrix.dense), values(static_cast<int64_t>(matrix.values.size()));
  Buffer metadata(static_cast<int64_t>(matrix.metadata.size()) - 1);
  FaultBuffer fault;
  cuda::pack_24(dense.data(), {5, 68}, 2, zero_test(kind), kind.magnitude, true, values.data(), metadata.data(), fault.word(), nullptr);
}

PLANTED_ERROR(two_four_codec_other_magnitude, "keeps other elements") {
  Kind kind = kKinds[6];  // int16, whose negative numbers are larger than positive ones to those who take them for unsigned
  const Matrix matrix = pack_reference(kind, 16, 64, random_dense(kind, 16, 64, true));
  kind.magnitude = Magnitude::kUnsigned;
  check_prune(kind, matrix, 0);
}

}  // namespace
}  // namespace bitmask::testing
