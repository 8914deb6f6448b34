// Tests linear_multiply against dense products in double precision.
//
// Most numbers are small integers: their sums are exact in any order, so that every bit of y is known and one weight in the wrong place
// shows. Devices of different sizes make the same product one block's work or that of many.
#include "../../csrc/cuda/linear_multiply.h"

#include <algorithm>
#include <optional>

#include "../native/linear_calls.h"
#include "testing.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define BITMASK_SANITIZED 1
#endif
#endif

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16};

// One block at a time for each of few processors, or more blocks than there is work; the last one cannot hold 64 rows of x at a time.
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {3, 99 << 10}};

// ---------------------------------------------------------------------------------------------------------------- problems

// A weight, x and a bias as bits and as numbers.
struct Problem {
  cuda::LinearDtype dtype;
  int64_t m;
  Weight weight;
  std::vector<uint64_t> x, bias;
  bool exact;

  const Format& format() const { return kFormats[dtype]; }
};

Problem make_problem(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, double density, Numbers numbers) {
  const Format& format = kFormats[dtype];
  std::vector<uint64_t> w(static_cast<size_t>(rows * cols)), x(static_cast<size_t>(m * cols)), bias(static_cast<size_t>(rows));
  std::vector<bool> kept;
  for (uint64_t& element : w) {
    kept.push_back(static_cast<double>(random_below(1 << 20)) < density * (1 << 20));
    element = kept.back() ? random_element(format, numbers, 16, false) : 0;
  }
  for (uint64_t& element : x) element = random_element(format, numbers, 15, true);
  for (uint64_t& element : bias) element = random_element(format, numbers, 100, false);
  return {dtype, m, compress(format, rows, cols, w, kept), x, bias, numbers != kReals};
}

int64_t values_of(const Weight& weight) { return static_cast<int64_t>(weight.values.size()) / 2; }

// The elements of a row of a weight, or nothing if it is faulty.
std::optional<std::vector<double>> decode_row(const Format& format, const Weight& weight, int64_t row) {
  const int64_t row_bytes = bitmask_bytes(weight.cols), start = weight.row_offsets[static_cast<size_t>(row)];
  const int64_t next = row + 1 < weight.rows ? weight.row_offsets[static_cast<size_t>(row + 1)] : values_of(weight);
  const uint8_t* const bits = weight.bitmasks.data() + row * row_bytes;
  const bool placed = start >= 0 && start <= next && next <= values_of(weight) && (row > 0 || start == 0);
  if (!placed || next - start != count_reference(bits, row_bytes)) return std::nullopt;
  std::vector<double> elements;
  const uint8_t* value = weight.values.data() + start * format.width;
  for (int64_t col = 0; col < 8 * row_bytes; ++col) {
    const bool there = bit(bits, col);
    if (col >= weight.cols && there) return std::nullopt;
    if (col < weight.cols) elements.push_back(there ? format.decode(format.load(value)) : 0);
    if (there) value += format.width;
  }
  return elements;
}

// What is to come out for a row of W: NaN if it is faulty. And how far off that may be.
struct Answer {
  std::vector<double> y, slack;  // [m]
};

Answer answer_of(const Problem& problem, const std::vector<double>& x, int64_t row, bool biased) {
  const Format& format = problem.format();
  const int64_t cols = problem.weight.cols;
  const double bias = biased ? format.decode(problem.bias[static_cast<size_t>(row)]) : 0;
  const auto w = decode_row(format, problem.weight, row);
  Answer answer;
  for (int64_t i = 0; i < problem.m; ++i) {
    double sum = w ? bias : NAN, magnitude = std::fabs(bias);
    for (int64_t col = 0; w && col < cols; ++col) {
      const double product = x[static_cast<size_t>(i * cols + col)] * (*w)[static_cast<size_t>(col)];
      sum += product;
      magnitude += std::fabs(product);
    }
    answer.y.push_back(problem.exact ? format.decode(format.encode(sum)) : sum);
    const bool rounded = !problem.exact && std::isfinite(magnitude);
    answer.slack.push_back(rounded ? std::ldexp(magnitude, -23) * static_cast<double>(cols + 4) + format.step(magnitude) : 0);
  }
  return answer;
}

// ---------------------------------------------------------------------------------------------------------------- calls

// Bars the bytes before a buffer's data, in eights, where AddressSanitizer is watching: its red zone begins before them.
class Barrier {
 public:
  Barrier(const uint8_t* data, int skew) : begin_(data - (data == nullptr ? 0 : skew)), bytes_(data == nullptr ? 0 : skew / 8 * 8) {
#if BITMASK_SANITIZED
    __asan_poison_memory_region(begin_, static_cast<size_t>(bytes_));
#endif
  }
  ~Barrier() {
#if BITMASK_SANITIZED
    __asan_unpoison_memory_region(begin_, static_cast<size_t>(bytes_));
#endif
  }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

 private:
  [[maybe_unused]] const uint8_t* begin_;
  [[maybe_unused]] int bytes_;
};

