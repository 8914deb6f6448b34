// Tests the gradient of x, y = g W: every kernel table that this machine can run, every dtype, against dense products in double precision;
// then with weights that nobody proved, of which y may be anything, but which must not make it read or write outside.
//
// Integers and multiples of the smallest subnormal have sums that are exact in any order, so every bit of y is known.
#include "linear_calls.h"
#include "linear_faults.h"

using namespace bitmask;
using namespace bitmask::testing;

namespace {

// ---------------------------------------------------------------------------------------------------------------- calls

// The columns [begin, end), for `m` rows of g.
struct GradientCall {
  int64_t m, begin, end;
  int skew;
};

// Does the call into y [call.m, cols], with all other memory poisoned. False if it does not return `expected` or writes outside of y's
// columns.
bool run(const Subject& subject, Buffer& scratch, const Weight& weight, const Bytes& g, const GradientCall& call, int64_t expected,
         Buffer& y) {
  const LinearKernels& kernels = subject.kernels;
  const int64_t width = subject.format.width, g_row = weight.rows * width, y_row = weight.cols * width;
  const int64_t panels = (call.m + kernels.panel_rows - 1) / kernels.panel_rows;
  const int64_t panel_bytes = (weight.rows + kGroup - 1) / kGroup * kernels.panel_rows * kernels.gradient_group_bytes;
  const Bytes used(g.begin(), g.begin() + call.m * g_row);
  Buffer given(used, call.skew), packed(Bytes(static_cast<size_t>(panels * panel_bytes), 0xff));
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t i = panel * kernels.panel_rows;
    kernels.pack_gradient(given.data() + i * g_row, std::min(kernels.panel_rows, call.m - i), weight.rows,
                          packed.data() + panel * panel_bytes);
  }
  check(packed.canaries_intact() && given.bytes() == used, "packing writes outside");

  Stored stored(weight, subject.format.width, call.skew);
  const Bytes lanes = packed.bytes();
  Buffer readers(Bytes(static_cast<size_t>(weight.rows * kernels.reader_bytes), 0xff));
  std::memset(scratch.data(), 0xff, static_cast<size_t>(kernels.gradient_scratch_bytes));
  const int64_t got =
      kernels.multiply_transposed(stored.matrix, call.begin, call.end, packed.data(), call.m, y.data(), readers.data(), scratch.data());
  const bool outside = written_outside(y, y_row, call.begin * width, call.end * width) || !readers.canaries_intact() ||
                       !scratch.canaries_intact() || packed.bytes() != lanes;
  check(!outside, "m %" PRId64 ", columns %" PRId64 " to %" PRId64 ": writes outside", call.m, call.begin, call.end);
  check(got == expected, "m %" PRId64 ", columns %" PRId64 " to %" PRId64 ": returns %" PRId64 " instead of %" PRId64, call.m, call.begin,
        call.end, got, expected);
  return !outside && got == expected;
}

// Some columns, from the beginning of a group on.
GradientCall some_columns(int64_t m, int64_t cols, int skew) {
  const int64_t begin = random_below(cols / kGroup + 1) * kGroup;
  return {m, begin, begin + random_below(cols - begin + 1), skew};
}

void set_gradient_place(const Subject& subject, const Weight& weight, const std::string& what) {
  set_place(subject, weight, "gradient, " + what);
}

// ---------------------------------------------------------------------------------------------------------------- products

// y = g W.
struct Gradient {
  Format format;
  int64_t m;
  Weight weight;
  Bytes g;
  std::vector<double> y, slack;  // [m, cols], and how far each may be off
};

Gradient make_gradient(const Format& format, int64_t m, int64_t rows, int64_t cols, double density, Numbers numbers) {
  std::vector<uint64_t> w(static_cast<size_t>(rows * cols)), g(static_cast<size_t>(m * rows));
  std::vector<bool> kept;
  for (uint64_t& element : w) {
    kept.push_back(static_cast<double>(random_below(1 << 20)) < density * (1 << 20));
    element = kept.back() ? random_element(format, numbers, 16, false) : 0;
  }
  for (uint64_t& element : g) element = random_element(format, numbers, 15, true);
  const std::vector<double> factors = decode(format, g), weights = decode(format, w);
  const size_t size = static_cast<size_t>(m * cols);
  std::vector<double> y(size, 0), magnitudes(size, 0), slack(size, 0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      const double factor = factors[static_cast<size_t>(i * rows + row)];
      for (int64_t col = 0; col < cols; ++col) {
        const double product = factor * weights[static_cast<size_t>(row * cols + col)];
        y[static_cast<size_t>(i * cols + col)] += product;
        magnitudes[static_cast<size_t>(i * cols + col)] += std::fabs(product);
      }
    }
  }
  for (size_t at = 0; at < size && numbers == kReals; ++at) {
    slack[at] = std::ldexp(magnitudes[at], -format.sum_mantissa) * static_cast<double>(rows + 4) + format.step(magnitudes[at]);
  }
  return {format, m, compress(format, rows, cols, w, kept), pack(format, g), y, slack};
}

