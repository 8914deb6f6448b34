// What the tests of the linear launchers share: products in double precision, and weights that are faulty.
//
// Most numbers are small integers: their sums are exact in any order, so that every bit of y is known and one weight in the wrong place
// shows.
#pragma once

#include <algorithm>
#include <optional>

#include "../../csrc/cuda/kernels.h"
#include "../native/linear_calls.h"
#include "testing.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#define BITMASK_SANITIZED 1
#endif
#endif

namespace bitmask::testing {

// A weight, x and a bias.
struct LinearProblem {
  cuda::LinearDtype dtype;
  int64_t m;
  Weight weight;
  std::vector<uint64_t> x, bias;
  bool exact;

  const Format& format() const { return kFormats[dtype]; }
  int64_t values() const { return static_cast<int64_t>(weight.values.size()) / format().width; }
};

inline LinearProblem make_problem(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, double density, Numbers numbers) {
  const Format& format = kFormats[dtype];
  std::vector<uint64_t> w(static_cast<size_t>(rows * cols)), x(static_cast<size_t>(m * cols)), bias(static_cast<size_t>(rows));
  std::vector<bool> kept;
  for (uint64_t& element : w) {
    kept.push_back(static_cast<double>(random_below(1 << 20)) < density * (1 << 20));
    element = kept.back() ? random_element(format, numbers, 16, false) : 0;
  }
  for (uint64_t& element : x) element = random_element(format, numbers, 15, true);
  for (uint64_t& element : bias) element = random_element(format, numbers, 100, false);
  return {dtype, m, compress(format, rows, cols, w, kept), x, bias, numbers != kReals};
}

// The elements of a row of a weight, or nothing if it is faulty.
inline std::optional<std::vector<double>> decode_row(const LinearProblem& problem, int64_t row) {
  const Format& format = problem.format();
  const Weight& weight = problem.weight;
  const int64_t row_bytes = bitmask_bytes(weight.cols), start = weight.row_offsets[static_cast<size_t>(row)];
  const int64_t next = row + 1 < weight.rows ? weight.row_offsets[static_cast<size_t>(row + 1)] : problem.values();
  const uint8_t* const bits = weight.bitmasks.data() + row * row_bytes;
  const bool placed = start >= 0 && start <= next && next <= problem.values() && (row > 0 || start == 0);
  if (!placed || next - start != count_reference(bits, row_bytes)) return std::nullopt;
  std::vector<double> elements;
  const uint8_t* value = weight.values.data() + start * format.width;
  for (int64_t col = 0; col < 8 * row_bytes; ++col) {
    const bool there = bit(bits, col);
    if (col >= weight.cols && there) return std::nullopt;
    if (col < weight.cols) elements.push_back(there ? format.decode(format.load(value)) : 0);
    if (there) value += format.width;
  }
  return elements;
}

// Checks the column of y that belongs to a row of the weight -> how many numbers are wrong. A faulty row gives NaN.
inline int64_t check_row(const LinearProblem& problem, const std::vector<double>& x, const Bytes& y, int64_t row, bool biased) {
  const Format& format = problem.format();
  const int64_t rows = problem.weight.rows, cols = problem.weight.cols;
  const double bias = biased ? format.decode(problem.bias[static_cast<size_t>(row)]) : 0;
  const auto w = decode_row(problem, row);
  int64_t wrong = 0;
  for (int64_t i = 0; i < problem.m; ++i) {
    double sum = w ? bias : NAN, magnitude = std::fabs(bias);
    for (int64_t col = 0; w && col < cols; ++col) {
      const double product = x[static_cast<size_t>(i * cols + col)] * (*w)[static_cast<size_t>(col)];
      sum += product;
      magnitude += std::fabs(product);
    }
    const double expected = problem.exact ? format.decode(format.encode(sum)) : sum;
    const bool rounded = !problem.exact && std::isfinite(magnitude);
    const double slack = rounded ? std::ldexp(magnitude, -23) * static_cast<double>(cols + 4) + format.step(magnitude) : 0;
    const double got = format.decode(format.load(y.data() + (i * rows + row) * format.width));
    if (std::isnan(expected) ? std::isnan(got) : got == expected || std::fabs(got - expected) <= slack) continue;
    if (wrong++ == 0) check(false, "x row %" PRId64 ", row %" PRId64 ": %g instead of %g", i, row, got, expected);
  }
  return wrong;
}

inline void check_answers(const LinearProblem& problem, const Bytes& y, bool biased) {
  const std::vector<double> x = decode(problem.format(), problem.x);
  int64_t wrong = 0;
  for (int64_t row = 0; row < problem.weight.rows && wrong == 0; ++row) wrong += check_row(problem, x, y, row, biased);
  check(wrong == 0, "wrong");
}

// Bars the bytes before a buffer's data, in eights, where AddressSanitizer is watching: its red zone begins before them.
class Barrier {
 public:
  Barrier(const uint8_t* data, int skew) : begin_(data - (data == nullptr ? 0 : skew)), bytes_(data == nullptr ? 0 : skew / 8 * 8) {
#if BITMASK_SANITIZED
    __asan_poison_memory_region(begin_, static_cast<size_t>(bytes_));
#endif
  }
  ~Barrier() {
#if BITMASK_SANITIZED
    __asan_unpoison_memory_region(begin_, static_cast<size_t>(bytes_));
#endif
  }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

