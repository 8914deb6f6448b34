// Tests the block-sparse kernels: every kernel table that this machine can run, every dtype, blocks of many shapes, against dense products
// in double precision of which only kept blocks count.
//
// Most numbers are small integers, or those times the smallest subnormal: their sums are exact in any order, so that every bit is known and
// one element in the wrong place shows. Elements of blocks that reach past the weight are NaN. Nothing is assumed of how a table packs.
#include <map>

#include "block_calls.h"

using namespace bitmask;
using namespace bitmask::testing;

namespace {

// ---------------------------------------------------------------------------------------------------------------- problems

// Exact sums, how far off they may be, and the same of kernels that take subnormal bfloat16 for zero.
struct Sums {
  std::vector<double> exact, slack, flushed;
};

double no_start(int64_t) { return 0; }

// term(i, j, k) summed over k for each i and j; start(j) may be added.
template <class Start, class Term>
Sums sum_up(const Format& format, Numbers numbers, int64_t rows, int64_t cols, int64_t depth, const Start& start, const Term& term) {
  Sums sums;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0, magnitude = std::fabs(start(j));
      for (int64_t k = 0; k < depth; ++k) {
        const double product = term(i, j, k);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double rounding = std::ldexp(magnitude, -format.sum_mantissa) * static_cast<double>(depth + 4) + format.step(magnitude);
      sums.exact.push_back(sum);
      sums.slack.push_back(numbers == kReals ? rounding : 0);
      sums.flushed.push_back(numbers == kTiny ? magnitude : sums.slack.back());
    }
  }
  return sums;
}

// x W^T, g W and g^T x.
struct Problem {
  BlockWeight weight;
  int64_t m;
  Numbers numbers;
  std::vector<double> x_values, g_values, bias_values;
  Bytes x, g, bias;
  Sums product, transposed;
  std::map<int64_t, Sums> sampled;  // by how many rows of x and g
};

Problem make_problem(BlockWeight weight, int64_t m, Numbers numbers) {
  const Format& format = weight.format;
  const int64_t rows = weight.rows, cols = weight.cols;
  const auto random = [&](int64_t count, int64_t bound, bool x) {
    std::vector<uint64_t> elements;
    for (int64_t i = 0; i < count; ++i) elements.push_back(random_element(format, numbers, bound, x));
    return elements;
  };
  weight.bits = random(rows * cols, 16, false);
  const std::vector<uint64_t> x_bits = random(m * cols, 15, true), g_bits = random(m * rows, 15, true),
                              bias_bits = random(rows, 100, false);
  const std::vector<double> w = decode(format, weight.bits), x = decode(format, x_bits), g = decode(format, g_bits),
                            bias = decode(format, bias_bits);
  std::vector<char> kept;
  for (int64_t at = 0; at < rows * cols; ++at) kept.push_back(weight.keeps(at / cols, at % cols));
  const auto forward = [&](int64_t i, int64_t row, int64_t col) {
    const size_t at = static_cast<size_t>(row * cols + col);
    return kept[at] ? x[static_cast<size_t>(i * cols + col)] * w[at] : 0;
  };
  const auto backward = [&](int64_t i, int64_t col, int64_t row) {
    const size_t at = static_cast<size_t>(row * cols + col);
    return kept[at] ? g[static_cast<size_t>(i * rows + row)] * w[at] : 0;
  };
  const auto start = [&](int64_t row) { return bias[static_cast<size_t>(row)]; };
  return {weight,
          m,
          numbers,
          x,
          g,
          bias,
          pack(format, x_bits),
          pack(format, g_bits),
          pack(format, bias_bits),
          sum_up(format, numbers, m, rows, cols, start, forward),
          sum_up(format, numbers, m, cols, rows, no_start, backward),
          {}};
}

// g^T x of the first m rows.
const Sums& sampled(Problem& problem, int64_t m) {
  const int64_t rows = problem.weight.rows, cols = problem.weight.cols;
  const auto known = problem.sampled.find(m);
  if (known != problem.sampled.end()) return known->second;
  return problem.sampled[m] =
             sum_up(problem.weight.format, problem.numbers, rows, cols, m, no_start, [&](int64_t row, int64_t col, int64_t i) {
               return problem.g_values[static_cast<size_t>(i * rows + row)] * problem.x_values[static_cast<size_t>(i * cols + col)];
             });
}

