// What the tests of the launchers for 2:4 weights share, whole or block-sparse: weights, products in double precision, faulty metadata.
//
// Most numbers are small integers: their sums are exact in any order, so that every bit of a result is known.
#pragma once

#include <iterator>
#include <optional>

#include "block_problems.h"

namespace bitmask::testing {

// The masks of a group that are sound.
constexpr uint8_t kGroups[] = {3, 5, 6, 9, 10, 12};

// A weight, what multiplies it, and a bias. A whole weight is one block, of all of its rows and columns.
struct TwoFourProblem {
  cuda::LinearDtype dtype;
  int64_t m, rows, cols, block_rows, block_cols;
  std::optional<IndexParts> index;  // none: 2:4 as a whole
  Bytes metadata;
  std::vector<uint64_t> values, x, bias;
  bool exact;

  const Format& format() const { return kFormats[dtype]; }
  int64_t blocks() const { return index ? index->blocks() : 1; }
  int64_t row_bytes() const { return bitmask_bytes(block_cols); }  // of the metadata of a row of a block
};

// The metadata of a row that has `cols` columns.
inline Bytes random_groups(int64_t cols) {
  Bytes bytes(static_cast<size_t>(bitmask_bytes(cols)));
  for (int64_t group = 0; group < cols / 4; ++group) {
    bytes[static_cast<size_t>(group / 2)] |= static_cast<uint8_t>(kGroups[random_below(std::size(kGroups))] << (4 * (group % 2)));
  }
  return bytes;
}

// The blocks' metadata, then their values; x and the bias. Elements past the edges of W are NaN, because nothing may come of them.
inline void fill(TwoFourProblem& problem, Numbers numbers) {
  const Format& format = problem.format();
  for (int64_t block = 0, line = 0; block < problem.blocks(); ++block) {
    while (problem.index && problem.index->starts[static_cast<size_t>(line + 1)] <= block) ++line;
    const int64_t first_row = line * problem.block_rows;
    const int64_t first_col = problem.index ? problem.index->positions[static_cast<size_t>(block)] * problem.block_cols : 0;
    for (int64_t row = 0; row < problem.block_rows; ++row) {
      const Bytes bits = random_groups(problem.block_cols);
      for (int64_t col = 0; col < problem.block_cols; ++col) {
        if (!bit(bits.data(), col)) continue;
        const bool past = first_row + row >= problem.rows || first_col + col >= problem.cols;
        problem.values.push_back(past ? format.encode(NAN) : random_element(format, numbers, 16, false));
      }
      problem.metadata.insert(problem.metadata.end(), bits.begin(), bits.end());
    }
  }
  problem.x.resize(static_cast<size_t>(problem.m * problem.cols));
  problem.bias.resize(static_cast<size_t>(problem.rows));
  for (uint64_t& element : problem.x) element = random_element(format, numbers, 15, true);
  for (uint64_t& element : problem.bias) element = random_element(format, numbers, 100, false);
}

// 2:4 as a whole; `cols` is a multiple of 4.
inline TwoFourProblem make_two_four(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, Numbers numbers) {
  TwoFourProblem problem{dtype, m, rows, cols, rows, cols, std::nullopt, {}, {}, {}, {}, numbers != kReals};
  fill(problem, numbers);
  return problem;
}

// Kept blocks that are 2:4; `block_cols` is a multiple of 4.
inline TwoFourProblem make_two_four_blocks(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, int64_t block_rows,
                                           int64_t block_cols, double density, Numbers numbers) {
  const int64_t lines = blocks_over(rows, block_rows), limit = blocks_over(cols, block_cols);
  std::vector<bool> kept(static_cast<size_t>(lines * limit));
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = static_cast<double>(random_below(1 << 20)) < density * (1 << 20);
  TwoFourProblem problem{dtype, m, rows, cols, block_rows, block_cols, index_parts(kept, lines, limit), {}, {}, {}, {}, numbers != kReals};
  fill(problem, numbers);
  return problem;
}

// ---------------------------------------------------------------------------------------------------------------- products

struct StoredElement {
  int64_t col;  // of W
  size_t value;
};

// Appends the elements of a row of a block, whose columns begin at `first` in W -> whether its metadata are sound, those past W too.
inline bool read_stored(const TwoFourProblem& problem, int64_t block, int64_t row, int64_t first, std::vector<StoredElement>& elements) {
  const int64_t at = block * problem.block_rows + row;
  const uint8_t* const bits = problem.metadata.data() + at * problem.row_bytes();
  for (int64_t group = 0; group < 2 * problem.row_bytes(); ++group) {
    int64_t stored = 0;
    for (int64_t col = 4 * group; col < 4 * group + 4; ++col) {
      if (!bit(bits, col)) continue;
      const int64_t value = at * (problem.block_cols / 2) + 2 * group + stored++;
      if (col < problem.block_cols && first + col < problem.cols) elements.push_back({first + col, static_cast<size_t>(value)});
    }
    if (stored != (4 * group < problem.block_cols ? 2 : 0)) return false;
  }
  return true;
}

// The stored elements of a row of W, or nothing if it is faulty.
inline std::optional<std::vector<StoredElement>> read_row(const TwoFourProblem& problem, int64_t row) {
  std::vector<StoredElement> elements;
  if (!problem.index) return read_stored(problem, 0, row, 0, elements) ? std::optional(elements) : std::nullopt;
  const auto line = read_line(*problem.index, row / problem.block_rows);
  if (!line) return std::nullopt;
  for (const LineEntry& entry : *line) {
    const int64_t first = entry.position * problem.block_cols;
    if (!read_stored(problem, entry.place, row % problem.block_rows, first, elements)) return std::nullopt;
  }
  return elements;
}

// Checks y [m, rows]: elements that are not stored take no part, a faulty row gives NaN.
inline void check_two_four(const TwoFourProblem& problem, const Bytes& y, bool biased) {
  const Format& format = problem.format();
  const std::vector<double> x = decode(format, problem.x), values = decode(format, problem.values);
  Mismatches wrong;
  for (int64_t row = 0; row < problem.rows && wrong.count == 0; ++row) {
    const auto elements = read_row(problem, row);
    const double bias = biased ? format.decode(problem.bias[static_cast<size_t>(row)]) : 0;
    for (int64_t i = 0; i < problem.m; ++i) {
      double sum = elements ? bias : NAN, magnitude = std::fabs(bias);
      for (size_t j = 0; elements && j < elements->size(); ++j) {
        const double product = x[static_cast<size_t>(i * problem.cols + (*elements)[j].col)] * values[(*elements)[j].value];
        sum += product;
        magnitude += std::fabs(product);
      }
      wrong.compare(format, y.data() + (i * problem.rows + row) * format.width, sum,
                    slack_of(format, magnitude, problem.cols / 2, problem.exact, false), i, row);
    }
  }
  check(wrong.count == 0, "x row %" PRId64 ", column %" PRId64 ": %g instead of %g", wrong.row, wrong.col, wrong.got, wrong.expected);
}

// ---------------------------------------------------------------------------------------------------------------- launchers

// A launcher under test.
struct TwoFourKernel {
  const char* name;
  cudaError_t (*launch)(const cuda::TwoFourParams&, const cuda::Device&, void*, cudaStream_t);
  int64_t (*workspace_bytes)(const cuda::TwoFourParams&, const cuda::Device&);
};

struct TwoFourSkews {
  int values, metadata, x, y;  // bytes off a cache line
};

// A problem in watched memory of exactly its size.
struct StoredTwoFour {
  Buffer metadata, values, x, bias, y;
  std::optional<StoredIndex> index;
  cuda::TwoFourParams params{};

