// Tests the CUDA codec: each launcher against the layout's rules in their plainest form, for every element width, on buffers that are
// exactly as large as promised and aligned to an element only.
#include <cuda_runtime.h>
#include <scan.cuh>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cuda/kernels.h"
#include "testing.h"

namespace bitmask::testing {
namespace {

using cuda::Fault;
using cuda::kNoFault;

// ---------------------------------------------------------------------------------------------------------------- data

// An element of `width` bytes made of parts of `part` bytes; with `sign`, the top bit of each part is a sign and negative zero is zero.
struct Kind {
  const char* name;
  int width;
  int part;
  bool sign;
};

constexpr Kind kKinds[] = {
    {"bits8", 1, 1, false},    {"float8", 1, 1, true},  {"bits16", 2, 2, false},   {"float16", 2, 2, true},    {"float32", 4, 4, true},
    {"complex32", 4, 2, true}, {"bits64", 8, 8, false}, {"complex64", 8, 4, true}, {"bits128", 16, 16, false}, {"complex128", 16, 8, true},
};
constexpr Kind kFloat16 = kKinds[3];

ZeroTest zero_test(const Kind& kind) {
  ZeroTest test;
  for (int i = 0; i < 16; ++i) test.bytes[i] = kind.sign && i % kind.part == kind.part - 1 ? 0x7f : 0xff;
  return test;
}

struct Matrix {
  Kind kind;
  Geometry g;
  Bytes dense;
  Bytes bitmasks;
  Bytes values;
  std::vector<int64_t> row_offsets;

