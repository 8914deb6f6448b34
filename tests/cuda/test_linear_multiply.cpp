// Tests linear_multiply against dense products in double precision.
//
// Most numbers are small integers: their sums are exact in any order, so that every bit of y is known and one weight in the wrong place
// shows. Devices of different sizes make the same product one block's work or that of many.
#include "../../csrc/cuda/linear_multiply.h"

#include "linear_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16};

// One block at a time for each of few processors, or more blocks than there is work; the last one cannot hold 64 rows of x at a time.
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {3, 99 << 10}};

constexpr LinearKernel kKernel{"linear_multiply", cuda::linear_multiply, cuda::linear_multiply_workspace_bytes};

void test_problem(const LinearProblem& problem, const Device& device, bool biased, const Skews& skews = kAligned) {
  test_kernel(kKernel, problem, device, biased, skews);
}

// ---------------------------------------------------------------------------------------------------------------- products

constexpr int64_t kRows[] = {1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300};
constexpr int64_t kColumns[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 384, 1000, 1100, 1793};
constexpr int64_t kMs[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130};
constexpr double kDensities[] = {0, 0.05, 0.5, 0.9, 1};

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
    const LinearProblem problem = make_problem(dtype, m, 140, 1500, 0.5, kReals);
    Bytes first;
    for_each_seed(6, [&] {
      const Bytes y = run_linear(kKernel, problem, kDevices[2], true, kAligned);
      if (first.empty()) first = y;
      check(y == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 120; ++i) {
    const int64_t cols = i % 3 == 0 ? 1 + random_below(600) : any_of(kColumns) + 1;
    LinearProblem problem = make_problem(dtype, 1 + random_below(20), 1 + random_below(140), cols, any_of(kDensities), kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem);
    test_problem(problem, any_of(kDevices), i % 2 == 0, {2 * (i % 8), i % 5, 0, 0});
  }
  LinearProblem late = make_problem(dtype, 3, 20, 300, 0.5, kIntegers);  // a value before those of the first row
  late.weight.values.insert(late.weight.values.begin(), 2, 0);
  for (int64_t& offset : late.weight.row_offsets) ++offset;
  test_problem(late, kDevices[0], true);
  LinearProblem empty = make_problem(dtype, 3, 4, 0, 0, kIntegers);  // no column, yet offsets
  empty.weight.row_offsets[2] = 1;
  test_problem(empty, kDevices[0], true);
}

void test_arguments() {
  LinearProblem problem = make_problem(cuda::kBfloat16, 2, 3, 20, 0.5, kIntegers);
  const cuda::LinearParams params{{nullptr, nullptr, nullptr, 3, 20, 0}, nullptr, nullptr, nullptr, 2, cuda::kFloat32};
  place = "linear_multiply";
  check(cuda::linear_multiply(params, kDevices[0], nullptr, nullptr) == cudaErrorInvalidValue, "multiplies float32");
  problem.m = 0;
  check(run_linear(kKernel, problem, kDevices[0], false, kAligned).empty(), "no rows of x");
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
  const LinearProblem problem = make_problem(cuda::kBfloat16, 8, 16, 256, 1, kIntegers);
  const Weight& weight = problem.weight;
  Bytes bits = weight.bitmasks;
  bits.resize(bits.size() - static_cast<size_t>(bitmask_bytes_missing));
  Buffer values_there(values * 2), bitmasks(bits), offsets(weight.rows * 8), x(pack(problem.format(), problem.x)), y(problem.m * 16 * 2);
  std::memcpy(offsets.data(), weight.row_offsets.data(), weight.row_offsets.size() * 8);
  const BitmaskMatrix w{values_there.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(offsets.data()), 16, 256, problem.values()};
  const cuda::LinearParams params{w, x.data(), nullptr, y.data(), problem.m, problem.dtype};
  Buffer workspace(cuda::linear_multiply_workspace_bytes(params, kDevices[0]));
  cuda::linear_multiply(params, kDevices[0], workspace.data(), nullptr);
}

PLANTED_ERROR(multiply_past_values, "heap-buffer-overflow") { run_short(16 * 256 - 1, 0); }
PLANTED_ERROR(multiply_past_bitmasks, "heap-buffer-overflow") { run_short(16 * 256, 1); }

}  // namespace
}  // namespace bitmask::testing
