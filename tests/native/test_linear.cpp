// Tests the linear kernels: every kernel table that this machine can run, every dtype, against dense products in double precision.
//
// Most numbers are small integers, or those times the smallest subnormal: their sums are exact in any order, so that every bit of y is
// known and one weight in the wrong place shows. Nothing is assumed of how a table lays out x, nor of how many rows it takes at a time.
#include <cmath>

#include "linear_calls.h"

using namespace bitmask;
using namespace bitmask::testing;

namespace {

// ---------------------------------------------------------------------------------------------------------------- problems

// y = x W^T, and the same with a bias.
struct Problem {
  Format format;
  int64_t m;
  Weight weight;
  Bytes x, bias;
  std::vector<double> y, y_biased;     // [m, rows]
  std::vector<double> slack, flushed;  // how far each y may be off; the same of kernels that take subnormal bfloat16 for zero
};

// The sums of a problem and how far off they may be. With `flushable`, any term may be lost to the flushing of subnormals.
void solve(Problem& problem, const std::vector<double>& x, const std::vector<double>& w, const std::vector<double>& bias, bool exact,
           bool flushable) {
  const int64_t cols = problem.weight.cols;
  const Format& format = problem.format;
  for (int64_t i = 0; i < problem.m; ++i) {
    for (int64_t row = 0; row < problem.weight.rows; ++row) {
      const double* const a = x.data() + i * cols;
      const double* const b = w.data() + row * cols;
      double sum = 0, magnitude = std::fabs(bias[static_cast<size_t>(row)]);
      for (int64_t col = 0; col < cols; ++col) {
        sum += a[col] * b[col];
        magnitude += std::fabs(a[col] * b[col]);
      }
      problem.y.push_back(sum);
      problem.y_biased.push_back(sum + bias[static_cast<size_t>(row)]);
      const double step = format.step(magnitude);
      problem.slack.push_back(exact ? 0 : std::ldexp(magnitude, -format.sum_mantissa) * static_cast<double>(cols + 4) + step);
      problem.flushed.push_back(flushable ? magnitude : problem.slack.back());
    }
  }
}

Problem make_problem(const Format& format, int64_t m, int64_t rows, int64_t cols, double density, Numbers numbers) {
  std::vector<uint64_t> w(static_cast<size_t>(rows * cols)), x(static_cast<size_t>(m * cols)), bias(static_cast<size_t>(rows));
  std::vector<bool> kept;
  for (uint64_t& element : w) {
    kept.push_back(static_cast<double>(random_below(1 << 20)) < density * (1 << 20));
    element = kept.back() ? random_element(format, numbers, 16, false) : 0;
  }
  for (uint64_t& element : x) element = random_element(format, numbers, 15, true);
  for (uint64_t& element : bias) element = random_element(format, numbers, 100, false);
  Problem problem{format, m, compress(format, rows, cols, w, kept), pack(format, x), pack(format, bias), {}, {}, {}, {}};
  solve(problem, decode(format, x), decode(format, w), decode(format, bias), numbers != kReals, numbers == kTiny);
  return problem;
}

// ---------------------------------------------------------------------------------------------------------------- products

void test_call(Subject& subject, const Problem& problem, const Call& call) {
  const Format& format = subject.format;
  const int64_t rows = problem.weight.rows;
  Buffer y(call.m * rows * format.width, call.skew);
  if (!run(subject, problem.weight, problem.x, problem.bias, call, call.end, y)) return;
  Mismatches wrong;
  for (int64_t i = 0; i < call.m; ++i) {
    for (int64_t row = call.begin; row < call.end; ++row) {
      const int64_t at = i * rows + row;
      const size_t index = static_cast<size_t>(at);
      wrong.compare(format, y.data() + at * format.width, (call.biased ? problem.y_biased : problem.y)[index],
                    (subject.flushes ? problem.flushed : problem.slack)[index], i, row);
    }
  }
  check(wrong.count == 0,
        "%s: m %" PRId64 ", rows %" PRId64 " to %" PRId64 ", bias %d, skew %d: %" PRId64 " wrong, first [%" PRId64 ", %" PRId64
        "]: %g instead of %g",
        kWayNames[call.way], call.m, call.begin, call.end, call.biased, call.skew, wrong.count, wrong.row, wrong.col, wrong.got,
        wrong.expected);
}

// Both ways, for each number of rows of x in `ms`; all rows of the weight and some of them by turns.
void test_problem(const Subjects& subjects, const Problem& problem, const std::string& what,
                  std::vector<int64_t> (*ms)(const LinearKernels&)) {
  const int64_t rows = problem.weight.rows;
  for (const auto& subject : subjects) {
    if (subject->format.name != problem.format.name) continue;
    set_place(*subject, problem.weight, what);
    poison_scratch(*subject);
    int64_t turn = 0;
    for (const Way way : kWays) {
      for (const int64_t m : ms(subject->kernels)) {
        if (m > problem.m || (way == kStream && m > subject->kernels.streaming_rows)) continue;
        const bool part = turn % 4 >= 2;
        const int64_t begin = part ? random_below(rows + 1) : 0, end = part ? begin + random_below(rows - begin + 1) : rows;
        test_call(*subject, problem, {way, m, begin, end, turn % 2 == 1, kSkews[turn % 3]});
        ++turn;
      }
    }
    check(subject->scratch.canaries_intact(), "multiply writes outside of its scratch memory");
  }
}

// Every number of rows up to two panels and one.
std::vector<int64_t> every_m(const LinearKernels& kernels) {
  std::vector<int64_t> ms;
  for (int64_t m = 1; m <= 2 * kernels.panel_rows + 1; ++m) ms.push_back(m);
  return ms;
}

// Those for which streaming ends and panels begin, fill up, and begin again.
std::vector<int64_t> some_m(const LinearKernels& kernels) {
  std::vector<int64_t> ms{1, 2, 3, kernels.streaming_rows, kernels.panel_rows / 2, kernels.panel_rows, kernels.panel_rows + 1};
  std::sort(ms.begin(), ms.end());
  ms.erase(std::unique(ms.begin(), ms.end()), ms.end());
  return ms;
}

std::vector<int64_t> one_m(const LinearKernels& kernels) { return {1, kernels.streaming_rows + 1}; }

// Those near which a table may take x in blocks.
std::vector<int64_t> many_m(const LinearKernels&) { return {505, 1031, 1032, 1033}; }

void test_products(const Subjects& subjects, const Format& format, int64_t most_m, bool brief) {
  for (const int64_t cols : {0, 1, 7, 63, 64, 65, 127, 130, 513, 1100, 4100}) {
    for (const int64_t rows : {1, 2, 5, 33, 131, 301}) {
      const int64_t elements = rows * cols;
      if (elements > (brief ? 10000 : 500000)) continue;
      const bool small = elements < (brief ? 300 : 5000), large = elements > 40000;
      for (const double density : {0.0, 0.1, 0.5, 1.0}) {
        if (large && density != (cols == 513 ? 0.1 : 0.5)) continue;
        test_problem(subjects, make_problem(format, large ? 16 : most_m, rows, cols, density, kIntegers), name_of(density, kIntegers),
                     small   ? every_m
                     : large ? one_m
                             : some_m);
      }
    }
    for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
      for (const double density : {0.01, 0.5, 1.0}) {
        test_problem(subjects, make_problem(format, most_m, cols > 1000 ? 3 : 37, cols, density, numbers), name_of(density, numbers),
                     brief ? one_m : some_m);
      }
    }
  }
  test_problem(subjects, make_problem(format, brief ? 505 : 1033, 3, 65, 0.5, kIntegers), "many rows of x", many_m);
  if (!brief) test_problem(subjects, make_problem(format, 1033, 39, 1100, 0.5, kIntegers), "many rows of x", many_m);
  if (!brief) test_problem(subjects, make_problem(format, 1033, 133, 130, 0.5, kSpecials), "many rows of x", many_m);
}