  int64_t nnz() const { return static_cast<int64_t>(values.size()) / kind.width; }
};

// An element that is stored has one bit set at least, and sometimes no other; one that is not may have signs where they do not count.
Bytes random_element(const Kind& kind, bool stored) {
  Bytes element(static_cast<size_t>(kind.width));
  for (int i = 0; i < kind.width; ++i) {
    const bool top = kind.sign && i % kind.part == kind.part - 1;
    if (top && random_below(2) == 0) element[static_cast<size_t>(i)] = 0x80;
    if (stored && random_below(2) == 0) element[static_cast<size_t>(i)] |= static_cast<uint8_t>(random_word());
  }
  if (stored) {
    const int64_t at = random_below(kind.width);
    const bool top = kind.sign && at % kind.part == kind.part - 1;
    element[static_cast<size_t>(at)] |= static_cast<uint8_t>(1 << random_below(top ? 7 : 8));
  }
  return element;
}

// `density` percent of the elements are stored.
Matrix random_matrix(const Kind& kind, int64_t rows, int64_t cols, int density) {
  Matrix matrix{kind, {rows, cols}, {}, {}, {}, {}};
  for (int64_t row = 0; row < rows; ++row) {
    matrix.row_offsets.push_back(matrix.nnz());
    Bytes bits(static_cast<size_t>((cols + 7) / 8));
    for (int64_t col = 0; col < cols; ++col) {
      const bool stored = random_below(100) < density;
      const Bytes element = random_element(kind, stored);
      matrix.dense.insert(matrix.dense.end(), element.begin(), element.end());
      if (!stored) continue;
      matrix.values.insert(matrix.values.end(), element.begin(), element.end());
      bits[static_cast<size_t>(col / 8)] |= static_cast<uint8_t>(1 << col % 8);
    }
    matrix.bitmasks.insert(matrix.bitmasks.end(), bits.begin(), bits.end());
  }
  return matrix;
}

Bytes bytes_of(const std::vector<int64_t>& numbers) {
  Bytes bytes(numbers.size() * 8);
  if (!bytes.empty()) std::memcpy(bytes.data(), numbers.data(), bytes.size());
  return bytes;
}

int64_t* int64s(Buffer& buffer) { return reinterpret_cast<int64_t*>(buffer.data()); }

// Scratch memory, in which anything may be at first.
struct Workspace {
  Buffer buffer;
  explicit Workspace(const Geometry& g) : buffer(cuda::codec_workspace_bytes(g)) {}
};

// ---------------------------------------------------------------------------------------------------------------- compress

void check_count(const Matrix& matrix, int skew) {
  Buffer dense(matrix.dense, skew), nnz(8);
  const cudaError_t error = cuda::count_nonzero(dense.data(), matrix.g, matrix.kind.width, zero_test(matrix.kind), int64s(nnz), nullptr);
  check(error == cudaSuccess, "count_nonzero: %s", cudaGetErrorName(error));
  check(*int64s(nnz) == matrix.nnz(), "count_nonzero: %" PRId64 ", not %" PRId64, *int64s(nnz), matrix.nnz());
  check(dense.canaries_intact() && nnz.canaries_intact(), "count_nonzero wrote past a buffer");
}

// `skew`: bytes from alignment of dense, values and bitmasks, the former being shifted by whole elements.
void check_compress(const Matrix& matrix, int skew, int64_t capacity) {
  const int width = matrix.kind.width;
  Buffer dense(matrix.dense, skew * width), values(capacity * width, 3 * skew * width);
  Buffer bitmasks(static_cast<int64_t>(matrix.bitmasks.size()), skew), row_offsets(matrix.g.rows * 8), nnz(8);
  Workspace workspace(matrix.g);
  const cudaError_t error = cuda::compress(dense.data(), matrix.g, width, zero_test(matrix.kind), bitmasks.data(), int64s(row_offsets),
                                           values.data(), capacity, int64s(nnz), workspace.buffer.data(), nullptr);
  check(error == cudaSuccess, "compress: %s", cudaGetErrorName(error));
  check(*int64s(nnz) == matrix.nnz(), "nnz: %" PRId64 ", not %" PRId64, *int64s(nnz), matrix.nnz());
  check(bitmasks.bytes() == matrix.bitmasks, "bitmasks");
  check(row_offsets.bytes() == bytes_of(matrix.row_offsets), "row_offsets");
  const int64_t written = std::min(capacity, matrix.nnz()) * width;
  Bytes expected(matrix.values.begin(), matrix.values.begin() + written);
  expected.resize(static_cast<size_t>(capacity * width), Buffer::kCanaryByte);
  check(values.bytes() == expected, "values, capacity %" PRId64 " of %" PRId64, capacity, matrix.nnz());
  for (const Buffer* buffer : {&dense, &values, &bitmasks, &row_offsets, &nnz, &workspace.buffer}) {
    check(buffer->canaries_intact(), "compress wrote past a buffer");
  }
}

// ---------------------------------------------------------------------------------------------------------------- decompress

// The fault that is to be found in a weight.
Fault fault_of(const Matrix& matrix) {
  const Geometry& g = matrix.g;
  if (g.rows > 0 && matrix.row_offsets[0] != 0) return 0;
  const int64_t row = first_faulty_reference(matrix.bitmasks, matrix.row_offsets, g.rows, g.cols, matrix.nnz(), matrix.nnz());
  return row < g.rows ? static_cast<Fault>(row) : kNoFault;
}

// The dense elements of a weight without fault.
Bytes expand(const Matrix& matrix) {
  const size_t width = static_cast<size_t>(matrix.kind.width);
  Bytes dense;
  size_t taken = 0;
  for (int64_t row = 0; row < matrix.g.rows; ++row) {
    for (int64_t col = 0; col < matrix.g.cols; ++col) {
      const bool stored = bit(matrix.bitmasks.data() + row * ((matrix.g.cols + 7) / 8), col);
      for (size_t i = 0; i < width; ++i) dense.push_back(stored ? matrix.values[taken + i] : 0);
      taken += stored ? width : 0;
    }
  }
  return dense;
}

// Decompresses the rows between one of `cuts` and the next, each part by itself, or proves them only. `skew` as above.
void check_decompress(const Matrix& matrix, const std::vector<int64_t>& cuts, int skew, bool prove_only = false) {
  const Fault expected = fault_of(matrix);
  const int width = matrix.kind.width;
  Buffer values(matrix.values, 3 * skew * width), bitmasks(matrix.bitmasks, skew), row_offsets(bytes_of(matrix.row_offsets)), fault(8);
  const BitmaskMatrix w{values.data(), bitmasks.data(), int64s(row_offsets), matrix.g.rows, matrix.g.cols, matrix.nnz()};
  Bytes dense_bytes;
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const Geometry part{cuts[i + 1] - cuts[i], matrix.g.cols};
    Buffer dense(prove_only ? 0 : part.rows * part.cols * width, skew * width);
    Workspace workspace(part);
    const cudaError_t error = cuda::decompress(w, cuts[i], cuts[i + 1], width, dense.data(), i == 0, reinterpret_cast<Fault*>(fault.data()),
                                               workspace.buffer.data(), nullptr);
    check(error == cudaSuccess, "decompress: %s", cudaGetErrorName(error));
    check(dense.canaries_intact() && workspace.buffer.canaries_intact(), "decompress wrote past a buffer");
    const Bytes bytes = dense.bytes();
    dense_bytes.insert(dense_bytes.end(), bytes.begin(), bytes.end());
  }
  const Fault found = *reinterpret_cast<const Fault*>(fault.data());
  check(found == expected, "fault: %" PRId64 ", not %" PRId64 " (-1: none)", static_cast<int64_t>(found), static_cast<int64_t>(expected));
  if (!prove_only && expected == kNoFault) check(dense_bytes == expand(matrix), "dense");
  check(fault.canaries_intact(), "decompress wrote past the fault");
}

// ---------------------------------------------------------------------------------------------------------------- tests

struct Shape {
  int64_t rows, cols;
};

// Bytes that a tile takes for an element of this width: shapes about it are worth a look.
constexpr int64_t tile_bytes(int width) { return 256 * (width < 8 ? 8 / width : 1); }

void test_matrix(const Kind& kind, const Shape& shape, int density) {
  const std::string before = place;
  place += std::string(" ") + kind.name + " [" + std::to_string(shape.rows) + ", " + std::to_string(shape.cols) + "] " +
           std::to_string(density) + "%";
  const Matrix matrix = random_matrix(kind, shape.rows, shape.cols, density);
  const int skew = static_cast<int>(random_below(4));
  check_count(matrix, static_cast<int>(random_below(4)) * kind.width);
  check_compress(matrix, skew, matrix.nnz());
  check_compress(matrix, 0, random_below(matrix.nnz() + 9));
  const int64_t a = random_below(shape.rows + 1), b = a + random_below(shape.rows - a + 1);
  check_decompress(matrix, {0, shape.rows}, skew);
  check_decompress(matrix, {0, a, b, shape.rows}, 0);
  check_decompress(matrix, {0, a, shape.rows}, skew, true);
  place = before;
}

TEST_FAMILY(codec_shapes) {
  const Shape shapes[] = {{0, 0}, {0, 5}, {5, 0}, {300, 0}, {1, 1},  {1, 7},  {1, 8},   {1, 9},   {1, 2049}, {300, 1},
                          {9, 7}, {9, 8}, {9, 9}, {5, 63},  {5, 64}, {5, 65}, {3, 255}, {3, 256}, {3, 257},  {33, 130}};
  for (const Kind& kind : kKinds) {
    for (const Shape& shape : shapes) {
      const int densities[] = {0, 1, 50, 100};
      test_matrix(kind, shape, densities[random_below(4)]);
    }
  }
}

TEST_FAMILY(codec_tiles) {
  for (const Kind& kind : kKinds) {
    const int64_t bytes = tile_bytes(kind.width);
    const Shape shapes[] = {
        {1, bytes * 8},              // one tile, to the byte
        {1, bytes * 8 + 1},          // a byte more
        {1, bytes * 8 * 5 / 2 - 3},  // a row across tiles
        {bytes + 7, 3},              // a row for each byte
        {5, bytes * 4 + 8},          // rows across tiles, whole octets
        {70, 1000},
    };
    for (const Shape& shape : shapes) test_matrix(kind, shape, 50);
  }
}

// Many tiles, in many interleavings.
TEST_FAMILY(codec_many_tiles) {
  const Kind& kind = kKinds[8];
  const Matrix matrix = random_matrix(kind, 3, tile_bytes(kind.width) * 8 * 12 + 5, 30);
  for_each_seed(kSanitized ? 2 : 8, [&] {
    check_compress(matrix, 0, matrix.nnz());
    check_decompress(matrix, {0, 3}, 0);
  });
}

__global__ void look_back_once(uint64_t* states, int64_t tile, uint32_t tile_sum, int64_t* before) {
  const int64_t sum = cuda::scan::look_back(states, tile, tile_sum, 0);
  if (threadIdx.x == 0) *before = sum;
}

// Looking back further than a warp sees at once: the nearest prefix may be any number of tiles away, with sums in between.
TEST_FAMILY(codec_look_back) {
  using namespace cuda::scan;
  constexpr int64_t kBig = (int64_t{1} << 61) + 12345;
  for (const int64_t tile : {1, 2, 31, 32, 33, 64, 65, 130}) {
    for (int64_t nearest = 0; nearest < tile; ++nearest) {
      Buffer states((tile + 1) * 8), before(8);
      uint64_t* const words = reinterpret_cast<uint64_t*>(states.data());
      int64_t expected = kBig;
      for (int64_t i = 0; i < tile; ++i) {
        const int64_t sum = random_below(16385);
        words[i] = i > nearest ? make_state(kTile, sum) : i == nearest ? make_state(kPrefix, kBig) : random_word();
        if (i > nearest) expected += sum;
      }
      words[tile] = make_state(kNothing, 0);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(1);
      config.blockDim = dim3(kLanes);
      check(cudaLaunchKernelEx(&config, look_back_once, words, tile, 77u, int64s(before)) == cudaSuccess, "launch");
      check(*int64s(before) == expected, "%" PRId64 " before tile %" PRId64 ", prefix at %" PRId64, *int64s(before), tile, nearest);
      check(words[tile] == make_state(kPrefix, expected + 77), "state of tile %" PRId64, tile);
      check(states.canaries_intact(), "look_back wrote past the states");
    }
  }
}

// Damages one thing.
void damage(Matrix& matrix) {
  const int64_t numbers[] = {0, -1, 1, matrix.nnz(), matrix.nnz() + 1, INT64_MIN, INT64_MAX, int64_t{1} << 62, -(int64_t{1} << 62)};
  const size_t row = static_cast<size_t>(random_below(matrix.g.rows));
  const size_t byte = static_cast<size_t>(random_below(static_cast<int64_t>(matrix.bitmasks.size())));
  switch (random_below(7)) {
    case 0:
      matrix.row_offsets[row] = numbers[random_below(9)];
      break;
    case 1:
      matrix.row_offsets[row] += random_below(2) == 0 ? 1 : -1;
      break;
    case 2:
      std::swap(matrix.row_offsets[row], matrix.row_offsets[static_cast<size_t>(random_below(matrix.g.rows))]);
      break;
    case 3:
      matrix.bitmasks[byte] ^= static_cast<uint8_t>(1 << random_below(8));
      break;
    case 4:
      matrix.bitmasks[byte] = static_cast<uint8_t>(random_word());
      break;
    case 5:
      matrix.values.resize(static_cast<size_t>(random_below(matrix.nnz() + 1) * matrix.kind.width));
      break;
    default:
      matrix.values.resize(matrix.values.size() + static_cast<size_t>(matrix.kind.width), 0x55);
  }
}

void test_damage(const Matrix& damaged) {
  const int64_t rows = damaged.g.rows, cut = random_below(rows + 1);
  const int skew = static_cast<int>(random_below(3));
  check_decompress(damaged, {0, rows}, skew);
  check_decompress(damaged, {0, cut, rows}, skew);
  check_decompress(damaged, {0, rows}, skew, true);
}

// Every offset one too high or too low, every bit flipped, one value too few or too many.
TEST_FAMILY(codec_single_faults) {
  const Matrix sound = random_matrix(kFloat16, 6, 21, 50);
  int64_t unnoticed = 0;
  const auto expect = [&](const Matrix& damaged) {
    unnoticed += fault_of(damaged) == kNoFault;
    test_damage(damaged);
  };
  for (size_t row = 0; row < sound.row_offsets.size(); ++row) {
    for (const int64_t change : {-1, 1}) {
      Matrix damaged = sound;
      damaged.row_offsets[row] += change;
      expect(damaged);
    }
  }
  for (size_t bit = 0; bit < sound.bitmasks.size() * 8; ++bit) {
    Matrix damaged = sound;
    damaged.bitmasks[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    expect(damaged);
  }
  for (const int change : {-1, 1}) {
    Matrix damaged = sound;
    damaged.values.resize(sound.values.size() + static_cast<size_t>(change * sound.kind.width));
    expect(damaged);
  }
  check(unnoticed == 0, "%" PRId64 " changes are no damage to the reference", unnoticed);
}

// A set bit that has moved to the padding: all sums are as they should be.
TEST_FAMILY(codec_padding) {
  for (const int64_t cols : {1, 7, 9, 12, 63, 65}) {
    const Matrix sound = random_matrix(kFloat16, 5, cols, 100);
    const int64_t row_bytes = (cols + 7) / 8;
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t col = cols; col < row_bytes * 8; ++col) {
        Matrix damaged = sound;
        uint8_t* const bits = damaged.bitmasks.data() + row * row_bytes;
        bits[0] ^= 1;
        bits[col / 8] ^= static_cast<uint8_t>(1 << col % 8);
        check(fault_of(damaged) == static_cast<Fault>(row), "the reference sees no padding in row %" PRId64, row);
        test_damage(damaged);
      }
    }
  }
}