// ---------------------------------------------------------------------------------------------------------------- calls

void report(const Mismatches& wrong, const BlockCall& call) {
  check(wrong.count == 0,
        "%s: m %" PRId64 ", lines %" PRId64 " to %" PRId64 ", bias %d, order %d, chunks %d, skew %d: %" PRId64 " wrong, first [%" PRId64
        ", %" PRId64 "]: %g instead of %g",
        kBlockWayNames[call.way], call.m, call.begin, call.end, call.biased, call.order, call.chunks, call.skew, wrong.count, wrong.row,
        wrong.col, wrong.got, wrong.expected);
}

void test_product(BlockSubject& subject, const Problem& problem, const BlockCall& call) {
  const BlockWeight& weight = problem.weight;
  const bool transposed = call.way == kBlockTransposed;
  const int64_t width = weight.format.width, cols = transposed ? weight.cols : weight.rows,
                block = transposed ? weight.block_cols : weight.block_rows;
  Buffer y(call.m * call.y_cols(weight) * width, call.skew);
  run_product(subject, weight, transposed ? problem.g : problem.x, problem.bias, call, y);
  const Sums& sums = transposed ? problem.transposed : problem.product;
  Mismatches wrong;
  for (int64_t i = 0; i < call.m; ++i) {
    for (int64_t col = call.begin * block; col < std::min(call.end * block, cols); ++col) {
      const int64_t at = i * call.y_cols(weight) + col;
      const size_t index = static_cast<size_t>(i * cols + col);
      const double offset = call.biased ? problem.bias_values[static_cast<size_t>(col)] : 0;
      wrong.compare(weight.format, y.data() + at * width, sums.exact[index] + offset, (subject.flushes ? sums.flushed : sums.slack)[index],
                    i, col);
    }
  }
  report(wrong, call);
}

void test_sample(BlockSubject& subject, Problem& problem, const BlockCall& call) {
  const BlockWeight& weight = problem.weight;
  const Format& format = weight.format;
  Buffer values(weight.blocks() * weight.block_bytes(), call.skew);
  run_sample(subject, weight, problem.g, problem.x, call, values);
  const StoredBlocks stored(weight, false, kOfLines, 0);
  const BlockMatrix& w = stored.matrix();
  const Sums& sums = sampled(problem, call.m);
  const int64_t elements = weight.block_rows * weight.block_cols;
  Mismatches wrong;
  int64_t not_zero = 0;
  for (int64_t at = call.begin * elements; at < call.end * elements; ++at) {
    const uint8_t* const element = values.data() + at * format.width;
    const int64_t block = at / elements, inside = at % elements;
    const int64_t row = w.lines[block] * weight.block_rows + inside / weight.block_cols;
    const int64_t col = w.positions[block] * weight.block_cols + inside % weight.block_cols;
    if (row >= weight.rows || col >= weight.cols) {
      not_zero += format.load(element) != 0;
      continue;
    }
    const size_t index = static_cast<size_t>(row * weight.cols + col);
    wrong.compare(format, element, sums.exact[index], (subject.flushes ? sums.flushed : sums.slack)[index], row, col);
  }
  report(wrong, call);
  check(not_zero == 0, "sample: m %" PRId64 ", %" PRId64 " elements past the weight are not zero", call.m, not_zero);
}

// Half of the time all lines, else some.
void test_call(BlockSubject& subject, Problem& problem, BlockWay way, int64_t m) {
  const BlockWeight& weight = problem.weight;
  const int64_t lines = way == kBlockSample ? weight.blocks() : way == kBlockTransposed ? weight.col_count() : weight.row_count();
  const bool all = random_below(2) == 0;
  const int64_t begin = all ? 0 : random_below(lines + 1), end = all ? lines : begin + random_below(lines - begin + 1);
  const bool biased = way < kBlockTransposed && random_below(2) == 0;
  const Order order = way == kBlockTransposed && random_below(2) == 0 ? kShuffled : kOfLines;
  const int chunks = way == kBlockSample ? 1 + static_cast<int>(random_below(std::clamp<int64_t>(m, 1, 4))) : 0;
  const int64_t gap = way < kBlockTransposed ? random_below(3) : 0;
  const BlockCall call{way, m, begin, end, biased, order, chunks, kSkews[random_below(3)], gap};
  way == kBlockSample ? test_sample(subject, problem, call) : test_product(subject, problem, call);
}

