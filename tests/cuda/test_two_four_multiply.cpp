// Tests two_four_multiply, on whole weights and on blocks, against products in double precision; the instruction that it is made of against
// plain loops and against torch's order of metadata; and the bits that make its operand.
#include <cuda_runtime.h>

#include "../../csrc/cuda/two_four_multiply.cuh"
#include "twin_calls.h"
#include "two_four_problems.h"

namespace bitmask::testing {
namespace {

using cuda::Device;
namespace ptx = cuda::ptx;

constexpr cuda::LinearDtype kDtypes[] = {cuda::kBfloat16, cuda::kFloat16};

// One threadblock at a time for each of few processors, or more of them than there is work; the first has room for smaller tiles only.
constexpr Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}, {3, 227 << 10}};

constexpr TwoFourKernel kKernel{"two_four_multiply", cuda::two_four_multiply, cuda::two_four_multiply_workspace_bytes};

template <typename T, size_t kCount>
T any_of(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

void test_problem(const TwoFourProblem& problem, const Device& device, bool biased, const TwoFourSkews& skews = {0, 0, 0, 0}) {
  test_two_four(kKernel, problem, device, biased, skews);
}

// ---------------------------------------------------------------------------------------------------------------- the operand

// The code of a group by the rule of FORMAT.md; 0 for those that are faulty.
uint32_t code_of(uint32_t group) {
  uint32_t code = 0, found = 0;
  for (uint32_t col = 0; col < 4; ++col) {
    if ((group >> col & 1) != 0) code |= col << (2 * found++ % 4);
  }
  return found == 2 ? code : 0;
}

// Every group in every place of a word, among groups of which each is sound or not.
TEST_FAMILY(two_four_codes) {
  place = "codes";
  for (int i = 0; i < 20000; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random_word());
    const uint32_t faults = cuda::faults_of(bits), repaired = cuda::repair(bits, faults), codes = cuda::codes_of(repaired);
    for (int shift = 0; shift < 32; shift += 4) {
      const uint32_t group = bits >> shift & 15, expected = code_of(group);
      check(((faults >> shift & 15) == 0) == (expected != 0), "group %x: faulty or not", group);
      check(expected == 0 || (repaired >> shift & 15) == group, "group %x: changed", group);
      check(code_of(repaired >> shift & 15) == (codes >> shift & 15), "group %x: code %x", group, codes >> shift & 15);
      check((codes >> shift & 15) != 0, "group %x: no code", group);
    }
  }
}

// What the lanes bring to an mma.sp: four words of a, four of b, the codes; and its d.
struct Words {
  uint32_t lanes[32][9];
};
struct Sums {
  float lanes[32][4];
};
template <int kSelector, bool kHalf>
__global__ void multiply_sparse(const Words* words, Sums* sums) {
  uint32_t a[4], b[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = words->lanes[threadIdx.x][i];
    b[i] = words->lanes[threadIdx.x][4 + i];
  }
  float d[4] = {1, 2, 3, 4};
  const uint32_t codes = words->lanes[threadIdx.x][8];
  kHalf ? ptx::mma_sparse_float16<kSelector>(d, a, b, codes) : ptx::mma_sparse_bfloat16<kSelector>(d, a, b, codes);
  for (int i = 0; i < 4; ++i) sums->lanes[threadIdx.x][i] = d[i];
}

// Where word w (four codes) of row r lies in torch's metadata of `rows` rows, by the formula of FORMAT.md.
size_t torch_place(int64_t rows, int64_t r, int64_t w) {
  return static_cast<size_t>(w / 2 * 2 * rows + 2 * (32 * (r / 32) + 4 * (r % 8) + 2 * (r % 32 / 16) + w % 2) + r / 8 % 2);
}

