// Tests block_warpgroup and block_sample_warpgroup against products in double precision.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16};
constexpr BlockKernel kKernel{"block_warpgroup", cuda::block_warpgroup, cuda::block_warpgroup_workspace_bytes};
constexpr SampleKernel kSample{"block_sample_warpgroup", cuda::block_sample_warpgroup, cuda::block_sample_warpgroup_workspace_bytes};

// One multiprocessor has all tiles, and wide ones; two and three deal them there and back again; 132 have one each, and narrow ones.
constexpr Device kDevices[] = {{1, 227 << 10, true}, {2, 227 << 10, true}, {3, 227 << 10, true}, {132, 227 << 10, true}};

struct Sides {
  int64_t rows, cols;
};
constexpr Sides kSides[] = {{64, 64}, {128, 128}, {64, 128}, {128, 64}, {192, 64}, {64, 192}};
constexpr int64_t kMs[] = {64, 65, 128, 200, 257};
constexpr double kDensities[] = {0, 0.3, 0.7, 1};

// `across` lines of blocks, the last of which reaches past the edge by `past`; `deep` blocks along the sum.
BlockProblem make_product(cuda::LinearDtype dtype, int64_t m, const Sides& sides, bool transposed, int64_t across, int64_t deep,
                          int64_t past, double density, Numbers numbers) {
  const int64_t rows = (transposed ? deep : across) * sides.rows, cols = (transposed ? across : deep) * sides.cols;
  return make_blocks(dtype, m, transposed ? rows : rows - past, transposed ? cols - past : cols, sides.rows, sides.cols, density,
                     transposed, numbers);
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

// More lines than tiles that run at a time, of different lengths; blocks of 128 with more than 32 in a line, which lanes prove in turns.
void test_shapes(cuda::LinearDtype dtype) {
  for (const Device& device : kDevices) {
    for (const bool transposed : {false, true}) {
      test_blocks(kKernel, make_product(dtype, 66, {64, 64}, transposed, 9, 4, 24, 0.4, kIntegers), device, true);
    }
  }
  test_blocks(kKernel, make_product(dtype, 70, {64, 64}, false, 1, 40, 0, 0.9, kIntegers), kDevices[0], false);
  test_blocks(kKernel, make_product(dtype, 300, {128, 64}, true, 1, 40, 8, 0.9, kIntegers), kDevices[3], false);
  test_blocks(kKernel, make_product(dtype, 4300, {64, 64}, false, 2, 1, 0, 1, kIntegers), kDevices[2], false);  // two panels of x
}

// The same bits, whatever order blocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  const BlockProblem problem = make_product(dtype, 200, {128, 128}, false, 3, 4, 40, 0.5, kReals);
  Bytes first;
  for_each_seed(6, [&] {
    const Bytes y = run_blocks(kKernel, problem, kDevices[2], true);
    if (first.empty()) first = y;
    check(y == first, "other bits than before");
  });
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 60; ++i) {
    BlockProblem problem = make_product(dtype, 64 + random_below(80), {64, 64}, i % 2 == 0, 4, 5, 8 * random_below(8), 0.6, kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem.index);
    test_blocks(kKernel, problem, kDevices[i % 4], i % 3 == 0);
  }
  const BlockProblem problem = make_product(dtype, 66, {64, 128}, false, 2, 2, 8, 1, kIntegers);
  set_place(kKernel.name, problem, kDevices[1]);
  const Bytes y = run_blocks(kKernel, problem, kDevices[1], true, {0, 0, 0}, 1);
  for (size_t i = 0; i < y.size(); i += 2) check(std::isnan(problem.format().decode(problem.format().load(&y[i]))), "no NaN for a fault");
}

// ---------------------------------------------------------------------------------------------------------------- gradient of values

void test_samples(cuda::LinearDtype dtype) {
  int turn = 0;
  for (const Sides& sides : kSides) {
    for (const int64_t m : {1, 64, 65, 200}) {
      const int64_t rows = 3 * sides.rows - 8 * random_below(8), cols = 6 * sides.cols - 8 * random_below(8);
      const Numbers numbers = turn % 4 == 1 ? kReals : turn % 4 == 3 ? kSpecials : kIntegers;
      test_sample(kSample, make_sample(dtype, m, rows, cols, sides.rows, sides.cols, kDensities[turn % 4], numbers), kDevices[turn % 4]);
      ++turn;
    }
  }
  test_sample(kSample, make_sample(dtype, 70, 64, 64 * 40, 64, 64, 0.8, kIntegers), kDevices[1]);  // lines of several tiles
}

