// Tests block_multiply against dense products in double precision, on devices that make tiles of a product large or small, shared by
// several threadblocks or not.
#include "../../csrc/cuda/block_tiles.cuh"
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr BlockKernel kKernel{"block_multiply", cuda::block_multiply, cuda::block_multiply_workspace_bytes};

// On the first two tiles are large for many rows of x; the third and the last share tiles among threadblocks.
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {132, 99 << 10}};

struct Kind {
  cuda::LinearDtype dtype;
  bool transposed;
};
constexpr Kind kKinds[] = {{cuda::kBfloat16, false}, {cuda::kBfloat16, true}, {cuda::kFloat16, false},
                           {cuda::kFloat16, true},   {cuda::kFloat32, false}, {cuda::kFloat32, true}};

struct Shape {
  int64_t rows, cols;
};
constexpr Shape kShapes[] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64}, {64, 32}, {48, 80}, {256, 16}, {16, 256}, {144, 48}};

template <typename T, size_t kCount>
const T& any_of(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

constexpr double kDensities[] = {0, 0.1, 0.5, 0.9, 1};

// `rows` and `cols` are those of y and x.
BlockProblem make_problem(const Kind& kind, int64_t m, int64_t across, int64_t depth, const Shape& block, double density,
                          Numbers numbers) {
  const int64_t rows = kind.transposed ? depth : across, cols = kind.transposed ? across : depth;
  BlockProblem problem = make_blocks(kind.dtype, m, rows, cols, block.rows, block.cols, density, kind.transposed, numbers);
  problem.tf32 = kind.dtype == cuda::kFloat32;
  return problem;
}

// A size of about `blocks` blocks. Of depth, whole pieces of 16 bytes.
int64_t size_of(double blocks, int64_t block, bool depth) {
  const int64_t size = std::max<int64_t>(1, static_cast<int64_t>(blocks * static_cast<double>(block)) + random_below(3) - 1);
  return depth ? (size + 7) / 8 * 8 : size;
}

BlockProblem any_problem(const Kind& kind, int64_t m, const Shape& block, double across, double depth, double density, Numbers numbers) {
  const int64_t block_across = kind.transposed ? block.cols : block.rows, block_depth = kind.transposed ? block.rows : block.cols;
  return make_problem(kind, m, size_of(across, block_across, false), size_of(depth, block_depth, true), block, density, numbers);
}

void test_products(const Kind& kind) {
  for (const Shape& block : kShapes) {
    for (const double density : kDensities) {
      test_blocks(kKernel, any_problem(kind, 1 + random_below(70), block, 2.3, 4.6, density, kIntegers), any_of(kDevices),
                  random_below(2) == 0);
    }
    for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
      test_blocks(kKernel, any_problem(kind, 1 + random_below(70), block, 1.7, 5, 0.7, numbers), any_of(kDevices), random_below(2) == 0);
    }
  }
}

TEST_FAMILY(block_multiply) {
  for (const Kind& kind : kKinds) test_products(kind);
}

}  // namespace
}  // namespace bitmask::testing
