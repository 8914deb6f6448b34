// Tests block_stream against products in double precision: weights whose lines differ much in length, on devices that make a tile the work
// of one warp, of several, and of several threadblocks.
#include <algorithm>

#include "block_problems.h"

namespace bitmask::testing {
namespace {

constexpr BlockKernel kKernel{"block_stream", cuda::block_stream, cuda::block_stream_workspace_bytes};
constexpr cuda::Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16};
constexpr Numbers kNumbers[] = {kIntegers, kTiny, kSpecials, kReals};

const cuda::Device& any_device() { return kDevices[random_below(std::size(kDevices))]; }

// Columns of a block that has so many pieces of 16 bytes in a row.
int64_t columns_of(cuda::LinearDtype dtype, int64_t pieces) { return pieces * 16 / kFormats[dtype].width; }

// ---------------------------------------------------------------------------------------------------------------- products

void test_products(cuda::LinearDtype dtype) {
  const int width = kFormats[dtype].width;
  constexpr int64_t kBlockRows[] = {1, 4, 16, 31, 32, 33, 64, 70};
  constexpr int64_t kPieces[] = {1, 2, 3, 4, 6, 8, 16};
  for (int i = 0; i < 64; ++i) {
    const int64_t block_rows = kBlockRows[i % 8], block_cols = columns_of(dtype, kPieces[i % 7]);
    const int64_t rows = 1 + random_below(4 * block_rows), cols = 1 + random_below(6 * block_cols);
    const double density = i % 5 == 0 ? 1 : 0.5;
    const BlockSkews skews{16 * (i % 3), i % 4 < 2 ? 0 : width * (i % 8), width * (i % 5)};
    test_blocks(kKernel, make_blocks(dtype, 1 + i % 16, rows, cols, block_rows, block_cols, density, false, kNumbers[i % 4]), any_device(),
                i % 2 == 0, skews);
  }
}

// Keeps of a weight without gaps the first `lengths[line]` blocks of each line.
void keep(BlockProblem& problem, const std::vector<int64_t>& lengths) {
  const size_t size = static_cast<size_t>(problem.block_rows * problem.block_cols);
  const std::vector<uint64_t> all = problem.values;
  const int64_t limit = problem.index.limit;
  problem.index = {{0}, {}, {}, limit};
  problem.values.clear();
  for (size_t line = 0; line < lengths.size(); ++line) {
    const auto first = all.begin() + static_cast<int64_t>(line * static_cast<size_t>(limit) * size);
    problem.values.insert(problem.values.end(), first, first + lengths[line] * static_cast<int64_t>(size));
    for (int64_t i = 0; i < lengths[line]; ++i) problem.index.positions.push_back(i);
    problem.index.starts.push_back(problem.index.blocks());
  }
}

// Lines of very different lengths, some of them empty, and no block at all; blocks that lie in another order.
void test_lines(cuda::LinearDtype dtype) {
  const std::vector<int64_t> all_lengths[] = {{0, 0, 0, 0, 0, 0, 0, 0},
                                              {0, 60, 0, 0, 1, 0, 1, 0},
                                              {60, 0, 0, 0, 0, 0, 0, 0},
                                              {0, 0, 0, 0, 0, 0, 0, 60},
                                              {1, 2, 3, 60, 60, 3, 2, 1}};
  for (const std::vector<int64_t>& lengths : all_lengths) {
    for (const cuda::Device& device : kDevices) {
      const int64_t block_rows = random_below(2) == 0 ? 16 : 40, block_cols = columns_of(dtype, 2), m = 1 + random_below(16);
      BlockProblem problem = make_blocks(dtype, m, 8 * block_rows, 60 * block_cols, block_rows, block_cols, 1, false, kIntegers);
      keep(problem, lengths);
      test_blocks(kKernel, problem, device, true);
      for (int64_t i = problem.index.blocks(); i > 0; --i) problem.index.order.push_back(i - 1);
      test_blocks(kKernel, problem, device, false);
    }
  }
}

// The same bits, whatever order threadblocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  for (const int64_t m : {1, 5, 16}) {
    const BlockProblem problem = make_blocks(dtype, m, 200, 1000, 40, columns_of(dtype, 6), 0.7, false, kReals);
    Bytes first;
    for_each_seed(4, [&] {
      const Bytes y = run_blocks(kKernel, problem, kDevices[2], true);
      if (first.empty()) first = y;
      check(y == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 100; ++i) {
    const int64_t block_rows = i % 2 == 0 ? 16 : 48, block_cols = columns_of(dtype, 1 + i % 4);
    BlockProblem problem =
        make_blocks(dtype, 1 + i % 16, 5 * block_rows - 3, 8 * block_cols - 5, block_rows, block_cols, 0.4, false, kIntegers);
    if (i % 3 == 0) {
      for (int64_t block = 0; block < problem.index.blocks(); ++block) problem.index.order.push_back(block);
    }
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem.index);
    test_blocks(kKernel, problem, any_device(), i % 2 == 0);
  }
}

// What others have found faulty.
void test_poison(cuda::LinearDtype dtype) {
  BlockProblem problem = make_blocks(dtype, 3, 50, 64, 16, 16, 0.5, false, kIntegers);
  const Bytes y = run_blocks(kKernel, problem, kDevices[1], true, {0, 0, 0}, 1);
  for (size_t at = 0; at < y.size(); at += static_cast<size_t>(problem.format().width))
    check(std::isnan(problem.format().decode(problem.format().load(y.data() + at))), "element %zu is not NaN", at);
}

void test_refused(cuda::LinearDtype dtype) {
  place = "block_stream, refused";
  alignas(16) uint8_t values[16];
  const auto launch = [&](int64_t m, int64_t block_cols, bool transposed, int skew, cuda::LinearDtype type) {
    cuda::BlockParams params{};
    params.values = values + skew;
    params.rows = params.cols = params.block_rows = 16;
    params.block_cols = block_cols;
    params.transposed = transposed;
    params.m = m;
    params.dtype = type;
    return cuda::block_stream(params, kDevices[0], nullptr, nullptr);
  };
  const int64_t fitting = columns_of(dtype, 1);
  check(launch(17, fitting, false, 0, dtype) == cudaErrorInvalidValue, "more rows than it takes");
  check(launch(1, fitting + 1, false, 0, dtype) == cudaErrorInvalidValue, "rows of blocks that are not whole pieces");
  check(launch(1, fitting, true, 0, dtype) == cudaErrorInvalidValue, "transposed");
  check(launch(1, fitting, false, 8, dtype) == cudaErrorInvalidValue, "values not aligned");
  check(launch(1, fitting, false, 0, cuda::kFloat64) == cudaErrorInvalidValue, "float64");
  check(launch(0, fitting, false, 0, dtype) == cudaSuccess, "nothing to do");
}

TEST_FAMILY(block_stream) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_products(dtype);
    test_lines(dtype);
    test_determinism(dtype);
    test_faults(dtype);
    test_poison(dtype);
    test_refused(dtype);
  }
}

// A weight that claims more than it has: what the sanitizers see of the kernel's copies.
void run_short(int64_t blocks_missing, int64_t x_missing) {
  const BlockProblem problem = make_blocks(cuda::kBfloat16, 2, 64, 256, 32, 64, 1, false, kIntegers);
  StoredIndex stored(problem.index);
  Buffer values((problem.index.blocks() - blocks_missing) * 32 * 64 * 2), x((2 * 256 - x_missing) * 2), y(2 * 64 * 2);
  cuda::BlockParams params{};
  params.index = stored.index;
  params.values = values.data();
  params.rows = 64;
  params.cols = 256;
  params.block_rows = 32;
  params.block_cols = 64;
  params.x = x.data();
  params.y = y.data();
  params.m = 2;
  params.dtype = problem.dtype;
  run_watched(kKernel, params, kDevices[0]);
}

PLANTED_ERROR(block_stream_past_values, "heap-buffer-overflow") { run_short(1, 0); }
PLANTED_ERROR(block_stream_past_x, "heap-buffer-overflow") { run_short(0, 8); }

}  // namespace
}  // namespace bitmask::testing