void test_sample_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 20; ++i) {
    SampleProblem problem = make_sample(dtype, 65, 256, 192, 64, 64, 0.7, kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem.weight.index);
    set_place(kSample.name, problem.weight, kDevices[i % 4]);
    const Bytes values = run_sample(kSample, problem, kDevices[i % 4], {0, 0, 0}, i % 2 == 0 ? cuda::kNoFault : cuda::Fault{0});
    const Format& format = problem.weight.format();
    for (size_t at = 0; i % 2 != 0 && at < values.size(); at += 2) {
      check(std::isnan(format.decode(format.load(&values[at]))), "no NaN for a fault");
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- what is not taken

void test_arguments() {
  place = "block_warpgroup";
  cuda::BlockParams params{};
  params.rows = params.cols = params.block_rows = params.block_cols = 64;
  params.m = 64;
  params.dtype = cuda::kBfloat16;
  const auto refuses = [](const cuda::BlockParams& p, const Device& device) {
    return cuda::block_warpgroup(p, device, nullptr, nullptr) == cudaErrorInvalidValue;
  };
  check(!refuses(params, kDevices[0]), "refuses what it takes");
  check(refuses(params, {1, 227 << 10, false}), "takes another GPU");
  check(refuses(params, {1, 163 << 10, true}), "takes less shared memory than it needs");
  const auto changed = [&](const auto& change) {
    cuda::BlockParams p = params;
    change(p);
    return refuses(p, kDevices[0]);
  };
  const auto odd = reinterpret_cast<void*>(8);
  check(changed([](auto& p) { p.dtype = cuda::kFloat32; }), "takes float32");
  check(changed([](auto& p) { p.block_rows = 32; }), "takes blocks of 32 rows");
  check(changed([](auto& p) { p.cols = 100; }), "takes a depth that is no multiple of the blocks'");
  check(changed([](auto& p) { p.rows = 60; }), "takes rows of y that are not aligned");
  check(changed([=](auto& p) { p.x = odd; }), "takes an x that is not aligned");
  check(changed([=](auto& p) { p.y = odd; }), "takes a y that is not aligned");
  check(changed([=](auto& p) { p.values = odd; }), "takes values that are not aligned");
}

void test_sample_arguments() {
  place = "block_sample_warpgroup";
  cuda::BlockSampleParams params{};
  params.m = params.rows = params.cols = params.block_rows = params.block_cols = 64;
  params.dtype = cuda::kBfloat16;
  const auto refused = [&](const auto& change) {
    cuda::BlockSampleParams p = params;
    change(p);
    return !cuda::block_sample_warpgroup_takes(p, kDevices[0]);
  };
  check(!refused([](auto&) {}), "refuses what it takes");
  check(refused([](auto& p) { p.m = 0; }), "takes no rows of x");
  check(refused([](auto& p) { p.rows = 0; }), "takes a weight without rows");
  check(refused([](auto& p) { p.cols = 0; }), "takes a weight without columns");
  check(refused([](auto& p) { p.rows = 60; }), "takes rows of g that are not aligned");
  check(refused([](auto& p) { p.block_cols = 32; }), "takes blocks of 32 columns");
}

TEST_FAMILY(block_warpgroup) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (const bool transposed : {false, true}) test_products(dtype, transposed);
    test_shapes(dtype);
    test_determinism(dtype);
    test_faults(dtype);
  }
  test_arguments();
}

TEST_FAMILY(block_sample_warpgroup) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_samples(dtype);
    test_sample_faults(dtype);
  }
  test_sample_arguments();
}

// A weight that claims a block more than it has: what the sanitizers see of the copies of boxes.
PLANTED_ERROR(warpgroup_past_values, "heap-buffer-overflow") {
  BlockProblem problem = make_product(cuda::kBfloat16, 64, {64, 64}, false, 2, 2, 0, 1, kIntegers);
  problem.values.resize(3 * 64 * 64);
  run_blocks(kKernel, problem, kDevices[0], false);
}

}  // namespace
}  // namespace bitmask::testing