  StoredTwoFour(const TwoFourProblem& problem, bool biased, const TwoFourSkews& skews = {0, 0, 0, 0})
      : metadata(problem.metadata, skews.metadata),
        values(pack(problem.format(), problem.values), skews.values),
        x(pack(problem.format(), problem.x), skews.x),
        bias(pack(problem.format(), problem.bias), skews.y),
        y(problem.m * problem.rows * problem.format().width, skews.y) {
    if (problem.index) params.index = index.emplace(*problem.index).index;
    params.values = values.data();
    params.metadata = metadata.data();
    params.rows = problem.rows;
    params.cols = problem.cols;
    params.block_rows = problem.block_rows;
    params.block_cols = problem.block_cols;
    params.x = x.data();
    params.bias = biased ? bias.data() : nullptr;
    params.y = y.data();
    params.m = problem.m;
    params.dtype = problem.dtype;
  }
};

inline Bytes run_two_four(const TwoFourKernel& kernel, const TwoFourProblem& problem, const cuda::Device& device, bool biased,
                          const TwoFourSkews& skews = {0, 0, 0, 0}) {
  StoredTwoFour stored(problem, biased, skews);
  run_watched(kernel, stored.params, device);
  check(stored.y.canaries_intact(), "writes outside");
  return stored.y.bytes();
}

inline void set_place(const char* kernel, const TwoFourProblem& problem, const cuda::Device& device) {
  const std::string blocks = problem.index ? " blocks " + std::to_string(problem.blocks()) + " of " + std::to_string(problem.block_rows) +
                                                 " x " + std::to_string(problem.block_cols)
                                           : " whole";
  place = std::string(kernel) + " " + problem.format().name + " m " + std::to_string(problem.m) + " [" + std::to_string(problem.rows) +
          ", " + std::to_string(problem.cols) + "]" + blocks + ", " + std::to_string(device.multiprocessors) + " processors";
}

inline void test_two_four(const TwoFourKernel& kernel, const TwoFourProblem& problem, const cuda::Device& device, bool biased,
                          const TwoFourSkews& skews = {0, 0, 0, 0}) {
  set_place(kernel.name, problem, device);
  check_two_four(problem, run_two_four(kernel, problem, device, biased, skews), biased);
}

// Changes something of the metadata, such that a row or a few may be faulty, or their elements lie elsewhere.
inline void mutate_metadata(TwoFourProblem& problem) {
  if (problem.metadata.empty()) return;
  uint8_t& byte = problem.metadata[static_cast<size_t>(random_below(static_cast<int64_t>(problem.metadata.size())))];
  const int shift = random_below(2) == 0 ? 0 : 4;
  switch (random_below(3)) {
    case 0:
      byte = static_cast<uint8_t>(byte ^ 1 << random_below(8));
      break;
    case 1:  // any group: sound ones too, and those without an element, or with all of them
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | static_cast<int>(random_below(16)) << shift);
      break;
    default:
      byte = random_below(2) == 0 ? 0xff : 0x00;
  }
}

}  // namespace bitmask::testing
