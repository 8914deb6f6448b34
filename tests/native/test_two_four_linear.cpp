// Tests the 2:4 products: every kernel table that this machine can run, every dtype, against dense products in double precision.
//
// Most numbers are small integers, or those times the smallest subnormal: their sums are exact in any order, so that every bit of y is
// known and one weight in the wrong place shows. Nothing is assumed of how a table packs, nor of how many rows it takes at a time.
#include "products.h"

using namespace bitmask;
using namespace bitmask::testing;

namespace {

using cpu::LinearKernels;
using cpu::TwoFourLinearKernels;
using Subject = SubjectOf<TwoFourLinearKernels>;

// ---------------------------------------------------------------------------------------------------------------- problems

constexpr uint8_t kPairs[] = {0x3, 0x5, 0x6, 0x9, 0xa, 0xc};  // nibbles with two bits

struct Weight {
  int64_t rows, cols;
  Bytes values, metadata;
};

void set_nibble(Weight& weight, int64_t row, int64_t four, unsigned nibble) {
  uint8_t& byte = weight.metadata[static_cast<size_t>(row * bitmask_bytes(weight.cols) + four / 2)];
  byte = static_cast<uint8_t>(four % 2 == 0 ? (byte & 0xf0) | nibble : (byte & 0x0f) | nibble << 4);
}

bool stored(const Weight& weight, int64_t row, int64_t col) { return bit(weight.metadata.data() + row * bitmask_bytes(weight.cols), col); }

// `values` [rows, cols / 2] at random places of each four.
Weight make_weight(const Format& format, int64_t rows, int64_t cols, const std::vector<uint64_t>& values) {
  Weight weight{rows, cols, pack(format, values), Bytes(static_cast<size_t>(rows * bitmask_bytes(cols)), 0)};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t four = 0; four < cols / 4; ++four) set_nibble(weight, row, four, kPairs[random_below(6)]);
  }
  return weight;
}

std::vector<double> dense(const Weight& weight, const std::vector<double>& values) {
  std::vector<double> elements(static_cast<size_t>(weight.rows * weight.cols), 0);
  size_t next = 0;
  for (int64_t at = 0; at < weight.rows * weight.cols; ++at) {
    if (stored(weight, at / weight.cols, at % weight.cols)) elements[static_cast<size_t>(at)] = values[next++];
  }
  return elements;
}

// y = x W^T + bias.
struct Problem {
  Format format;
  int64_t m;
  Weight weight;
  std::vector<double> x_values, bias_values;
  Bytes x, bias;
  std::vector<double> y, slack, flushed;  // [m, rows], without bias: exact, how far off it may be, the same if subnormals are zero
};

Problem make_problem(const Format& format, int64_t m, int64_t rows, int64_t cols, Numbers numbers, bool finite_x) {
  const auto random = [&](int64_t count, Numbers of, int64_t bound, bool x) {
    std::vector<uint64_t> elements;
    for (int64_t i = 0; i < count; ++i) elements.push_back(random_element(format, of, bound, x));
    return elements;
  };
  const std::vector<uint64_t> values = random(rows * (cols / 2), numbers, 16, false), bias = random(rows, numbers, 100, false),
                              x = random(m * cols, numbers == kSpecials && finite_x ? kIntegers : numbers, 15, true);
  Problem problem{
      format, m, make_weight(format, rows, cols, values), decode(format, x), decode(format, bias), pack(format, x), pack(format, bias), {},
      {},     {}};
  const std::vector<double> w = dense(problem.weight, decode(format, values));
  for (int64_t at = 0; at < m * rows; ++at) {
    const double *const a = problem.x_values.data() + at / rows * cols, *const b = w.data() + at % rows * cols;
    double sum = 0, magnitude = std::fabs(problem.bias_values[static_cast<size_t>(at % rows)]);
    for (int64_t col = 0; col < cols; ++col) {
      sum += a[col] * b[col];
      magnitude += std::fabs(a[col] * b[col]);
    }
    const double rounding = std::ldexp(magnitude, -format.sum_mantissa) * static_cast<double>(cols + 4) + format.step(magnitude);
    problem.y.push_back(sum);
    problem.slack.push_back(numbers == kReals ? rounding : 0);
    problem.flushed.push_back(numbers == kTiny ? magnitude : problem.slack.back());
  }
  return problem;
}

