// Tests block_stream against products in double precision: weights whose lines differ much in length, on devices that make a tile the work
// of one warp, of several, and of several threadblocks.
#include <algorithm>

#include "block_problems.h"

namespace bitmask::testing {
namespace {

constexpr BlockKernel kKernel{"block_stream", cuda::block_stream, cuda::block_stream_workspace_bytes};
constexpr cuda::Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16};

const cuda::Device& any_device() { return kDevices[random_below(std::size(kDevices))]; }

// Columns of a block that has so many pieces of 16 bytes in a row.
int64_t columns_of(cuda::LinearDtype dtype, int64_t pieces) { return pieces * 16 / kFormats[dtype].width; }

void test_products(cuda::LinearDtype dtype) {
  const int width = kFormats[dtype].width;
  constexpr int64_t kBlockRows[] = {1, 4, 16, 31, 32, 33, 64, 70};
  constexpr int64_t kPieces[] = {1, 2, 3, 4, 6, 8, 16};
  constexpr Numbers kNumbers[] = {kIntegers, kTiny, kSpecials, kReals};
  for (int i = 0; i < 64; ++i) {
    const int64_t block_rows = kBlockRows[i % 8], block_cols = columns_of(dtype, kPieces[i % 7]);
    const int64_t rows = 1 + random_below(4 * block_rows), cols = 1 + random_below(6 * block_cols);
    const double density = i % 5 == 0 ? 1 : 0.5;
    const BlockSkews skews{16 * (i % 3), i % 4 < 2 ? 0 : width * (i % 8), width * (i % 5)};
    test_blocks(kKernel, make_blocks(dtype, 1 + i % 16, rows, cols, block_rows, block_cols, density, false, kNumbers[i % 4]), any_device(),
                i % 2 == 0, skews);
  }
}

TEST_FAMILY(block_stream) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_products(dtype);
  }
}

}  // namespace
}  // namespace bitmask::testing