TEST_FAMILY(codec_random_faults) {
  const Shape shapes[] = {{1, 1}, {40, 3}, {7, 64}, {20, 131}, {3, 9001}, {600, 8}, {4, 0}};
  for (int i = 0; i < (kSanitized ? 150 : 400); ++i) {
    const Shape& shape = shapes[random_below(7)];
    const Matrix sound = random_matrix(kKinds[random_below(10)], shape.rows, shape.cols, static_cast<int>(random_below(101)));
    Matrix damaged = sound;
    if (shape.cols == 0) {
      damaged.row_offsets[static_cast<size_t>(random_below(shape.rows))] = random_below(3) - 1;
      damaged.values.resize(static_cast<size_t>(random_below(2) * sound.kind.width));
    } else {
      for (int64_t damages = random_below(4); damages > 0; --damages) damage(damaged);
    }
    test_damage(damaged);
  }
}

TEST_FAMILY(codec_poison) {
  for (const int64_t bytes : {0, 1, 17, 1000}) {
    for (const Fault verdict : {kNoFault, Fault{0}, Fault{7}}) {
      Buffer data(bytes, 1), fault(8);
      std::memcpy(fault.data(), &verdict, 8);
      check(cuda::poison(data.data(), bytes, reinterpret_cast<const Fault*>(fault.data()), nullptr) == cudaSuccess, "poison");
      const uint8_t expected = verdict == kNoFault ? Buffer::kCanaryByte : 0xff;
      check(data.bytes() == Bytes(static_cast<size_t>(bytes), expected), "poison of %" PRId64 " bytes", bytes);
      check(data.canaries_intact(), "poison wrote past a buffer");
    }
  }
}