void test_call(const Subject& subject, Buffer& scratch, const Gradient& gradient, const GradientCall& call) {
  const Format& format = subject.format;
  const int64_t cols = gradient.weight.cols;
  Buffer y(call.m * cols * format.width, call.skew);
  if (!run(subject, scratch, gradient.weight, gradient.g, call, gradient.weight.rows, y)) return;
  Mismatches wrong;
  for (int64_t i = 0; i < call.m; ++i) {
    for (int64_t col = call.begin; col < call.end; ++col) {
      const int64_t at = i * cols + col;
      const size_t index = static_cast<size_t>(at);
      wrong.compare(format, y.data() + at * format.width, gradient.y[index], gradient.slack[index], i, col);
    }
  }
  check(wrong.count == 0,
        "m %" PRId64 ", columns %" PRId64 " to %" PRId64 ", skew %d: %" PRId64 " wrong, first [%" PRId64 ", %" PRId64 "]: %g instead of %g",
        call.m, call.begin, call.end, call.skew, wrong.count, wrong.row, wrong.col, wrong.got, wrong.expected);
}

// For each number of rows of g in `ms`, all columns and some of them by turns.
void test_gradient(const Subjects& subjects, const Gradient& gradient, const std::string& what,
                   std::vector<int64_t> (*ms)(const LinearKernels&)) {
  const int64_t cols = gradient.weight.cols;
  for (const auto& subject : subjects) {
    if (subject->format.name != gradient.format.name) continue;
    set_gradient_place(*subject, gradient.weight, what);
    Buffer scratch(subject->kernels.gradient_scratch_bytes);
    int turn = 0;
    for (const int64_t m : ms(subject->kernels)) {
      if (m > gradient.m) continue;
      const int skew = kSkews[turn % 3];
      test_call(*subject, scratch, gradient, turn % 2 == 0 ? GradientCall{m, 0, cols, skew} : some_columns(m, cols, skew));
      ++turn;
    }
  }
}

// Every number of rows up to two panels and one.
std::vector<int64_t> every_m(const LinearKernels& kernels) {
  std::vector<int64_t> ms;
  for (int64_t m = 1; m <= 2 * kernels.panel_rows + 1; ++m) ms.push_back(m);
  return ms;
}

// Twice each, for all columns and for some.
std::vector<int64_t> few_m(const LinearKernels& kernels) { return {1, 1, kernels.panel_rows + 1, kernels.panel_rows + 1}; }

// As many as a call takes and one less, twice each.
std::vector<int64_t> most_m(const LinearKernels& kernels) {
  return {kernels.block_rows - 1, kernels.block_rows - 1, kernels.block_rows, kernels.block_rows};
}

void test_gradients(const Subjects& subjects, const Format& format, bool brief) {
  int64_t two_panels = 0, few = 0, most = 0;
  for (const auto& subject : subjects) {
    two_panels = std::max(two_panels, 2 * subject->kernels.panel_rows + 1);
    few = std::max(few, subject->kernels.panel_rows + 1);
    most = std::max(most, subject->kernels.block_rows);
  }
  for (const int64_t cols : {0, 1, 7, 63, 64, 65, 127, 130, 513, 1100}) {
    for (const int64_t rows : {0, 1, 2, 5, 65, 511, 512, 513, 1100}) {
      const int64_t elements = rows * cols;
      if (brief && elements > 10000) continue;
      for (const double density : {0.0, 0.1, 0.5, 1.0}) {
        if ((elements > 20000 || brief) && density != (cols == 513 ? 0.1 : 0.5)) continue;
        const bool every = density == 0.5 && elements < (brief ? 100 : 500);
        test_gradient(subjects, make_gradient(format, every ? two_panels : few, rows, cols, density, kIntegers),
                      name_of(density, kIntegers), every ? every_m : few_m);
      }
    }
    for (const Numbers numbers : {kTiny, kSpecials, kReals}) {
      for (const double density : {0.01, 0.5, 1.0}) {
        if (brief && density != 0.5) continue;
        test_gradient(subjects, make_gradient(format, few, cols == 65 ? 515 : 37, cols, density, numbers), name_of(density, numbers),
                      few_m);
      }
    }
  }
  test_gradient(subjects, make_gradient(format, most, 3, 65, 0.5, kIntegers), "many rows of g", most_m);
  if (brief) return;
  test_gradient(subjects, make_gradient(format, most, 64, 130, 0.5, kIntegers), "many rows of g", most_m);
  test_gradient(subjects, make_gradient(format, most, 515, 7, 0.5, kSpecials), "many rows of g", most_m);
}