// ---------------------------------------------------------------------------------------------------------------- conversions

// Every element there is of two bytes, less those that `wanted` leaves out; of wider ones, random bits. `brief`: some of them.
std::vector<uint64_t> patterns(const Format& format, bool finite, bool brief) {
  std::vector<uint64_t> all;
  for (uint64_t i = 0; i < 65536; i += brief ? 7 : 1) {
    const uint64_t bits = format.width == 2 ? i : random_word() >> (64 - 8 * format.width);
    if (!finite || (bits & ~format.sign()) < format.infinity()) all.push_back(bits);
  }
  while (all.size() % kGroup != 0) all.push_back(0);
  return all;
}

// A problem whose answer is `patterns`, in the order in which they are, or transposed.
Problem identity(const Format& format, int64_t m, const Weight& weight, const Bytes& x, const Bytes& bias,
                 const std::vector<uint64_t>& answer, bool transposed) {
  Problem problem{format, m, weight, x, bias, {}, {}, {}, {}};
  const int64_t count = m * weight.rows;
  for (int64_t i = 0; i < count; ++i) {
    const double value = format.decode(answer[static_cast<size_t>(transposed ? i % weight.rows * m + i / weight.rows : i)]);
    problem.y.push_back(value);
    const bool subnormal = std::fabs(value) < std::ldexp(1, format.least);
    problem.slack.push_back(0);
    problem.flushed.push_back(subnormal ? std::fabs(value) : 0);
  }
  problem.y_biased = problem.y;
  return problem;
}

void test_both_ways(const Subjects& subjects, const Problem& problem, const char* what, bool biased) {
  for (const auto& subject : subjects) {
    if (subject->format.name != problem.format.name) continue;
    set_place(*subject, problem.weight, what);
    poison_scratch(*subject);
    for (const Way way : kWays) test_call(*subject, problem, {way, problem.m, 0, problem.weight.rows, biased, 0});
  }
}

