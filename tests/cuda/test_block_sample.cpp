// Tests block_sample against products in double precision.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr SampleKernel kKernel{"block_sample", cuda::block_sample, cuda::block_sample_workspace_bytes};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16, cuda::kFloat32};

// Whole tiles for each of few processors, or more threadblocks than there are tiles; what fits in some is one threadblock, not two.
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {3, 227 << 10}};

struct Shape {
  int64_t block_rows, block_cols;
};
constexpr Shape kShapes[] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64}, {64, 32}, {48, 80}, {256, 128}};

SampleProblem make(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, const Shape& shape, double density, Numbers numbers) {
  SampleProblem problem = make_sample(dtype, m, rows, cols, shape.block_rows, shape.block_cols, density, numbers);
  problem.weight.tf32 = dtype == cuda::kFloat32;
  return problem;
}

TEST_FAMILY(block_sample) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (const Shape& shape : kShapes) {
      for (const int64_t m : {0, 1, 5, 16, 33, 70}) {
        test_sample(kKernel, make(dtype, m, 8 * (1 + random_below(40)), 8 * (1 + random_below(40)), shape, 0.5, m == 5 ? kReals : kIntegers),
                    kDevices[random_below(4)]);
      }
      test_sample(kKernel, make(dtype, 700, 64, 128, shape, 0.5, kIntegers), kDevices[2]);
    }
  }
}

}  // namespace
}  // namespace bitmask::testing