// ---------------------------------------------------------------------------------------------------------------- faults

int64_t first_impossible(const Weight& weight, int64_t nnz) {
  for (int64_t row = 0; row < weight.rows; ++row) {
    const int64_t start = weight.row_offsets[static_cast<size_t>(row)];
    const int64_t next = row + 1 < weight.rows ? weight.row_offsets[static_cast<size_t>(row + 1)] : nnz;
    if (start < 0 || start > next || next > nnz) return row;
  }
  return weight.rows;
}

// All columns, and some.
void test_fault(const Subject& subject, Buffer& scratch, const Weight& weight, const Bytes& g) {
  const int64_t nnz = static_cast<int64_t>(weight.values.size()) / subject.format.width;
  for (const bool all : {true, false}) {
    const int64_t m = 1 + random_below(subject.kernels.panel_rows + 1);
    const int skew = kSkews[random_below(3)];
    const GradientCall call = all ? GradientCall{m, 0, weight.cols, skew} : some_columns(m, weight.cols, skew);
    Buffer y(m * weight.cols * subject.format.width);
    run(subject, scratch, weight, g, call, first_impossible(weight, nnz), y);
  }
}

void test_gradient_faults(const Subject& subject, bool brief) {
  const Format& format = subject.format;
  Buffer scratch(subject.kernels.gradient_scratch_bytes);
  for (const int64_t cols : {1, 7, 65, 130, 513, 1030}) {
    for (const int64_t rows : {1, 3, 37, 515}) {
      if (rows * cols > (brief ? 1000 : 40000) && cols > 7) continue;
      for (const double density : {0.0, 0.5, 1.0}) {
        if (brief && density == 0) continue;
        const Weight honest = random_weight(format, rows, cols, density);
        const Bytes g(static_cast<size_t>((subject.kernels.panel_rows + 1) * rows * format.width), 0);
        const int64_t nnz = static_cast<int64_t>(honest.values.size()) / format.width;
        for (const Fault& fault : kFaults) {
          set_gradient_place(subject, honest, std::string(fault.name) + ", density " + std::to_string(density).substr(0, 3));
          const int64_t candidates[] = {0, random_below(rows), rows - 1};
          Weight weight = honest;
          fault.make(weight, candidates[random_below(3)], nnz);
          test_fault(subject, scratch, weight, g);
          // A second fault.
          kFaults[random_below(sizeof(kFaults) / sizeof(Fault))].make(weight, random_below(rows), nnz);
          test_fault(subject, scratch, weight, g);
        }
        set_gradient_place(subject, honest, "values missing");
        for (const int64_t kept : {int64_t{0}, nnz / 2, nnz - 1}) {
          if (kept < 0) continue;
          Weight weight = honest;
          weight.values.resize(static_cast<size_t>(kept * format.width));
          test_fault(subject, scratch, weight, g);
          // The offsets can be, so that the rows are read as far as there are values.
          for (int64_t& start : weight.row_offsets) start = std::min(start, kept);
          test_fault(subject, scratch, weight, g);
        }
        set_gradient_place(subject, honest, "garbage");
        for (int i = 0; i < (brief ? 2 : 10); ++i) test_fault(subject, scratch, garbage(honest, format.width), g);
      }
    }
  }
}

}  // namespace

void bitmask::testing::test_linear_gradient(bool brief) {
  const Subjects subjects = runnable_subjects(&Kernels::linear);
  for (const Format& format : kFormats) test_gradients(subjects, format, brief);
  for (const auto& subject : subjects) test_gradient_faults(*subject, brief);
}