 private:
  [[maybe_unused]] const uint8_t* begin_;
  [[maybe_unused]] int bytes_;
};

struct Skews {
  int values, bitmasks, x, y;  // bytes off a cache line
};
constexpr Skews kAligned{0, 0, 0, 0};

// A kernel under test.
struct LinearKernel {
  const char* name;
  cudaError_t (*launch)(const cuda::LinearParams&, const cuda::Device&, void*, cudaStream_t);
  int64_t (*workspace_bytes)(const cuda::LinearParams&, const cuda::Device&);
};

// y in memory of its own; checks that nothing was written outside.
inline Bytes run_linear(const LinearKernel& kernel, const LinearProblem& problem, const cuda::Device& device, bool biased,
                        const Skews& skews) {
  const Weight& weight = problem.weight;
  Buffer values(weight.values, skews.values), bitmasks(weight.bitmasks, skews.bitmasks), offsets(weight.rows * 8);
  if (weight.rows > 0) std::memcpy(offsets.data(), weight.row_offsets.data(), weight.row_offsets.size() * 8);
  Buffer x(pack(problem.format(), problem.x), skews.x), bias(pack(problem.format(), problem.bias), skews.x);
  Buffer y(problem.m * weight.rows * problem.format().width, skews.y);
  const Barrier before_values(values.data(), skews.values), before_bitmasks(bitmasks.data(), skews.bitmasks), before_x(x.data(), skews.x);
  const BitmaskMatrix w{values.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(offsets.data()),
                        weight.rows,   weight.cols,     problem.values()};
  const cuda::LinearParams params{w, x.data(), biased ? bias.data() : nullptr, y.data(), problem.m, problem.dtype};
  Buffer workspace(kernel.workspace_bytes(params, device));
  twin::properties.multiprocessors = device.multiprocessors;
  twin::properties.shared_bytes = device.shared_bytes;
  const cudaError_t error = kernel.launch(params, device, workspace.data(), nullptr);
  twin::properties = {};
  check(error == cudaSuccess, "returns %d", static_cast<int>(error));
  check(y.canaries_intact() && workspace.canaries_intact(), "writes outside");
  return y.bytes();
}

inline void test_kernel(const LinearKernel& kernel, const LinearProblem& problem, const cuda::Device& device, bool biased,
                        const Skews& skews = kAligned) {
  place = std::string(kernel.name) + " " + problem.format().name + " m " + std::to_string(problem.m) + " [" +
          std::to_string(problem.weight.rows) + ", " + std::to_string(problem.weight.cols) + "] values " +
          std::to_string(problem.values()) + ", " + std::to_string(device.multiprocessors) + " processors, bias " + std::to_string(biased);
  check_answers(problem, run_linear(kernel, problem, device, biased, skews), biased);
}

template <typename T, size_t kCount>
T any_of(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

// Changes something of a weight, such that one row or a few may be faulty.
inline void mutate(LinearProblem& problem) {
  Weight& weight = problem.weight;
  const int64_t nnz = problem.values();
  const int64_t odd_offsets[] = {-1, 1, nnz, nnz + 1, nnz - 1, INT64_MIN, INT64_MAX, int64_t{1} << 40, random_below(nnz + 1)};
  const size_t row = static_cast<size_t>(random_below(weight.rows));
  const int64_t bytes = static_cast<int64_t>(weight.bitmasks.size());
  const size_t byte = static_cast<size_t>(random_below(bytes));
  switch (random_below(6)) {
    case 0:
      weight.row_offsets[row] = any_of(odd_offsets);
      break;
    case 1:
      weight.row_offsets[row] += random_below(5) - 2;
      break;
    case 2:
      weight.bitmasks[byte] = static_cast<uint8_t>(weight.bitmasks[byte] ^ 1 << random_below(8));
      break;
    case 3:  // as many bits as before, perhaps: still honest, or padding
      std::swap(weight.bitmasks[byte], weight.bitmasks[static_cast<size_t>(random_below(bytes))]);
      break;
    case 4:
      std::fill(weight.bitmasks.begin() + static_cast<int64_t>(byte), weight.bitmasks.end(), uint8_t{0xff});
      break;
    default:
      weight.values.resize(static_cast<size_t>(problem.format().width * std::max<int64_t>(0, nnz + random_below(5) - 3)));
  }
}

}  // namespace bitmask::testing