// Multiplies 16 rows of a random 2:4 [32, 32], those that kSelector takes. The codes of all 32 rows are handed out as ldmatrix would do
// with torch's metadata: 16 bytes for each four lanes, 4 for each of them.
template <int kSelector, bool kHalf>
void test_instruction() {
  const Format& format = kFormats[kHalf ? cuda::kFloat16 : cuda::kBfloat16];
  uint16_t meta[64] = {};
  double dense[32][32] = {}, x[8][32];
  uint64_t stored[32][16];
  for (int64_t row = 0; row < 32; ++row) {
    const Bytes bits = random_groups(32);
    for (int col = 0, count = 0; col < 32; ++col) {
      if (!bit(bits.data(), col)) continue;
      stored[row][count] = random_element(format, kIntegers, 16, false);
      dense[row][col] = format.decode(stored[row][count++]);
    }
    for (int64_t group = 0; group < 8; ++group) {
      const uint32_t code = code_of(bits[static_cast<size_t>(group / 2)] >> (4 * (group % 2)) & 15);
      uint16_t& word = meta[torch_place(32, row, group / 4)];
      word = static_cast<uint16_t>(word | code << (4 * (group % 4)));
    }
  }
  uint64_t rows_of_x[8][32];
  for (int row = 0; row < 8; ++row) {
    for (int col = 0; col < 32; ++col) {
      rows_of_x[row][col] = random_element(format, kIntegers, 15, true);
      x[row][col] = format.decode(rows_of_x[row][col]);
    }
  }
  Words words;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint64_t* const pair = &stored[16 * kSelector + g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      const uint64_t* const pair_of_x = &rows_of_x[g][2 * t + 8 * i];
      words.lanes[lane][i] = static_cast<uint32_t>(pair[0] | pair[1] << 16);
      words.lanes[lane][4 + i] = static_cast<uint32_t>(pair_of_x[0] | pair_of_x[1] << 16);
    }
    words.lanes[lane][8] = static_cast<uint32_t>(meta[2 * lane] | meta[2 * lane + 1] << 16);
    if (t / 2 != kSelector) words.lanes[lane][8] = 0x50fa0;  // what means nothing, but is passed over
  }
  Sums sums;
  launch(1, 32, 0, multiply_sparse<kSelector, kHalf>, &words, &sums);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
      double sum = i + 1;
      for (int k = 0; k < 32; ++k) sum += dense[16 * kSelector + row][k] * x[col][k];
      check(sums.lanes[lane][i] == sum, "row %d, column %d: %g instead of %g", row, col, static_cast<double>(sums.lanes[lane][i]), sum);
    }
  }
}

TEST_FAMILY(two_four_instruction) {
  for (int i = 0; i < 20; ++i) {
    place = "mma.sp";
    test_instruction<0, false>();
    test_instruction<1, false>();
    test_instruction<0, true>();
    test_instruction<1, true>();
  }
}

PLANTED_ERROR(two_four_invalid_code, "mma.sp: code 5 of row 9, columns 20 to 23") {
  Words words;
  for (auto& lane : words.lanes) {
    for (uint32_t& word : lane) word = 0x44444444;
  }
  words.lanes[4 * 1 + 1][8] = 0x44544444;  // row 1 + 8, the second 16 columns
  Sums sums;
  launch(1, 32, 0, multiply_sparse<0, false>, &words, &sums);
}

// ---------------------------------------------------------------------------------------------------------------- products

constexpr int64_t kRows[] = {1, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 128, 129, 136, 257, 300};
constexpr int64_t kColumns[] = {0, 16, 32, 48, 64, 80, 112, 128, 144, 192, 208, 256, 336, 512};
constexpr int64_t kMs[] = {1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 127, 128, 130};

TEST_FAMILY(two_four_multiply_whole) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (const int64_t cols : kColumns) {
      for (const Numbers numbers : {kIntegers, kSpecials, kReals}) {
        test_problem(make_two_four(dtype, any_of(kMs), any_of(kRows), cols, numbers), any_of(kDevices), random_below(2) == 0);
      }
    }
    for (const int64_t m : kMs)
      test_problem(make_two_four(dtype, m, any_of(kRows), 16 * random_below(24), kIntegers), any_of(kDevices), true);
    for (const int64_t rows : kRows) test_problem(make_two_four(dtype, 9, rows, 272, kTiny), any_of(kDevices), false);
    for (const Device& device : kDevices) {  // few tiles and many stages, which many threadblocks share
      test_problem(make_two_four(dtype, 20, 130, 2048, kIntegers), device, true);
      test_problem(make_two_four(dtype, 130, 300, 528, kSpecials), device, true);
    }
  }
}

// Metadata that begin anywhere, y and the bias where an element may.
TEST_FAMILY(two_four_multiply_alignment) {
  for (int skew = 0; skew < 8; ++skew) {
    const TwoFourSkews skews{16 * (skew % 3), skew, 16 * (skew % 2), 2 * skew};
    const cuda::LinearDtype dtype = kDtypes[skew % 2];
    test_problem(make_two_four(dtype, 5, 24, 96, kIntegers), any_of(kDevices), true, skews);
    test_problem(make_two_four(dtype, 3, 37, 176, kIntegers), any_of(kDevices), false, skews);
    test_problem(make_two_four_blocks(dtype, 5, 40, 88, 16, 32, 0.7, kIntegers), any_of(kDevices), true, skews);
  }
}

struct Blocks {
  int64_t rows, cols;
};
constexpr Blocks kBlocks[] = {{16, 32}, {32, 32}, {48, 96}, {64, 64}, {16, 128}, {128, 32}, {128, 128}, {256, 64}};
constexpr double kDensities[] = {0, 0.3, 0.6, 1};