// Each element comes through x, the weight and the bias as it is.
void test_widening(const Subjects& subjects, const Format& format, bool brief) {
  const uint64_t one = format.encode(1);
  const std::vector<uint64_t> all = patterns(format, false, brief);
  const int64_t count = static_cast<int64_t>(all.size());
  const std::vector<bool> kept(all.size(), true), none(all.size(), false);
  const Bytes zeros(all.size() * static_cast<size_t>(format.width), 0);
  test_both_ways(subjects, identity(format, count, compress(format, 1, 1, {one}, {true}), pack(format, all), zeros, all, false),
                 "each element as x", false);
  test_both_ways(subjects, identity(format, 1, compress(format, count, 1, all, kept), pack(format, {one}), zeros, all, false),
                 "each element as weight", true);
  test_both_ways(subjects, identity(format, 1, compress(format, count, 1, all, none), pack(format, {one}), pack(format, all), all, false),
                 "each element as bias", true);

  // Whole groups: a product with the identity matrix.
  const std::vector<uint64_t> finite = patterns(format, true, brief);
  const int64_t groups = static_cast<int64_t>(finite.size()) / kGroup;
  std::vector<uint64_t> unit(kGroup * kGroup, 0);
  std::vector<bool> diagonal(kGroup * kGroup, false);
  for (size_t i = 0; i < kGroup; ++i) {
    unit[i * kGroup + i] = one;
    diagonal[i * kGroup + i] = true;
  }
  test_both_ways(subjects,
                 identity(format, groups, compress(format, kGroup, kGroup, unit, diagonal), pack(format, finite), zeros, finite, false),
                 "groups of elements as x", false);
  test_both_ways(subjects,
                 identity(format, kGroup, compress(format, groups, kGroup, finite, std::vector<bool>(finite.size(), true)),
                          pack(format, unit), zeros, finite, true),
                 "groups of elements as weight", false);
}

// Sums next to and between every two neighbours of the format: element + step * x, which a float holds.
void test_rounding(const Subjects& subjects, const Format& format, bool brief) {
  const std::vector<uint64_t> elements = patterns(format, true, brief);
  const int64_t rows = static_cast<int64_t>(elements.size());
  const double little = std::ldexp(1, format.mantissa - 23);
  const double fractions[][2] = {{0, 0},    {0.25, 0},      {0.5, 0},        {0.75, 0},   {0.5, little},    {0.5, -little},
                                 {-0.5, 0}, {-0.5, little}, {-0.5, -little}, {0, little}, {-0.75, -little}, {1, 0}};
  for (const bool biased : {false, true}) {  // the element comes from the weight, or from the bias
    std::vector<uint64_t> w, x;
    std::vector<bool> kept;
    for (const uint64_t bits : elements) {
      const uint64_t step = format.encode(format.step(format.decode(bits)));
      w.insert(w.end(), {biased ? 0 : bits, step, step});
      kept.insert(kept.end(), {!biased, true, true});
    }
    Problem problem{format, 0, compress(format, rows, 3, w, kept), {}, pack(format, elements), {}, {}, {}, {}};
    for (const auto& fraction : fractions) {
      x.insert(x.end(), {format.encode(1), format.encode(fraction[0]), format.encode(fraction[1])});
      ++problem.m;
      for (const uint64_t bits : elements) {
        const double value = format.decode(bits), step = format.step(value);
        const double sum = value + step * fraction[0] + step * fraction[1];
        const double summed = kFormats[cpu::kFloat32].decode(kFormats[cpu::kFloat32].encode(sum));
        problem.y.push_back(std::isinf(summed) ? summed : sum);
        problem.slack.push_back(summed == sum || std::isinf(summed) ? 0 : step);
        problem.flushed.push_back(std::fabs(value) < std::ldexp(1, -100) ? 2 * std::fabs(value) + 2 * step : problem.slack.back());
      }
    }
    problem.x = pack(format, x);
    problem.y_biased = problem.y;
    test_both_ways(subjects, problem, "sums between elements", biased);
  }
}

}  // namespace

void bitmask::testing::test_linear(bool brief) {
  const Subjects subjects = runnable_subjects(&Kernels::linear);
  int64_t most_m = 0;
  for (const auto& subject : subjects) {
    most_m = std::max({most_m, 2 * subject->kernels.panel_rows + 1, subject->kernels.streaming_rows + 1});
  }
  for (const Format& format : kFormats) {
    test_products(subjects, format, most_m, brief);
    test_widening(subjects, format, brief || kSanitized);  // sanitizers look at memory, not at numbers
    if (format.width == 2) test_rounding(subjects, format, brief || kSanitized);
  }
  for (const auto& subject : subjects) test_linear_faults(*subject, brief);
}