// ---------------------------------------------------------------------------------------------------------------- cases

int64_t most_rows(const BlockKernels& kernels, BlockWay way) {
  return way == kBlockStream ? kernels.streaming_rows : way == kBlockSample ? kernels.sampled_rows : kernels.most_rows;
}

// Numbers of rows at which kernels may change what they do.
std::vector<int64_t> every_m(const BlockKernels& kernels, BlockWay way) {
  if (way == kBlockSample) return {0, 1, 2, 3, 16, 31, 49, 100};
  std::vector<int64_t> ms{1, 2, 15, 16, 17, 47, 48, 49, 100, kernels.tile_rows - 1, kernels.tile_rows, kernels.tile_rows + 1};
  for (int64_t m = 3; m <= kernels.streaming_rows; ++m) ms.push_back(m);
  return ms;
}

// Two of them.
std::vector<int64_t> some_m(const BlockKernels& kernels, BlockWay way) {
  if (way == kBlockStream) return {1, 1 + random_below(kernels.streaming_rows)};
  const std::vector<int64_t> ms = every_m(kernels, way);
  const auto any = [&] { return ms[static_cast<size_t>(random_below(static_cast<int64_t>(ms.size())))]; };
  return {any(), any()};
}

// As many as a call takes, and fewer.
std::vector<int64_t> most_m(const BlockKernels& kernels, BlockWay way) {
  const int64_t most = most_rows(kernels, way);
  return {most - 1, most, most / 2 + 1};
}

// For large weights: the number of calls matters more than what they do.
std::vector<int64_t> few_m(const BlockKernels& kernels, BlockWay way) {
  if (way == kBlockStream) return {1, kernels.streaming_rows};
  return {1, 9, 49};
}

void test_problem(const BlockSubjects& subjects, Problem problem, const std::string& what,
                  std::vector<int64_t> (*ms)(const BlockKernels&, BlockWay)) {
  const BlockWeight& weight = problem.weight;
  for (const auto& subject : subjects) {
    if (subject->format.name != weight.format.name) continue;
    place = std::string(subject->isa) + " block " + weight.format.name + " [" + std::to_string(weight.rows) + ", " +
            std::to_string(weight.cols) + "] of " + std::to_string(weight.block_rows) + "x" + std::to_string(weight.block_cols) + " " +
            what;
    for (const BlockWay way : kBlockWays) {
      for (const int64_t m : ms(subject->kernels, way)) {
        const int64_t least = way == kBlockSample ? 0 : 1, most = std::min(problem.m, most_rows(subject->kernels, way));
        if (least <= m && m <= most) test_call(*subject, problem, way, m);
      }
    }
  }
}

// Which blocks are kept: a share of them, and every other line without one, if `gaps`.
BlockWeight make_weight(const Format& format, int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols, double density,
                        bool gaps) {
  BlockWeight weight{format, rows, cols, block_rows, block_cols, {}, {}};
  for (int64_t row = 0; row < weight.row_count(); ++row) {
    for (int64_t col = 0; col < weight.col_count(); ++col) {
      const bool gap = gaps && (row % 2 == 0 || col % 2 == 0);
      weight.kept.push_back(!gap && static_cast<double>(random_below(1 << 20)) < density * (1 << 20));
    }
  }
  return weight;
}

void test_shape(const BlockSubjects& subjects, const Format& format, int64_t block_rows, int64_t block_cols, bool brief) {
  // At least so many rows and columns, and two or three blocks.
  const int64_t lines = std::max<int64_t>(2, divide_up(40, block_rows)), across = std::max<int64_t>(3, divide_up(50, block_cols));
  const int64_t whole[] = {lines * block_rows, across * block_cols};
  const int64_t ragged[] = {whole[0] - (block_rows + 1) / 3, whole[1] - (block_cols + 1) / 2};
  const int64_t m = ragged[0] * ragged[1] > 20000 || brief ? 49 : 101;
  const auto test = [&](const int64_t (&size)[2], double density, bool gaps, Numbers numbers) {
    const BlockWeight weight = make_weight(format, size[0], size[1], block_rows, block_cols, density, gaps);
    test_problem(subjects, make_problem(weight, m, numbers), name_of(density, numbers), brief || kSanitized ? some_m : every_m);
  };
  for (const double density : {0.0, 0.5, 1.0}) test(ragged, density, false, kIntegers);
  if (brief) return test(ragged, 0.4, true, kSpecials);
  test(ragged, 1.0, true, kIntegers);
  test(whole, 0.5, false, kIntegers);
  test({divide_up(block_rows, 2), divide_up(block_cols, 3)}, 1.0, false, kIntegers);
  for (const Numbers numbers : {kTiny, kSpecials, kReals}) test(ragged, 0.5, false, numbers);
}

