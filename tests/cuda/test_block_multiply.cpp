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
BlockProblem make_problem(const Kind& kind, int64_t m, int64_t across, int64_t depth, const Shape& block, double density, Numbers numbers) {
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

// ---------------------------------------------------------------------------------------------------------------- products

void test_products(const Kind& kind) {
  for (const Shape& block : kShapes) {
    for (const double density : kDensities) {
      test_blocks(kKernel, any_problem(kind, 1 + random_below(70), block, 2.3, 4.6, density, kIntegers), any_of(kDevices),
                  random_below(2) == 0);
    }
    for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
      if (numbers == kTiny && kind.dtype == cuda::kFloat32) continue;  // too small for tf32
      test_blocks(kKernel, any_problem(kind, 1 + random_below(70), block, 1.7, 5, 0.7, numbers), any_of(kDevices), random_below(2) == 0);
    }
  }
}

// Where tiles of x end, and where the choice of tiles changes.
void test_rows(const Kind& kind) {
  for (const int64_t m : {1, 16, 17, 63, 64, 65, 127, 128, 129, 192, 193, 255, 256, 257, 300}) {
    const Shape& block = kShapes[random_below(5)];
    test_blocks(kKernel, any_problem(kind, m, block, 1.6, 2.5, 0.6, kIntegers), kDevices[random_below(2)], true);
  }
  for (const Shape& block : kShapes) {  // tiles of many rows, one past the edge
    test_blocks(kKernel, any_problem(kind, 260, block, 1.3, 3, 0.6, kSpecials), kDevices[random_below(2)], random_below(2) == 0);
  }
}

// Lines of very different lengths, enough of them to be sorted; long lines, which threadblocks share; weights with nothing in them.
void test_lines(const Kind& kind) {
  test_blocks(kKernel, any_problem(kind, 20, {16, 16}, 40, 6, 0.2, kIntegers), kDevices[0], true);
  test_blocks(kKernel, any_problem(kind, 70, {16, 32}, 30, 5, 0.3, kIntegers), kDevices[1], false);
  for (const int64_t m : {17, 64, 100}) {
    test_blocks(kKernel, any_problem(kind, m, {32, 32}, 1.5, 60, 0.7, kIntegers), kDevices[2], true);
    test_blocks(kKernel, any_problem(kind, m, {64, 64}, 1.5, 25, 0.9, kReals), kDevices[3], false);
  }
  for (const Shape& size : {Shape{0, 64}, Shape{64, 0}, Shape{0, 0}}) {
    test_blocks(kKernel, make_problem(kind, 5, size.rows, size.cols, {16, 16}, 1, kIntegers), kDevices[0], true);
  }
  test_blocks(kKernel, make_problem(kind, 0, 64, 64, {16, 16}, 1, kIntegers), kDevices[0], true);
}

// Tensors that begin at any 16 bytes.
void test_alignment(const Kind& kind) {
  for (int skew = 0; skew < 8; ++skew) {
    const BlockSkews skews{16 * (skew % 4), 16 * (skew % 3), 16 * (skew % 5)};
    test_blocks(kKernel, any_problem(kind, 20, {32, 16}, 2.5, 6, 0.6, kIntegers), kDevices[skew % 4], skew % 2 == 0, skews);
  }
}