// ---------------------------------------------------------------------------------------------------------------- calls

enum Way { kStream, kMultiply };
constexpr const char* kWayNames[] = {"stream", "multiply"};

struct Call {
  Way way;
  int64_t m, begin, end;
  bool biased;
  int skew;
};

// The kernels of one table for one dtype: 2:4 products take x as the bitmask's pack it, where it has few rows.
struct Kernels24 {
  Subject& subject;
  const LinearKernels& linear;
};

bool all_finite(const double* x, int64_t count) {
  return std::all_of(x, x + count, [](double element) { return std::isfinite(element); });
}

// Packs `m` rows of x, those of multiply in pieces; what is returned is checked.
void pack_rows(const Kernels24& kernels, const Problem& problem, const Call& call, int64_t first, int64_t m, Buffer& packed) {
  const TwoFourLinearKernels& tiled = kernels.subject.kernels;
  const int64_t cols = problem.weight.cols, row_bytes = cols * problem.format.width;
  const int64_t step = call.way == kStream ? m : tiled.tile_rows * (1 + random_below(3));
  for (int64_t i = 0; i < m; i += step) {
    const int64_t rows = std::min(step, m - i);
    const uint8_t* const from = problem.x.data() + (first + i) * row_bytes;
    const Bytes bytes(from, from + rows * row_bytes);
    Buffer x(bytes, call.skew);
    if (call.way == kStream) {
      kernels.linear.pack_rows(x.data(), rows, cols, packed.data());
    } else {
      uint8_t* const tiles = packed.data() == nullptr ? nullptr : packed.data() + tiled.tiles_bytes(i, cols);
      const bool finite = tiled.pack_tiles(x.data(), rows, cols, tiles);
      check(finite == all_finite(problem.x_values.data() + (first + i) * cols, rows * cols), "pack_tiles: finite is %d", finite);
    }
    check(x.bytes() == bytes, "%s: packing writes to x", kWayNames[call.way]);
  }
  check(packed.canaries_intact(), "%s: packing writes outside", kWayNames[call.way]);
}

// Does the call in pieces that the kernels take, into y [call.m, rows] -> the faulty row, or the end.
int64_t run(const Kernels24& kernels, const Problem& problem, const Call& call, Buffer& y) {
  const TwoFourLinearKernels& tiled = kernels.subject.kernels;
  const Weight& weight = problem.weight;
  const int64_t width = problem.format.width, most = call.way == kStream ? tiled.streaming_rows : tiled.most_rows;
  Buffer values(weight.values, call.skew), metadata(weight.metadata, call.skew), bias(problem.bias, call.skew);
  const TwoFourMatrix w{values.data(), metadata.data(), weight.rows, weight.cols};
  const void* const offsets = call.biased ? bias.data() : nullptr;
  int64_t got = call.end;
  for (int64_t i = 0, m = 0; i < call.m && got == call.end; i += m) {
    m = std::min(call.m - i, most);
    Buffer packed(call.way == kStream ? m * ((weight.cols + kGroup - 1) / kGroup) * kernels.linear.group_bytes
                                      : tiled.tiles_bytes(m, weight.cols));
    pack_rows(kernels, problem, call, i, m, packed);
    poison_scratch(kernels.subject);
    uint8_t* const rows = y.data() + i * weight.rows * width;
    got = call.way == kStream ? tiled.stream(w, call.begin, call.end, packed.data(), m, offsets, rows)
                              : tiled.multiply(w, call.begin, call.end, packed.data(), m, offsets, rows, kernels.subject.scratch.data());
  }
  check(!written_outside(y, weight.rows * width, call.begin * width, call.end * width),
        "%s: m %" PRId64 ", rows %" PRId64 " to %" PRId64 ": writes outside", kWayNames[call.way], call.m, call.begin, call.end);
  check(kernels.subject.scratch.canaries_intact(), "%s: writes outside of its scratch memory", kWayNames[call.way]);
  return got;
}