TEST_FAMILY(two_four_multiply_blocks) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (const Blocks& block : kBlocks) {
      for (const double density : kDensities) {
        const int64_t rows = 1 + random_below(3 * block.rows), cols = 8 * (1 + random_below(block.cols / 2));
        test_problem(make_two_four_blocks(dtype, any_of(kMs), rows, cols, block.rows, block.cols, density, kIntegers), any_of(kDevices),
                     random_below(2) == 0);
      }
      for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
        test_problem(
            make_two_four_blocks(dtype, 1 + random_below(20), 2 * block.rows, 3 * block.cols, block.rows, block.cols, 0.7, numbers),
            any_of(kDevices), true);
      }
    }
    for (const int64_t m : kMs) test_problem(make_two_four_blocks(dtype, m, 70, 200, 32, 64, 0.6, kIntegers), any_of(kDevices), true);
  }
}

// The same bits, whatever order blocks and threads run in.
TEST_FAMILY(two_four_multiply_determinism) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (const TwoFourProblem& problem :
         {make_two_four(dtype, 33, 140, 1040, kReals), make_two_four_blocks(dtype, 20, 140, 304, 32, 64, 0.8, kReals)}) {
      Bytes first;
      for_each_seed(5, [&] {
        const Bytes y = run_two_four(kKernel, problem, kDevices[2], true);
        if (first.empty()) first = y;
        check(y == first, "other bits than before");
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

TEST_FAMILY(two_four_multiply_faults) {
  for (const cuda::LinearDtype dtype : kDtypes) {
    for (int i = 0; i < 60; ++i) {
      TwoFourProblem problem = make_two_four(dtype, 1 + random_below(10), 1 + random_below(140), 16 * (1 + random_below(20)), kIntegers);
      for (int64_t changes = 1 + random_below(5); changes > 0; --changes) mutate_metadata(problem);
      test_problem(problem, any_of(kDevices), i % 2 == 0, {0, i % 4, 0, 0});
    }
    for (int i = 0; i < 100; ++i) {
      const Blocks& block = kBlocks[i % 5];
      TwoFourProblem problem = make_two_four_blocks(dtype, 1 + random_below(10), 1 + random_below(4 * block.rows),
                                                    8 * (1 + random_below(block.cols / 2)), block.rows, block.cols, 0.6, kIntegers);
      for (int64_t changes = random_below(3); changes > 0; --changes) mutate_metadata(problem);
      for (int64_t changes = random_below(3); changes > 0; --changes) mutate(*problem.index);
      test_problem(problem, any_of(kDevices), i % 2 == 0);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- arguments

// What the launcher says of params of which something has been changed.
template <typename Change>
void check_refused(const char* what, const TwoFourProblem& problem, const Change& change) {
  StoredTwoFour stored(problem, false);
  change(stored.params);
  check(cuda::two_four_multiply(stored.params, kDevices[2], nullptr, nullptr) == cudaErrorInvalidValue, "%s", what);
}

TEST_FAMILY(two_four_multiply_arguments) {
  place = "two_four_multiply";
  const TwoFourProblem whole = make_two_four(cuda::kBfloat16, 2, 16, 64, kIntegers);
  const TwoFourProblem blocks = make_two_four_blocks(cuda::kBfloat16, 2, 16, 64, 16, 32, 1, kIntegers);
  using Params = cuda::TwoFourParams;
  check_refused("float32", whole, [](Params& params) { params.dtype = cuda::kFloat32; });
  check_refused("columns of x", whole, [](Params& params) { params.cols = params.block_cols = 40; });
  check_refused("x off its place", whole, [](Params& params) { params.x = static_cast<const uint8_t*>(params.x) + 8; });
  check_refused("values off their place", whole, [](Params& params) { params.values = static_cast<const uint8_t*>(params.values) + 2; });
  check_refused("columns of blocks", blocks, [](Params& params) { params.block_cols = 16; });
  check_refused("rows of blocks", blocks, [](Params& params) { params.block_rows = 8; });
  check_refused("columns of W", blocks, [](Params& params) { params.cols = 60; });
  check_refused("an order", blocks, [](Params& params) { params.index.order = params.index.positions; });
  check(run_two_four(kKernel, make_two_four(cuda::kBfloat16, 0, 16, 64, kIntegers), kDevices[0], true).empty(), "no rows of x");
  check(run_two_four(kKernel, make_two_four(cuda::kFloat16, 3, 0, 64, kIntegers), kDevices[0], true).empty(), "no rows of W");
}

// A weight that claims more than it has: what the sanitizers see of the kernels' copies.
void run_short(int64_t values, int64_t metadata) {
  TwoFourProblem problem = make_two_four(cuda::kBfloat16, 8, 16, 256, kIntegers);
  problem.values.resize(problem.values.size() - static_cast<size_t>(values));
  problem.metadata.resize(problem.metadata.size() - static_cast<size_t>(metadata));
  run_two_four(kKernel, problem, kDevices[0], false);
}

PLANTED_ERROR(two_four_multiply_past_values, "heap-buffer-overflow") { run_short(1, 0); }
PLANTED_ERROR(two_four_multiply_past_metadata, "heap-buffer-overflow") { run_short(0, 1); }

}  // namespace
}  // namespace bitmask::testing