// The same bits, whatever order blocks and threads run in.
void test_determinism(const Kind& kind) {
  const BlockProblem problem = any_problem(kind, 70, {32, 32}, 2.2, 30, 0.7, kReals);
  for (const Device& device : {kDevices[0], kDevices[2]}) {
    Bytes first;
    set_place(kKernel.name, problem, device);
    for_each_seed(4, [&] {
      const Bytes y = run_blocks(kKernel, problem, device, true);
      if (first.empty()) first = y;
      check(y == first, "other bits than before");
    });
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

void test_faults(const Kind& kind) {
  for (int i = 0; i < 60; ++i) {
    const Shape& block = kShapes[random_below(i % 2 == 0 ? 2 : 7)];
    BlockProblem problem = any_problem(kind, 1 + random_below(30), block, 1.5 + i % 4, 3 + i % 9, any_of(kDensities), kIntegers);
    for (int64_t changes = 1 + random_below(2); changes > 0; --changes) mutate(problem.index);
    test_blocks(kKernel, problem, any_of(kDevices), i % 3 == 0);
  }
  BlockProblem twice = make_problem(kind, 3, 32, 64, {16, 16}, 1, kIntegers);  // more blocks than there are positions
  twice.index.starts[1] = twice.index.starts[2];
  twice.index.starts[2] = twice.index.blocks();
  test_blocks(kKernel, twice, kDevices[0], true);

  const BlockProblem problem = any_problem(kind, 9, {16, 16}, 2, 4, 0.5, kIntegers);
  set_place(kKernel.name, problem, kDevices[0]);
  const Bytes y = run_blocks(kKernel, problem, kDevices[0], true, {0, 0, 0}, 1);
  bool all = true;
  for (size_t at = 0; at < y.size(); at += static_cast<size_t>(problem.format().width)) {
    all &= std::isnan(problem.format().decode(problem.format().load(y.data() + at)));
  }
  check(all, "a number, although what others have proven is faulty");
}

// What the launcher refuses.
void test_arguments() {
  Buffer memory(64);
  cuda::BlockParams good{};
  good.index = {nullptr, nullptr, nullptr, 0, 0, 1};
  good.rows = 0;
  good.cols = 16;
  good.block_rows = good.block_cols = 16;
  good.m = 1;
  good.dtype = cuda::kBfloat16;
  const auto launch = [](const cuda::BlockParams& params) { return cuda::block_multiply(params, kDevices[0], nullptr, nullptr); };
  const auto refuses = [&](const char* what, const auto& change) {
    cuda::BlockParams params = good;
    change(params);
    place = "block_multiply";
    check(launch(params) == cudaErrorInvalidValue, "takes %s", what);
  };
  check(launch(good) == cudaSuccess, "refuses what it can multiply");
  refuses("float64", [](cuda::BlockParams& p) { p.dtype = cuda::kFloat64; });
  refuses("float32 that may not be rounded", [](cuda::BlockParams& p) { p.dtype = cuda::kFloat32; });
  refuses("8 rows", [](cuda::BlockParams& p) { p.block_rows = 8; });
  refuses("24 columns", [](cuda::BlockParams& p) { p.block_cols = 24; });
  refuses("no rows", [](cuda::BlockParams& p) { p.block_rows = 0; });
  refuses("12 columns of x", [](cuda::BlockParams& p) { p.cols = 12; });
  refuses("12 columns of x, transposed", [](cuda::BlockParams& p) { p.rows = 12, p.transposed = true; });
  refuses("a depth past 32 bits", [](cuda::BlockParams& p) { p.cols = INT64_C(1) << 32; });
  refuses("values off 16 bytes", [&](cuda::BlockParams& p) { p.values = memory.data() + 8; });
  refuses("x off 16 bytes", [&](cuda::BlockParams& p) { p.x = memory.data() + 2; });
  refuses("y off 16 bytes", [&](cuda::BlockParams& p) { p.y = memory.data() + 4; });
}

// ---------------------------------------------------------------------------------------------------------------- banks

// Whether lanes that shared memory serves at a time, `lanes` of them, meet in no bank. `place`: where each has its `width` bytes.
template <typename Place>
bool apart(int lanes, int width, const Place& place) {
  for (int first = 0; first < 32; first += lanes) {
    std::vector<bool> used(static_cast<size_t>(128 / width));
    for (int lane = first; lane < first + lanes; ++lane) {
      const size_t bank = static_cast<size_t>(place(lane) % 128 / width);
      if (used[bank]) return false;
      used[bank] = true;
    }
  }
  return true;
}

template <typename Tile>
void test_banks_of(const char* name) {
  place = std::string("banks of ") + name + ", rows of " + std::to_string(Tile::kRowBytes) + " bytes";
  check(apart(8, 16, [](int thread) { return Tile::place(thread / Tile::kRowChunks, thread % Tile::kRowChunks); }), "copying a row");
  for (int step = 0; step < 4; ++step) {
    const auto operand = [&](int lane) { return Tile::operand(Tile::origin(lane, 0), 0, step); };
    check(Tile::kByWords ? apart(32, 4, operand) : apart(8, 16, operand), "reading step %d", step);
  }
}

template <int kLines>
void test_banks_of_lines() {
  test_banks_of<cuda::OperandTile<kLines, 2, true, false>>("a");
  test_banks_of<cuda::OperandTile<kLines, 2, true, true>>("b");
  test_banks_of<cuda::OperandTile<kLines, 2, false, false>>("a by depth");
  test_banks_of<cuda::OperandTile<kLines, 2, false, true>>("b by depth");
  test_banks_of<cuda::OperandTile<kLines, 4, true, false>>("tf32 a");
  test_banks_of<cuda::OperandTile<kLines, 4, true, true>>("tf32 b");
  test_banks_of<cuda::OperandTile<kLines, 4, false, true>>("tf32 b by depth");
}

// Results on their way to scratch memory.
template <cuda::LinearDtype kDtype, int kLines>
void test_banks_of_results() {
  constexpr int kWidth = kDtype == cuda::kFloat32 ? 4 : 2;
  using Tile = cuda::OperandTile<kLines, kWidth, true, true>;
  constexpr int kStride = cuda::WarpProduct<kDtype, Tile, Tile, 16, kLines>::kScratchStride;
  place = "banks of results, rows of " + std::to_string(kStride) + " bytes";
  check(apart(kWidth == 2 ? 32 : 16, 2 * kWidth, [](int lane) { return lane / 4 * kStride + lane % 4 * 2 * kWidth; }), "writing pairs");
}

void test_banks() {
  test_banks_of_lines<16>();
  test_banks_of_lines<32>();
  test_banks_of_lines<64>();
  test_banks_of_lines<128>();
  test_banks_of_lines<256>();
  test_banks_of_results<cuda::kBfloat16, 16>();
  test_banks_of_results<cuda::kBfloat16, 32>();
  test_banks_of_results<cuda::kBfloat16, 64>();
  test_banks_of_results<cuda::kFloat32, 16>();
  test_banks_of_results<cuda::kFloat32, 32>();
  test_banks_of_results<cuda::kFloat32, 64>();
}

TEST_FAMILY(block_multiply) {
  for (const Kind& kind : kKinds) {
    test_products(kind);
    test_rows(kind);
    test_lines(kind);
    test_alignment(kind);
    test_determinism(kind);
    test_faults(kind);
  }
  test_arguments();
  test_banks();
}

// Tensors that have less than the parameters say: what the sanitizers see of the kernels' copies.
void run_short(int64_t values_missing, int64_t x_missing) {
  const BlockProblem problem = make_problem({cuda::kBfloat16, false}, 20, 64, 96, {32, 32}, 1, kIntegers);
  StoredIndex stored(problem.index);
  const int64_t values_bytes = static_cast<int64_t>(problem.values.size()) * 2, x_bytes = static_cast<int64_t>(problem.x.size()) * 2;
  Buffer values(values_bytes - values_missing), x(x_bytes - x_missing), y(20 * 64 * 2);
  cuda::BlockParams params{};
  params.index = stored.index;
  params.values = values.data();
  params.rows = 64;
  params.cols = 96;
  params.block_rows = params.block_cols = 32;
  params.x = x.data();
  params.y = y.data();
  params.m = 20;
  params.dtype = cuda::kBfloat16;
  Buffer workspace(cuda::block_multiply_workspace_bytes(params, kDevices[0]));
  cuda::block_multiply(params, kDevices[0], workspace.data(), nullptr);
}

PLANTED_ERROR(block_multiply_past_values, "heap-buffer-overflow") { run_short(2, 0); }
PLANTED_ERROR(block_multiply_past_x, "heap-buffer-overflow") { run_short(0, 2); }

}  // namespace
}  // namespace bitmask::testing
