// Tests block_warpgroup and block_sample_warpgroup against products in double precision.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16};
constexpr BlockKernel kKernel{"block_warpgroup", cuda::block_warpgroup, cuda::block_warpgroup_workspace_bytes};

// One multiprocessor has all tiles, and wide ones; two and three deal them there and back again; 132 have one each, and narrow ones.
constexpr Device kDevices[] = {{1, 227 << 10, true}, {2, 227 << 10, true}, {3, 227 << 10, true}, {132, 227 << 10, true}};

struct Sides {
  int64_t rows, cols;
};
constexpr Sides kSides[] = {{64, 64}, {128, 128}, {64, 128}, {128, 64}, {192, 64}, {64, 192}};
constexpr int64_t kMs[] = {64, 65, 128, 200, 257};
constexpr double kDensities[] = {0, 0.3, 0.7, 1};

// `across` lines of blocks, the last of which reaches past the edge by `past`; `deep` blocks along the sum.
BlockProblem make_product(cuda::LinearDtype dtype, int64_t m, const Sides& sides, bool transposed, int64_t across, int64_t deep, int64_t past,
                          double density, Numbers numbers) {
  const int64_t rows = (transposed ? deep : across) * sides.rows, cols = (transposed ? across : deep) * sides.cols;
  return make_blocks(dtype, m, transposed ? rows : rows - past, transposed ? cols - past : cols, sides.rows, sides.cols, density, transposed,
                     numbers);
}

void test_products(cuda::LinearDtype dtype, bool transposed) {
  int turn = 0;
  for (const Sides& sides : kSides) {
    for (const int64_t m : kMs) {
      const int64_t past = 8 * random_below(8);
      const Numbers numbers = turn % 4 == 1 ? kReals : turn % 4 == 3 ? kSpecials : kIntegers;
      test_blocks(kKernel, make_product(dtype, m, sides, transposed, 2, 3, past, kDensities[turn % 4], numbers), kDevices[turn % 3],
                  turn % 2 == 0);
      ++turn;
    }
  }
}

TEST_FAMILY(block_warpgroup) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (const bool transposed : {false, true}) test_products(dtype, transposed);
  }
}

}  // namespace
}  // namespace bitmask::testing