void test_call(const Kernels24& kernels, const Problem& problem, const Call& call) {
  const Format& format = problem.format;
  const int64_t rows = problem.weight.rows;
  Buffer y(call.m * rows * format.width, call.skew);
  const int64_t got = run(kernels, problem, call, y);
  Mismatches wrong;
  for (int64_t i = 0; i < call.m && got == call.end; ++i) {
    for (int64_t row = call.begin; row < call.end; ++row) {
      const size_t at = static_cast<size_t>(i * rows + row);
      const double offset = call.biased ? problem.bias_values[static_cast<size_t>(row)] : 0;
      wrong.compare(format, y.data() + (i * rows + row) * format.width, problem.y[at] + offset,
                    (kernels.subject.flushes ? problem.flushed : problem.slack)[at], i, row);
    }
  }
  check(got == call.end && wrong.count == 0,
        "%s: m %" PRId64 ", rows %" PRId64 " to %" PRId64 ", bias %d, skew %d: returns %" PRId64 ", %" PRId64 " wrong, first [%" PRId64
        ", %" PRId64 "]: %g instead of %g",
        kWayNames[call.way], call.m, call.begin, call.end, call.biased, call.skew, got, wrong.count, wrong.row, wrong.col, wrong.got,
        wrong.expected);
}

// ---------------------------------------------------------------------------------------------------------------- products

void set_place(const Subject& subject, const Weight& weight, const std::string& what) {
  place = std::string(subject.isa) + " 2:4 linear " + subject.format.name + " [" + std::to_string(weight.rows) + ", " +
          std::to_string(weight.cols) + "] " + what;
}

// Calls body(kernels) for each table that has this dtype and way.
template <class Body>
void for_each_table(const SubjectsOf<TwoFourLinearKernels>& subjects, const SubjectsOf<LinearKernels>& linear, const Format& format,
                    const Body& body) {
  for (size_t i = 0; i < subjects.size(); ++i) {
    if (subjects[i]->format.name == format.name) body(Kernels24{*subjects[i], linear[i]->kernels});
  }
}

// What a table can do with x: nothing where it has no such kernel, and multiply wants it finite.
bool takes(const TwoFourLinearKernels& kernels, const Problem& problem, Way way, int64_t m) {
  if (way == kStream) return m <= kernels.streaming_rows;
  return kernels.multiply != nullptr && all_finite(problem.x_values.data(), m * problem.weight.cols);
}

// All rows of the weight and some of them by turns.
void test_problem(const Kernels24& kernels, const Problem& problem, const std::string& what, const std::vector<int64_t>& ms) {
  const int64_t rows = problem.weight.rows;
  set_place(kernels.subject, problem.weight, what);
  int64_t turn = 0;
  for (const Way way : {kStream, kMultiply}) {
    for (const int64_t m : ms) {
      if (m > problem.m || !takes(kernels.subject.kernels, problem, way, m)) continue;
      const bool part = turn % 4 >= 2;
      const int64_t begin = part ? random_below(rows + 1) : 0, end = part ? begin + random_below(rows - begin + 1) : rows;
      test_call(kernels, problem, {way, m, begin, end, turn % 2 == 1, kSkews[turn % 3]});
      ++turn;
    }
  }
}

std::vector<int64_t> up_to(int64_t most) {
  std::vector<int64_t> ms;
  for (int64_t m = 1; m <= most; ++m) ms.push_back(m);
  return ms;
}

