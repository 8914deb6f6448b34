// Tests two_four_stream against products in double precision of what is stored: whole weights and blocks, aligned and not, with faulty
// metadata and indices, on devices that make a tile the work of one warp, of several, and of several threadblocks.
#include "two_four_problems.h"

namespace bitmask::testing {
namespace {

constexpr TwoFourKernel kKernel{"two_four_stream", cuda::two_four_stream, cuda::two_four_stream_workspace_bytes};
constexpr cuda::Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16};
constexpr Numbers kNumbers[] = {kIntegers, kTiny, kSpecials, kReals};

const cuda::Device& any_device() { return kDevices[random_below(std::size(kDevices))]; }

// Parts of the problem that begin anywhere that their elements may, every other time.
TwoFourSkews any_skews(cuda::LinearDtype dtype) {
  const int width = kFormats[dtype].width;
  if (random_below(2) == 0) return {0, 0, 0, 0};
  const auto skew = [] { return static_cast<int>(random_below(9)); };
  return {width * skew(), skew(), width * skew(), width * skew()};
}

// ---------------------------------------------------------------------------------------------------------------- products

void test_whole(cuda::LinearDtype dtype) {
  constexpr int64_t kColumns[] = {4, 8, 12, 16, 20, 60, 64, 68, 100, 128, 192, 256, 516};
  for (int i = 0; i < 52; ++i) {
    test_two_four(kKernel, make_two_four(dtype, 1 + i % 16, 1 + random_below(70), kColumns[i % 13], kNumbers[i % 4]), any_device(),
                  i % 2 == 0, any_skews(dtype));
  }
  test_two_four(kKernel, make_two_four(dtype, 3, 5, 0, kIntegers), kDevices[0], true);
  test_two_four(kKernel, make_two_four(dtype, 0, 5, 8, kIntegers), kDevices[0], true);
  test_two_four(kKernel, make_two_four(dtype, 3, 0, 8, kIntegers), kDevices[0], true);
}

void test_blocks_of(cuda::LinearDtype dtype) {
  constexpr int64_t kBlockRows[] = {4, 16, 31, 32, 33, 64, 70};
  constexpr int64_t kBlockCols[] = {4, 8, 12, 16, 32, 36, 64, 128};
  for (int i = 0; i < 56; ++i) {
    const int64_t block_rows = kBlockRows[i % 7], block_cols = kBlockCols[i % 8];
    const int64_t rows = 1 + random_below(4 * block_rows), cols = 1 + random_below(6 * block_cols);
    const double density = i % 5 == 0 ? 1 : i % 5 == 1 ? 0.1 : 0.5;
    test_two_four(kKernel, make_two_four_blocks(dtype, 1 + i % 16, rows, cols, block_rows, block_cols, density, kNumbers[i % 4]),
                  any_device(), i % 2 == 0, any_skews(dtype));
  }
}

// Infinity or NaN in a column of x reaches exactly the rows that store it.
void test_specials_in_x(cuda::LinearDtype dtype) {
  for (const double special : {static_cast<double>(INFINITY), -static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    for (int i = 0; i < 6; ++i) {
      TwoFourProblem problem = i % 2 == 0 ? make_two_four(dtype, 9, 40, 256, kIntegers)
                                          : make_two_four_blocks(dtype, 9, 40, 256, 16, i == 1 ? 32 : 20, 0.6, kIntegers);
      problem.x[static_cast<size_t>(random_below(9 * 256))] = problem.format().encode(special);
      test_two_four(kKernel, problem, any_device(), true);
    }
  }
}

// The same bits, whatever order threadblocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  for (const int64_t m : {1, 5, 16}) {
    TwoFourProblem problem = make_two_four(dtype, m, 70, 1024, kReals);
    if (m == 16) problem.x[5] = problem.format().encode(INFINITY);
    Bytes first;
    for_each_seed(4, [&] {
      const Bytes y = run_two_four(kKernel, problem, kDevices[2], true);
      if (first.empty()) first = y;
      check(y == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 100; ++i) {
    TwoFourProblem problem = i % 2 == 0 ? make_two_four(dtype, 1 + i % 16, 1 + random_below(40), 4 * (1 + random_below(40)), kIntegers)
                                        : make_two_four_blocks(dtype, 1 + i % 16, 75, 150, 16, i % 4 == 1 ? 32 : 20, 0.4, kIntegers);
    for (int64_t changes = random_below(4); changes > 0; --changes) mutate_metadata(problem);
    if (problem.index && i % 8 > 4) {
      for (int64_t block = 0; block < problem.blocks(); ++block) problem.index->order.push_back(block);
    }
    for (int64_t changes = random_below(3); problem.index && changes > 0; --changes) mutate(*problem.index);
    test_two_four(kKernel, problem, any_device(), i % 3 == 0, any_skews(dtype));
  }
}

void test_refused() {
  place = "two_four_stream, refused";
  cuda::TwoFourParams params{};
  params.rows = params.cols = 16;
  params.m = 17;
  check(cuda::two_four_stream(params, kDevices[0], nullptr, nullptr) == cudaErrorInvalidValue, "more rows than it takes");
  params.m = 1;
  params.dtype = cuda::kFloat64;
  check(cuda::two_four_stream(params, kDevices[0], nullptr, nullptr) == cudaErrorInvalidValue, "float64");
}

TEST_FAMILY(two_four_stream) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_whole(dtype);
    test_blocks_of(dtype);
    test_specials_in_x(dtype);
    test_determinism(dtype);
    test_faults(dtype);
  }
  test_refused();
}

// A weight that claims more than it has: what the sanitizers see of the kernel's reads.
void run_short(size_t values_missing, size_t metadata_missing) {
  TwoFourProblem problem = make_two_four(cuda::kBfloat16, 2, 40, 128, kIntegers);
  problem.values.resize(problem.values.size() - values_missing);
  problem.metadata.resize(problem.metadata.size() - metadata_missing);
  run_two_four(kKernel, problem, kDevices[0], false);
}

PLANTED_ERROR(two_four_stream_past_values, "heap-buffer-overflow") { run_short(8, 0); }
PLANTED_ERROR(two_four_stream_past_metadata, "heap-buffer-overflow") { run_short(0, 2); }

}  // namespace
}  // namespace bitmask::testing
