// Tests the kernels for CUDA cores against products in double precision: every dtype, blocks of any shape, memory of any alignment.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr BlockKernel kCores{"block_cores", cuda::block_cores, cuda::block_cores_workspace_bytes};
constexpr SampleKernel kSample{"block_sample_cores", cuda::block_sample_cores, cuda::block_sample_cores_workspace_bytes};
constexpr Device kDevices[] = {{1, 99 << 10}, {132, 227 << 10}};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16, cuda::kFloat64};

struct Shape {
  int64_t block_rows, block_cols;
};

template <typename T, size_t kCount>
T any_of(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

// ---------------------------------------------------------------------------------------------------------------- any shape

constexpr Shape kShapes[] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64}, {48, 80}, {1, 1}, {3, 5}, {130, 20}, {8, 100}, {70, 66}};
constexpr int64_t kMs[] = {1, 3, 4, 5, 15, 16, 17, 40, 64, 65, 129, 140};

// Some lines, the last one over the edge of W as often as not.
int64_t size_of(int64_t block) { return 1 + random_below(2 * block + 40); }

void test_products(cuda::LinearDtype dtype) {
  for (const Shape& shape : kShapes) {
    for (const bool transposed : {false, true}) {
      for (const Numbers numbers : {kIntegers, kTiny, kSpecials, kReals}) {
        const BlockProblem problem = make_blocks(dtype, any_of(kMs), size_of(shape.block_rows), size_of(shape.block_cols), shape.block_rows,
                                                 shape.block_cols, 0.6, transposed, numbers);
        test_blocks(kCores, problem, any_of(kDevices), random_below(2) == 0);
      }
    }
  }
  for (const int64_t m : kMs) {
    for (const double density : {0.0, 0.3, 1.0}) {
      test_blocks(kCores, make_blocks(dtype, m, 72, 104, 16, 24, density, m % 2 == 0, kIntegers), kDevices[1], true);
    }
  }
}

void test_samples(cuda::LinearDtype dtype) {
  for (const Shape& shape : kShapes) {
    for (const Numbers numbers : {kIntegers, kTiny, kSpecials, kReals}) {
      const int64_t m = numbers == kReals ? 60 : random_below(40);
      test_sample(
          kSample,
          make_sample(dtype, m, size_of(shape.block_rows), size_of(shape.block_cols), shape.block_rows, shape.block_cols, 0.6, numbers),
          any_of(kDevices));
    }
  }
  for (const int64_t m : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33}) {
    test_sample(kSample, make_sample(dtype, m, 40, 70, 16, 32, 0.5, kIntegers), kDevices[0]);
  }
}

// Operands that begin anywhere that their elements may, so that 16 bytes at a time are aligned for some, and not for others.
void test_alignment(cuda::LinearDtype dtype) {
  const int width = kFormats[dtype].width;
  for (int i = 0; i < 8; ++i) {
    const BlockSkews skews{i * width % 16, 2 * i * width % 16, i % 2 * width};
    const int64_t cols = i % 2 == 0 ? 64 : 63 + i, m = i < 6 ? 70 : 12;
    for (const bool transposed : {false, true}) {
      test_blocks(kCores, make_blocks(dtype, m, 48, cols, 16, 32, 0.7, transposed, kIntegers), any_of(kDevices), i % 3 == 0, skews);
    }
    test_sample(kSample, make_sample(dtype, m, 48, cols, 16, 32, 0.7, kIntegers), any_of(kDevices), skews);
  }
}

// The same bits, whatever order blocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  for (const int64_t m : {3, 20, 70}) {
    const BlockProblem problem = make_blocks(dtype, m, 70, 90, 16, 16, 0.6, m == 20, kReals);
    const SampleProblem sample = make_sample(dtype, m, 70, 90, 16, 16, 0.6, kReals);
    Bytes first;
    for_each_seed(3, [&] {
      Bytes bytes = run_blocks(kCores, problem, any_of(kDevices), true);
      const Bytes values = run_sample(kSample, sample, any_of(kDevices));
      bytes.insert(bytes.end(), values.begin(), values.end());
      if (first.empty()) first = bytes;
      check(bytes == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(cuda::LinearDtype dtype) {
  const Format& format = kFormats[dtype];
  for (int i = 0; i < 60; ++i) {
    const Shape shape{1 + random_below(40), 1 + random_below(40)};
    const int64_t rows = 1 + random_below(90), cols = 1 + random_below(90), m = i % 3 == 0 ? 70 : 1 + random_below(30);
    BlockProblem problem = make_blocks(dtype, m, rows, cols, shape.block_rows, shape.block_cols, 0.6, i % 2 == 0, kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem.index);
    test_blocks(kCores, problem, any_of(kDevices), i % 4 < 2);
    check_all_nan(format, run_blocks(kCores, problem, any_of(kDevices), false, {0, 0, 0}, random_below(3)));

    SampleProblem sample = make_sample(dtype, m, rows, cols, shape.block_rows, shape.block_cols, 0.6, kIntegers);
    mutate(sample.weight.index);
    set_place(kSample.name, sample.weight, kDevices[0]);
    check_all_nan(format, run_sample(kSample, sample, any_of(kDevices), {0, 0, 0}, random_below(3)));
    run_sample(kSample, sample, any_of(kDevices));  // a fault that nobody has noticed: nothing is read or written outside
  }
}

void test_nothing(cuda::LinearDtype dtype) {
  test_blocks(kCores, make_blocks(dtype, 0, 20, 30, 8, 8, 0.5, false, kIntegers), kDevices[0], false);
  test_blocks(kCores, make_blocks(dtype, 70, 20, 0, 8, 8, 0.5, false, kIntegers), kDevices[0], true);
  test_blocks(kCores, make_blocks(dtype, 3, 0, 30, 8, 8, 0.5, false, kIntegers), kDevices[0], true);
  test_sample(kSample, make_sample(dtype, 9, 20, 30, 8, 8, 0, kIntegers), kDevices[0]);
}

TEST_FAMILY(block_cores) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_products(dtype);
    test_samples(dtype);
    test_alignment(dtype);
    test_determinism(dtype);
    test_faults(dtype);
    test_nothing(dtype);
  }
}

// A weight that claims one element more than it has: what the sanitizers see of loads.
PLANTED_ERROR(cores_past_values, "heap-buffer-overflow") {
  BlockProblem problem = make_blocks(cuda::kFloat32, 70, 32, 32, 16, 16, 1, false, kIntegers);
  problem.values.pop_back();
  run_blocks(kCores, problem, kDevices[1], false);
}

PLANTED_ERROR(sample_cores_past_x, "heap-buffer-overflow") {
  SampleProblem problem = make_sample(cuda::kFloat32, 20, 32, 32, 16, 16, 1, kIntegers);
  problem.x.pop_back();
  run_sample(kSample, problem, kDevices[1]);
}

}  // namespace
}  // namespace bitmask::testing