struct Skews {
  int values, bitmasks, x, y;  // bytes off a cache line
};
constexpr Skews kAligned{0, 0, 0, 0};

// y in memory of its own, or nothing if the launcher fails or something was written outside.
Bytes run(const Problem& problem, const Device& device, bool biased, const Skews& skews) {
  const Weight& weight = problem.weight;
  Buffer values(weight.values, skews.values), bitmasks(weight.bitmasks, skews.bitmasks), offsets(weight.rows * 8);
  if (weight.rows > 0) std::memcpy(offsets.data(), weight.row_offsets.data(), weight.row_offsets.size() * 8);
  Buffer x(pack(problem.format(), problem.x), skews.x), bias(pack(problem.format(), problem.bias), skews.x);
  Buffer y(problem.m * weight.rows * 2, skews.y);
  const Barrier before_values(values.data(), skews.values), before_bitmasks(bitmasks.data(), skews.bitmasks), before_x(x.data(), skews.x);
  const BitmaskMatrix w{values.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(offsets.data()),
                        weight.rows,   weight.cols,     values_of(weight)};
  const cuda::LinearParams params{w, x.data(), biased ? bias.data() : nullptr, y.data(), problem.m, problem.dtype};
  Buffer workspace(cuda::linear_multiply_workspace_bytes(params, device));
  twin::properties.multiprocessors = device.multiprocessors;
  twin::properties.shared_bytes = device.shared_bytes;
  const cudaError_t error = cuda::linear_multiply(params, device, workspace.data(), nullptr);
  twin::properties = {};
  check(error == cudaSuccess, "returns %d", static_cast<int>(error));
  const bool intact = y.canaries_intact() && workspace.canaries_intact();
  check(intact, "writes outside");
  return y.bytes();
}

void check_answers(const Problem& problem, const Bytes& y, bool biased) {
  const Format& format = problem.format();
  const std::vector<double> x = decode(format, problem.x);
  const int64_t rows = problem.weight.rows;
  int64_t wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Answer answer = answer_of(problem, x, row, biased);
    for (int64_t i = 0; i < problem.m; ++i) {
      const double got = format.decode(format.load(y.data() + (i * rows + row) * 2));
      const double expected = answer.y[static_cast<size_t>(i)];
      if (std::isnan(expected) ? std::isnan(got) : got == expected || std::fabs(got - expected) <= answer.slack[static_cast<size_t>(i)]) {
        continue;
      }
      if (wrong++ == 0) check(false, "x row %" PRId64 ", row %" PRId64 ": %g instead of %g", i, row, got, expected);
    }
  }
  check(wrong == 0, "%" PRId64 " wrong", wrong);
}

std::string place_of(const Problem& problem, const Device& device, bool biased) {
  return std::string("linear_multiply ") + problem.format().name + " m " + std::to_string(problem.m) + " [" +
         std::to_string(problem.weight.rows) + ", " + std::to_string(problem.weight.cols) + "] values " +
         std::to_string(values_of(problem.weight)) + ", " + std::to_string(device.multiprocessors) + " processors, bias " +
         std::to_string(biased);
}

void test_problem(const Problem& problem, const Device& device, bool biased, const Skews& skews = kAligned) {
  place = place_of(problem, device, biased);
  check_answers(problem, run(problem, device, biased, skews), biased);
}

// ---------------------------------------------------------------------------------------------------------------- products

constexpr int64_t kRows[] = {1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300};
constexpr int64_t kColumns[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 1000, 1100, 1793};
constexpr int64_t kMs[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130};
constexpr double kDensities[] = {0, 0.05, 0.5, 0.9, 1};

template <typename T, size_t kCount>
T any_of(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

void test_products(cuda::LinearDtype dtype) {
  for (const int64_t cols : kColumns) {
    for (const double density : kDensities) {
      test_problem(make_problem(dtype, any_of(kMs), any_of(kRows), cols, density, kIntegers), any_of(kDevices), random_below(2) == 0);
    }
    for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
      test_problem(make_problem(dtype, any_of(kMs), any_of(kRows), cols, 0.5, numbers), any_of(kDevices), random_below(2) == 0);
    }
  }
  for (const int64_t m : kMs) {
    for (const Device& device : kDevices) test_problem(make_problem(dtype, m, 130, 520, 0.5, kIntegers), device, true);
  }
  for (const int64_t rows : kRows) test_problem(make_problem(dtype, 9, rows, 272, 0.5, kSpecials), any_of(kDevices), false);
}

// Parts that begin anywhere that their elements may.
void test_alignment(cuda::LinearDtype dtype) {
  for (int skew = 0; skew < 16; ++skew) {
    const Skews skews{2 * skew, skew, 2 * (skew % 5), 2 * (skew % 2)};
    for (const int64_t cols : {int64_t{40}, int64_t{136}, int64_t{264}, 250 + random_below(40)}) {
      const double density = skew % 2 == 0 ? 0.5 : 1;
      test_problem(make_problem(dtype, 5 + skew, 20, cols, density, kIntegers), kDevices[skew % 4], skew % 3 == 0, skews);
    }
  }
}