// What a launcher refuses, it refuses before it touches anything.
TEST_FAMILY(codec_refusals) {
  const ZeroTest test = zero_test(kFloat16);
  uint8_t* const odd = reinterpret_cast<uint8_t*>(64 + 1);
  const Geometry g{4, 8}, large{int64_t{1} << 40, 8};
  int64_t nnz = 0;
  Fault fault = 0;
  uint64_t workspace[8] = {};
  const auto compress = [&](const Geometry& geometry, int width, const void* dense, void* values) {
    return cuda::compress(dense, geometry, width, test, nullptr, nullptr, values, 0, &nnz, workspace, nullptr);
  };
  check(compress(g, 2, odd, nullptr) == cudaErrorInvalidValue, "dense not aligned");
  check(compress(g, 2, nullptr, odd) == cudaErrorInvalidValue, "values not aligned");
  check(compress(g, 3, nullptr, nullptr) == cudaErrorInvalidValue, "width 3");
  check(compress(large, 16, nullptr, nullptr) == cudaErrorInvalidValue, "more tiles than a grid has");
  check(cuda::count_nonzero(odd, g, 2, test, &nnz, nullptr) == cudaErrorInvalidValue, "dense not aligned");
  const auto decompress = [&](void* dense, const void* values) {
    return cuda::decompress({values, nullptr, nullptr, 4, 8, 0}, 0, 4, 2, dense, false, &fault, workspace, nullptr);
  };
  check(decompress(odd, nullptr) == cudaErrorInvalidValue, "dense not aligned");
  check(decompress(workspace, odd) == cudaErrorInvalidValue, "values not aligned");
}

