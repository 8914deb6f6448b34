// Tests linear_stream against dense products in double precision, and plan_linear.
//
// Weights with few values go the way that looks for bits, others the way that looks at them. Devices of different sizes make a product one
// block's work or that of many, of one warp each or of many, with x in shared memory at once or a range of columns at a time.
#include "linear_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16};
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {3, 99 << 10}};
constexpr int64_t kRows[] = {1, 2, 3, 7, 8, 9, 16, 33};
constexpr int64_t kColumns[] = {0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 1023, 1024, 1025, 2047, 2049, 4111};
constexpr double kDensities[] = {0, 0.02, 0.2, 0.3, 0.5, 0.9, 1};  // looked for below a quarter

constexpr LinearKernel kKernel{"linear_stream", cuda::linear_stream, [](const cuda::LinearParams&, const Device&) { return int64_t{0}; }};

void test_problem(const LinearProblem& problem, const Device& device, bool biased, const Skews& skews = kAligned) {
  test_kernel(kKernel, problem, device, biased, skews);
}

// ---------------------------------------------------------------------------------------------------------------- products

void test_products(cuda::LinearDtype dtype) {
  for (const int64_t cols : kColumns) {
    for (const double density : kDensities) {
      test_problem(make_problem(dtype, 1 + random_below(4), any_of(kRows), cols, density, kIntegers), any_of(kDevices),
                   random_below(2) == 0);
    }
    for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
      for (const double density : {0.1, 0.5}) {
        test_problem(make_problem(dtype, 1 + random_below(4), any_of(kRows), cols, density, numbers), any_of(kDevices),
                     random_below(2) == 0);
      }
    }
  }
  for (int64_t m = 1; m <= 9; ++m) {
    for (const double density : {0.1, 0.5})
      test_problem(make_problem(dtype, m, 21, 1500, density, kIntegers), any_of(kDevices), m % 2 == 0);
  }
  for (const int64_t rows : {1, 5, 600, 1100}) {  // more than a block takes at a time
    for (const Device& device : kDevices) test_problem(make_problem(dtype, 2, rows, 40, 0.5, kIntegers), device, true);
  }
}

// x that shared memory does not hold at once.
void test_ranges(cuda::LinearDtype dtype) {
  for (const double density : {0.1, 0.5}) {
    for (const Numbers numbers : {kIntegers, kSpecials}) {
      test_problem(make_problem(dtype, 1, 3, 70001, density, numbers), kDevices[0], true);
      test_problem(make_problem(dtype, 4, 5, 12345, density, numbers), kDevices[3], false);
    }
  }
}

// Parts that begin anywhere that their elements may.
void test_alignment(cuda::LinearDtype dtype) {
  const int width = kFormats[dtype].width;
  for (int skew = 0; skew < 16; ++skew) {
    const Skews skews{width * skew, skew, width * (skew % 3), width * (skew % 2)};
    for (const int64_t cols : {int64_t{40}, int64_t{1056}, 1000 + random_below(50)}) {
      const double density = skew % 3 == 0 ? 0.1 : skew % 2 == 0 ? 0.5 : 1;
      test_problem(make_problem(dtype, 1 + skew % 4, 5, cols, density, kIntegers), kDevices[skew % 4], skew % 3 == 0, skews);
    }
  }
}

// The same bits, whatever order blocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  for (const double density : {0.1, 0.5}) {
    const LinearProblem problem = make_problem(dtype, 3, 11, 5000, density, kReals);
    Bytes first;
    for_each_seed(5, [&] {
      const Bytes y = run_linear(kKernel, problem, kDevices[1], true, kAligned);
      if (first.empty()) first = y;
      check(y == first, "other bits than before");
    });
  }
}