// The same bits, whatever order blocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  for (const int64_t m : {8, 33}) {
    const Problem problem = make_problem(dtype, m, 140, 1500, 0.5, kReals);
    Bytes first;
    for_each_seed(6, [&] {
      const Bytes y = run(problem, kDevices[2], true, kAligned);
      if (first.empty()) first = y;
      check(y == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

// Changes something of a weight, such that one row or a few may be faulty.
void mutate(Weight& weight) {
  const int64_t nnz = values_of(weight);
  const int64_t odd_offsets[] = {-1, 1, nnz, nnz + 1, nnz - 1, INT64_MIN, INT64_MAX, int64_t{1} << 40, random_below(nnz + 1)};
  const size_t row = static_cast<size_t>(random_below(weight.rows));
  const size_t byte = static_cast<size_t>(random_below(static_cast<int64_t>(weight.bitmasks.size())));
  switch (random_below(5)) {
    case 0:
      weight.row_offsets[row] = any_of(odd_offsets);
      break;
    case 1:
      weight.row_offsets[row] += random_below(5) - 2;
      break;
    case 2:
      weight.bitmasks[byte] = static_cast<uint8_t>(weight.bitmasks[byte] ^ 1 << random_below(8));
      break;
    case 3:  // as many bits as before, perhaps: still honest, or padding
      std::swap(weight.bitmasks[byte], weight.bitmasks[static_cast<size_t>(random_below(static_cast<int64_t>(weight.bitmasks.size())))]);
      break;
    default:
      weight.values.resize(static_cast<size_t>(2 * std::max<int64_t>(0, nnz + random_below(5) - 3)));
  }
}

void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 120; ++i) {
    const int64_t cols = i % 3 == 0 ? 1 + random_below(600) : any_of(kColumns) + 1;
    Problem problem = make_problem(dtype, 1 + random_below(20), 1 + random_below(140), cols, any_of(kDensities), kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem.weight);
    test_problem(problem, any_of(kDevices), i % 2 == 0, {2 * (i % 8), i % 5, 0, 0});
  }
  Problem late = make_problem(dtype, 3, 20, 300, 0.5, kIntegers);  // a value before those of the first row
  late.weight.values.insert(late.weight.values.begin(), 2, 0);
  for (int64_t& offset : late.weight.row_offsets) ++offset;
  test_problem(late, kDevices[0], true);
  Problem empty = make_problem(dtype, 3, 4, 0, 0, kIntegers);  // no column, yet offsets
  empty.weight.row_offsets[2] = 1;
  test_problem(empty, kDevices[0], true);
}

void test_arguments() {
  Problem problem = make_problem(cuda::kBfloat16, 2, 3, 20, 0.5, kIntegers);
  const cuda::LinearParams params{{nullptr, nullptr, nullptr, 3, 20, 0}, nullptr, nullptr, nullptr, 2, cuda::kFloat32};
  place = "linear_multiply";
  check(cuda::linear_multiply(params, kDevices[0], nullptr, nullptr) == cudaErrorInvalidValue, "multiplies float32");
  problem.m = 0;
  check(run(problem, kDevices[0], false, kAligned).empty(), "no rows of x");
  test_problem(make_problem(cuda::kFloat16, 4, 0, 20, 0.5, kIntegers), kDevices[0], false);
}

TEST_FAMILY(linear_multiply) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_products(dtype);
    test_alignment(dtype);
    test_determinism(dtype);
    test_faults(dtype);
  }
  test_arguments();
}

// A weight that claims more than it has: what the sanitizers see of the kernels' copies.
void run_short(int64_t values, int64_t bitmask_bytes_missing) {
  const Problem problem = make_problem(cuda::kBfloat16, 8, 16, 256, 1, kIntegers);
  const Weight& weight = problem.weight;
  Bytes bits = weight.bitmasks;
  bits.resize(bits.size() - static_cast<size_t>(bitmask_bytes_missing));
  Buffer values_there(values * 2), bitmasks(bits), offsets(weight.rows * 8), x(pack(problem.format(), problem.x)), y(problem.m * 16 * 2);
  std::memcpy(offsets.data(), weight.row_offsets.data(), weight.row_offsets.size() * 8);
  const BitmaskMatrix w{values_there.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(offsets.data()), 16, 256, values_of(weight)};
  const cuda::LinearParams params{w, x.data(), nullptr, y.data(), problem.m, problem.dtype};
  Buffer workspace(cuda::linear_multiply_workspace_bytes(params, kDevices[0]));
  cuda::linear_multiply(params, kDevices[0], workspace.data(), nullptr);
}

PLANTED_ERROR(multiply_past_values, "heap-buffer-overflow") { run_short(16 * 256 - 1, 0); }
PLANTED_ERROR(multiply_past_bitmasks, "heap-buffer-overflow") { run_short(16 * 256, 1); }

}  // namespace
}  // namespace bitmask::testing