// ---------------------------------------------------------------------------------------------------------------- planted errors

PLANTED_ERROR(codec_fewer_values, "heap-buffer-overflow") {
  const Matrix matrix = random_matrix(kFloat16, 5, 64, 100);
  Buffer values(Bytes(matrix.values.begin(), matrix.values.end() - 2)), bitmasks(matrix.bitmasks);
  Buffer row_offsets(bytes_of(matrix.row_offsets)), dense(static_cast<int64_t>(matrix.dense.size())), fault(8);
  Workspace workspace(matrix.g);
  cuda::decompress({values.data(), bitmasks.data(), int64s(row_offsets), 5, 64, matrix.nnz()}, 0, 5, 2, dense.data(), true,
                   reinterpret_cast<Fault*>(fault.data()), workspace.buffer.data(), nullptr);
}

PLANTED_ERROR(codec_less_capacity, "heap-buffer-overflow") {
  const Matrix matrix = random_matrix(kFloat16, 5, 65, 100);
  Buffer dense(matrix.dense), bitmasks(static_cast<int64_t>(matrix.bitmasks.size())), row_offsets(40), nnz(8);
  Buffer values(static_cast<int64_t>(matrix.values.size()) - 2);
  Workspace workspace(matrix.g);
  cuda::compress(dense.data(), matrix.g, 2, zero_test(kFloat16), bitmasks.data(), int64s(row_offsets), values.data(), matrix.nnz(),
                 int64s(nnz), workspace.buffer.data(), nullptr);
}

PLANTED_ERROR(codec_other_zero_test, "bitmasks") {
  Matrix matrix = random_matrix(kKinds[2], 5, 65, 50);
  matrix.kind = kFloat16;
  matrix.dense[0] = 0, matrix.dense[1] = 0x80;
  check_compress(matrix, 0, matrix.nnz());
}

}  // namespace
}  // namespace bitmask::testing