// One infinity or NaN in x meets zeros that are not stored.
void test_specials_in_x(cuda::LinearDtype dtype) {
  for (const double density : {0.0, 0.1, 0.5}) {
    for (const double special : {static_cast<double>(INFINITY), -static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
      LinearProblem problem = make_problem(dtype, 2, 9, 2100, density, kIntegers);
      problem.x[static_cast<size_t>(random_below(2 * 2100))] = problem.format().encode(special);
      test_problem(problem, any_of(kDevices), true);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 150; ++i) {
    const int64_t cols = i % 3 == 0 ? 1 + random_below(3000) : any_of(kColumns) + 1;
    LinearProblem problem = make_problem(dtype, 1 + random_below(4), 1 + random_below(20), cols, any_of(kDensities), kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem);
    test_problem(problem, any_of(kDevices), i % 2 == 0, {kFormats[dtype].width * (i % 8), i % 5, 0, 0});
  }
  LinearProblem empty = make_problem(dtype, 3, 4, 0, 0, kIntegers);  // no column, yet offsets
  empty.weight.row_offsets[2] = 1;
  test_problem(empty, kDevices[0], true);
}

void test_plan() {
  using cuda::LinearWay;
  place = "plan_linear";
  const auto way = [](cuda::LinearDtype dtype, int64_t m, int64_t rows = 4096, int64_t cols = 4096, int64_t one_of = 2) {
    const BitmaskMatrix w{nullptr, nullptr, nullptr, rows, cols, rows * cols / one_of};
    return cuda::plan_linear({w, nullptr, nullptr, nullptr, m, dtype}, {132, 227 << 10}).way;
  };
  check(way(cuda::kBfloat16, 1) == LinearWay::kStream, "one row of x");
  check(way(cuda::kFloat16, 8) == LinearWay::kMultiply, "eight rows of x");
  check(way(cuda::kFloat32, 8) == LinearWay::kStream, "eight rows of float32");
  check(way(cuda::kFloat32, 100) == LinearWay::kLibrary && way(cuda::kBfloat16, 1000) == LinearWay::kLibrary, "many rows of x");
  check(way(cuda::kBfloat16, 1, 14336) == LinearWay::kMultiply, "a large weight, half full");
  check(way(cuda::kBfloat16, 1, 14336, 4096, 10) == LinearWay::kStream, "a large weight with few values");
  check(way(cuda::kFloat32, 1, 14336) == LinearWay::kStream, "a large weight in float32");
  check(way(cuda::kBfloat16, 1, 1, int64_t{1} << 31) == LinearWay::kLibrary, "columns beyond 32 bits");
}

TEST_FAMILY(linear_stream) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_products(dtype);
    test_ranges(dtype);
    test_alignment(dtype);
    test_determinism(dtype);
    test_specials_in_x(dtype);
    test_faults(dtype);
    test_problem(make_problem(dtype, 0, 4, 20, 0.5, kIntegers), kDevices[0], false);
    test_problem(make_problem(dtype, 4, 0, 20, 0.5, kIntegers), kDevices[0], false);
  }
  test_plan();
}

// A weight that claims more than it has: what the sanitizers see of the kernel's copies.
void run_short(int64_t values_missing, size_t bytes_missing) {
  LinearProblem problem = make_problem(cuda::kBfloat16, 1, 16, 256, 1, kIntegers);
  const Weight& weight = problem.weight;
  Bytes bits = weight.bitmasks;
  bits.resize(bits.size() - bytes_missing);
  Buffer values((problem.values() - values_missing) * 2), bitmasks(bits), offsets(weight.rows * 8), x(pack(problem.format(), problem.x)),
      y(32);
  std::memcpy(offsets.data(), weight.row_offsets.data(), weight.row_offsets.size() * 8);
  const BitmaskMatrix w{values.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(offsets.data()), 16, 256, problem.values()};
  cuda::linear_stream({w, x.data(), nullptr, y.data(), 1, problem.dtype}, kDevices[0], nullptr, nullptr);
}

PLANTED_ERROR(stream_past_values, "heap-buffer-overflow") { run_short(1, 0); }
PLANTED_ERROR(stream_past_bitmasks, "heap-buffer-overflow") { run_short(0, 1); }

}  // namespace
}  // namespace bitmask::testing