// One infinity or NaN is seen wherever it is; the largest numbers are finite.
void test_finite(const Kernels24& kernels) {
  const TwoFourLinearKernels& tiled = kernels.subject.kernels;
  const Format& format = kernels.subject.format;
  if (tiled.pack_tiles == nullptr) return;
  const uint64_t odd[] = {format.infinity(), format.infinity() | format.sign(), format.infinity() + 1, ~uint64_t{0}};
  for (const int64_t cols : {4, 12, 60, 132}) {
    const int64_t m = tiled.tile_rows + 3;
    for (int64_t at = -1; at < m * cols; at += at < m * cols - 40 ? 7 : 1) {
      std::vector<uint64_t> elements;
      for (int64_t i = 0; i < m * cols; ++i) elements.push_back((format.infinity() - 1) | (random_below(2) == 0 ? format.sign() : 0));
      if (at >= 0) elements[static_cast<size_t>(at)] = odd[random_below(4)];
      Buffer x(pack(format, elements), kSkews[random_below(3)]), packed(tiled.tiles_bytes(m, cols));
      place =
          std::string(kernels.subject.isa) + " 2:4 linear " + format.name + " x [" + std::to_string(m) + ", " + std::to_string(cols) + "]";
      check(tiled.pack_tiles(x.data(), m, cols, packed.data()) == (at < 0), "pack_tiles: element %" PRId64 " is not finite", at);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- faults

// Some rows are made faulty: the first of them is returned, and nothing is written outside.
void test_faults(const Kernels24& kernels, const Problem& honest) {
  constexpr unsigned kFaulty[] = {0x0, 0x1, 0x8, 0x7, 0xe, 0xf};
  const int64_t rows = honest.weight.rows, cols = honest.weight.cols;
  for (int turn = 0; turn < 12; ++turn) {
    Problem problem = honest;
    int64_t first = rows;
    for (int64_t faults = 1 + random_below(3); faults > 0; --faults) {
      const int64_t row = random_below(rows);
      const bool padding = cols % 8 != 0 && random_below(3) == 0;
      const int64_t places[] = {0, cols / 4 - 1, random_below(cols / 4)};
      set_nibble(problem.weight, row, padding ? cols / 4 : places[random_below(3)], kFaulty[random_below(padding ? 5 : 6) + padding]);
      first = std::min(first, row);
    }
    const int64_t ranges[][2] = {{0, rows}, {0, first}, {first, rows}, {random_below(first + 1), rows}};
    for (const auto& [begin, end] : ranges) {
      const Way way = turn % 2 == 0 || kernels.subject.kernels.multiply == nullptr ? kStream : kMultiply;
      const int64_t m = 1 + random_below(std::min(problem.m, way == kStream ? kernels.subject.kernels.streaming_rows : problem.m));
      Buffer y(m * rows * problem.format.width);
      const int64_t got = run(kernels, problem, {way, m, begin, end, turn % 3 == 0, kSkews[turn % 3]}, y);
      check(got == std::min(first, end), "%s: rows %" PRId64 " to %" PRId64 ": returns %" PRId64 " instead of %" PRId64, kWayNames[way],
            begin, end, got, std::min(first, end));
    }
  }
}

}  // namespace

void bitmask::testing::test_two_four_linear(bool brief) {
  const auto subjects = runnable_subjects(&Kernels::two_four_linear);
  const auto linear = runnable_subjects(&Kernels::linear);
  for (const Format& format : kFormats) {
    const auto test = [&](int64_t m, int64_t rows, int64_t cols, Numbers numbers, bool finite_x, const std::vector<int64_t>& ms) {
      const Problem problem = make_problem(format, m, rows, cols, numbers, finite_x);
      for_each_table(subjects, linear, format,
                     [&](const Kernels24& kernels) { test_problem(kernels, problem, kNumberNames[numbers], ms); });
    };
    for (const int64_t cols : {0, 4, 8, 12, 28, 60, 64, 68, 124, 132, 200, 508, 516, 1028, 1100, 2052}) {
      for (const int64_t rows : {1, 2, 5, 16, 33, 131, 301}) {
        if (rows * cols > (brief ? 5000 : 70000)) continue;
        const bool small = rows * cols < (brief ? 100 : 2000);
        test(40, rows, cols, kIntegers, true, small && !kSanitized ? up_to(40) : std::vector<int64_t>{1, 2, 5, 8, 12, 13, 33, 40});
      }
      for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
        for (const bool finite_x : {true, false}) test(26, cols > 1000 ? 3 : 37, cols, numbers, finite_x, {1, 3, 8, 9, 26});
      }
    }
    for_each_table(subjects, linear, format, test_finite);
    test(1033, 3, 68, kIntegers, true, {505, 1031, 1032, 1033});
    if (!brief) test(1033, 133, 132, kReals, true, {1031, 1033});
    for (const int64_t cols : {4, 12, 64, 516, 1100}) {
      const Problem honest = make_problem(format, 13, 40, cols, kIntegers, true);
      for_each_table(subjects, linear, format, [&](const Kernels24& kernels) {
        set_place(kernels.subject, honest.weight, "faults");
        test_faults(kernels, honest);
      });
    }
  }
}
