// Tests the kernels for CUDA cores against products in double precision.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

constexpr BlockKernel kCores{"block_cores", cuda::block_cores, cuda::block_cores_workspace_bytes};
constexpr SampleKernel kSample{"block_sample_cores", cuda::block_sample_cores, cuda::block_sample_cores_workspace_bytes};
constexpr cuda::Device kDevices[] = {{1, 99 << 10}, {132, 227 << 10}};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16, cuda::kFloat64};

TEST_FAMILY(block_cores) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (int i = 0; i < 40; ++i) {
      const int64_t rows = 1 + random_below(40), cols = 1 + random_below(40);
      const int64_t block_rows = 1 + random_below(20), block_cols = 1 + random_below(20), m = 1 + random_below(9);
      BlockProblem problem = make_blocks(dtype, m, rows, cols, block_rows, block_cols, 0.5, i % 2 == 0, i % 3 == 0 ? kReals : kIntegers);
      test_blocks(kCores, problem, kDevices[i % 2], i % 4 < 2);
      for (int changes = 0; changes < 2; ++changes) mutate(problem.index);
      test_blocks(kCores, problem, kDevices[i % 2], i % 4 < 2);
      test_sample(kSample, make_sample(dtype, m, rows, cols, block_rows, block_cols, 0.5, i % 3 == 0 ? kReals : kIntegers),
                  kDevices[i % 2]);
    }
  }
}

}  // namespace
}  // namespace bitmask::testing