// Blocks too long to be multiplied at once, lines of more blocks than are, and blocks of more rows than sums are kept for.
void test_pieces(const BlockSubjects& subjects, const Format& format, bool brief) {
  constexpr int64_t kShapes[][4] = {{2, 1030, 2, 3},  {1030, 2, 3, 2}, {3, 1025, 2, 3}, {1025, 3, 3, 2}, {1100, 1, 2, 3},
                                    {1100, 20, 2, 3}, {1, 1, 3, 230},  {1, 1, 230, 3},  {16, 16, 2, 70}, {16, 16, 70, 2}};
  for (const auto& [block_rows, block_cols, lines, across] : kShapes) {
    const int64_t rows = lines * block_rows - block_rows / 2, cols = across * block_cols - block_cols / 2, m = brief ? 9 : 49;
    const auto test = [&, height = block_rows, width = block_cols](double density, Numbers numbers) {
      const BlockWeight weight = make_weight(format, rows, cols, height, width, density, false);
      test_problem(subjects, make_problem(weight, m, numbers), name_of(density, numbers), few_m);
    };
    test(1.0, kIntegers);
    if (!brief) test(0.6, kSpecials);
  }
}

// Blocks that reach far past the weight.
void test_far_past(const BlockSubjects& subjects, const Format& format) {
  constexpr int64_t kSizes[][4] = {{10, 50, 3000, 20}, {50, 10, 20, 3000}, {10, 7, 301, 1101}};
  for (const auto& [rows, cols, block_rows, block_cols] : kSizes) {
    test_problem(subjects, make_problem(make_weight(format, rows, cols, block_rows, block_cols, 1, false), 49, kSpecials), "far past",
                 few_m);
  }
  for (const auto& subject : subjects) {
    check(subject->kernels.columns_bytes(9, 10, 1 << 20) == subject->kernels.columns_bytes(9, 10, 10), "packs what is past the weight");
  }
}

void test_many_rows(const BlockSubjects& subjects, const Format& format, bool brief) {
  int64_t most = 0;
  for (const auto& subject : subjects) {
    for (const BlockWay way : kBlockWays) most = std::max(most, most_rows(subject->kernels, way));
  }
  test_problem(subjects, make_problem(make_weight(format, 20, 30, 16, 16, 0.8, false), most, kIntegers), "many rows", most_m);
  if (!brief) test_problem(subjects, make_problem(make_weight(format, 90, 70, 33, 32, 0.8, false), most, kIntegers), "many rows", most_m);
}

}  // namespace

void bitmask::testing::test_block(bool brief) {
  const BlockSubjects subjects = runnable_subjects(&Kernels::block);
  constexpr int64_t kShapes[][2] = {{1, 1},   {3, 5},   {4, 4},   {1, 16},    {16, 1},  {8, 24},   {16, 16},
                                    {20, 12}, {32, 32}, {64, 64}, {128, 128}, {33, 47}, {160, 16}, {16, 300}};
  for (const Format& format : kFormats) {
    for (const auto& shape : kShapes) {
      if (!brief || shape[0] * shape[1] < 2000) test_shape(subjects, format, shape[0], shape[1], brief);
    }
    // A weight of no rows, and one of no columns.
    for (const bool rows : {true, false}) {
      const BlockWeight weight = make_weight(format, rows ? 37 : 0, rows ? 0 : 37, 16, 16, 1, false);
      test_problem(subjects, make_problem(weight, 49, kIntegers), "nothing", every_m);
    }
    test_pieces(subjects, format, brief);
    test_far_past(subjects, format);
    test_many_rows(subjects, format, brief);
  }
}
