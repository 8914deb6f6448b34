// Tests block_sample against products in double precision. Devices of different sizes make a tile one threadblock's work or that of many.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;

constexpr SampleKernel kKernel{"block_sample", cuda::block_sample, cuda::block_sample_workspace_bytes};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16, cuda::kFloat32};

// Whole tiles for each of few processors, or more threadblocks than there are tiles; what fits in some is one threadblock, not two.
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {3, 227 << 10}};
constexpr Device kLarge = kDevices[2];

struct Shape {
  int64_t block_rows, block_cols;
};
constexpr Shape kShapes[] = {{16, 16}, {32, 32}, {64, 64}, {128, 128}, {16, 64}, {128, 32}, {48, 80}, {256, 128}};

template <typename T, size_t kCount>
T any_of(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

// Whatever is summed is of tensor cores: of float32 that is tf32.
SampleProblem make(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, const Shape& shape, double density, Numbers numbers) {
  SampleProblem problem = make_sample(dtype, m, rows, cols, shape.block_rows, shape.block_cols, density, numbers);
  problem.weight.tf32 = dtype == cuda::kFloat32;
  return problem;
}

// A multiple of 8 that leaves the last block half empty as often as not.
int64_t size_of(int64_t block) { return 8 * (1 + random_below(block / 8 + 16)); }

// ---------------------------------------------------------------------------------------------------------------- products

void test_products(cuda::LinearDtype dtype) {
  const int64_t ms[] = {0, 1, 15, 16, 17, 31, 32, 33, 48, 64, 95, 96, 97, 130};  // around the stages in shared memory
  for (const Shape& shape : kShapes) {
    for (const Numbers numbers : {kIntegers, kTiny, kSpecials, kReals}) {
      const int64_t rows = size_of(shape.block_rows), cols = size_of(shape.block_cols);
      test_sample(kKernel, make(dtype, 1 + random_below(70), rows, cols, shape, 0.6, numbers), any_of(kDevices));
    }
  }
  for (const int64_t m : ms) {
    const Shape shape = m % 3 == 0 ? Shape{16, 48} : m % 3 == 1 ? Shape{32, 32} : Shape{64, 64};
    test_sample(kKernel, make(dtype, m, 80, 136, shape, 0.5, kIntegers), any_of(kDevices));
  }
  for (const double density : {0.0, 0.1, 0.9, 1.0}) {
    test_sample(kKernel, make(dtype, 20, 128, 320, {16, 16}, density, kIntegers), any_of(kDevices));
    test_sample(kKernel, make(dtype, 20, 160, 320, {32, 32}, density, kSpecials), any_of(kDevices));
  }
}

// Few tiles of many stages: threadblocks share them.
void test_shared_tiles(cuda::LinearDtype dtype) {
  for (const Shape& shape : kShapes) {
    const Numbers numbers = shape.block_rows == 32 ? kReals : kIntegers;
    const SampleProblem problem = make(dtype, 680 + random_below(40), shape.block_rows + 16, shape.block_cols + 8, shape, 1, numbers);
    test_sample(kKernel, problem, kLarge);
  }
}

// The same bits, whatever order threadblocks and threads run in.
void test_determinism(cuda::LinearDtype dtype) {
  for (const Shape& shape : {Shape{16, 16}, Shape{64, 64}}) {
    const SampleProblem problem = make(dtype, 600, 64, 64, shape, 0.8, kReals);
    Bytes first;
    for_each_seed(4, [&] {
      const Bytes values = run_sample(kKernel, problem, kLarge);
      if (first.empty()) first = values;
      check(values == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

// What an index holds that is known to be faulty, or is and nobody has noticed, decides nothing but which numbers come out.
void test_faults(cuda::LinearDtype dtype) {
  for (int i = 0; i < 24; ++i) {
    const Shape shape = kShapes[i % 3];
    SampleProblem problem = make(dtype, i % 6 == 5 ? 500 : 1 + random_below(50), 96, 128, shape, 0.7, kIntegers);
    for (int64_t changes = 1 + random_below(3); changes > 0; --changes) mutate(problem.weight.index);
    for (int64_t& position : problem.weight.index.positions)
      position = random_below(4) == 0 ? INT64_MAX / (1 + random_below(300)) : position;
    set_place(kKernel.name, problem.weight, any_of(kDevices));
    check_all_nan(problem.weight.format(), run_sample(kKernel, problem, any_of(kDevices), {0, 0, 0}, random_below(3)));
    run_sample(kKernel, problem, any_of(kDevices));
  }
}

void test_arguments() {
  alignas(16) static uint8_t memory[64];
  const auto refuses = [&](const char* what, const auto& change) {
    cuda::BlockSampleParams params{};
    params.index.blocks = params.index.lines = params.index.limit = 1;
    params.rows = params.cols = params.block_rows = params.block_cols = 16;
    params.values = memory;
    params.g = params.x = memory;
    params.dtype = cuda::kFloat16;
    change(params);
    place = std::string("block_sample of ") + what;
    check(cuda::block_sample(params, kLarge, nullptr, nullptr) == cudaErrorInvalidValue, "is not refused");
    check(cuda::block_sample_workspace_bytes(params, kLarge) == 0, "asks for memory");
  };
  using Params = cuda::BlockSampleParams;
  refuses("float32 in full precision", [](Params& p) { p.dtype = cuda::kFloat32; });
  refuses("float64", [](Params& p) { p.dtype = cuda::kFloat64; });
  refuses("blocks of 24 rows", [](Params& p) { p.block_rows = 24; });
  refuses("blocks of 8 columns", [](Params& p) { p.block_cols = 8; });
  refuses("rows of g that are not aligned", [](Params& p) { p.rows = 20; });
  refuses("rows of x that are not aligned", [](Params& p) { p.cols = 12; });
  refuses("g that is not aligned", [](Params& p) { p.g = memory + 8; });
  refuses("x that is not aligned", [](Params& p) { p.x = memory + 2; });
  refuses("values that are not aligned", [](Params& p) { p.values = memory + 4; });
}

TEST_FAMILY(block_sample) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    test_products(dtype);
    test_shared_tiles(dtype);
    test_determinism(dtype);
    test_faults(dtype);
  }
  test_arguments();
}

// Less than is claimed: what the sanitizers see of copies.
PLANTED_ERROR(sample_past_x, "heap-buffer-overflow") {
  SampleProblem problem = make(cuda::kBfloat16, 40, 64, 64, {32, 32}, 1, kIntegers);
  problem.x.pop_back();
  run_sample(kKernel, problem, kLarge);
}

PLANTED_ERROR(sample_past_g, "heap-buffer-overflow") {
  SampleProblem problem = make(cuda::kFloat32, 40, 64, 64, {64, 64}, 1, kIntegers);
  problem.g.pop_back();
  run_sample(kKernel, problem, kLarge);
}

}  // namespace
}  // namespace bitmask::testing
