// What the tests of the launchers for block-sparse weights share: weights with their index, products in double precision, faulty indices.
//
// Most numbers are small integers: their sums are exact in any order, so that every bit of a result is known.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>

#include "../../csrc/cuda/kernels.h"
#include "../native/products.h"
#include "testing.h"

namespace bitmask::testing {

constexpr int64_t blocks_over(int64_t size, int64_t block) { return (size + block - 1) / block; }

// An index in memory of its own, each part free to be wrong.
struct IndexParts {
  std::vector<int64_t> starts, positions, order;
  int64_t limit;

  int64_t lines() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t blocks() const { return static_cast<int64_t>(positions.size()); }
};

// The blocks that `kept` [lines, limit] has. `order` is empty.
inline IndexParts index_parts(const std::vector<bool>& kept, int64_t lines, int64_t limit) {
  IndexParts index{{0}, {}, {}, limit};
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t position = 0; position < limit; ++position) {
      if (kept[static_cast<size_t>(line * limit + position)]) index.positions.push_back(position);
    }
    index.starts.push_back(index.blocks());
  }
  return index;
}

// The same blocks by columns.
inline IndexParts transpose(const IndexParts& by_row) {
  IndexParts index{{0}, {}, {}, by_row.lines()};
  for (int64_t column = 0; column < by_row.limit; ++column) {
    for (int64_t row = 0; row < by_row.lines(); ++row) {
      for (int64_t i = by_row.starts[static_cast<size_t>(row)]; i < by_row.starts[static_cast<size_t>(row + 1)]; ++i) {
        if (by_row.positions[static_cast<size_t>(i)] != column) continue;
        index.positions.push_back(row);
        index.order.push_back(i);
      }
    }
    index.starts.push_back(index.blocks());
  }
  return index;
}

// The positions and places of a line, or nothing if it is faulty.
struct LineEntry {
  int64_t position, place;
};
inline std::optional<std::vector<LineEntry>> read_line(const IndexParts& index, int64_t line) {
  const int64_t begin = index.starts[static_cast<size_t>(line)], end = index.starts[static_cast<size_t>(line + 1)];
  const bool placed = begin >= 0 && begin <= end && end <= index.blocks() && (line > 0 || begin == 0);
  if (!placed || (line + 1 == index.lines() && end != index.blocks())) return std::nullopt;
  std::vector<LineEntry> entries;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t position = index.positions[static_cast<size_t>(i)], before = entries.empty() ? -1 : entries.back().position;
    const int64_t place = index.order.empty() ? i : index.order[static_cast<size_t>(i)];
    if (position <= before || position >= index.limit || place < 0 || place >= index.blocks()) return std::nullopt;
    entries.push_back({position, place});
  }
  return entries;
}

// A weight in blocks, what multiplies it, and a bias. `index` is by rows or, transposed, by columns.
struct BlockProblem {
  cuda::LinearDtype dtype;
  int64_t m, rows, cols, block_rows, block_cols;
  bool transposed;
  IndexParts index;
  std::vector<uint64_t> values, x, bias;
  bool exact;
  bool tf32 = false;

  const Format& format() const { return kFormats[dtype]; }
  int64_t depth() const { return transposed ? rows : cols; }
  int64_t across() const { return transposed ? cols : rows; }
  int64_t block_across() const { return transposed ? block_cols : block_rows; }
  int64_t block_depth() const { return transposed ? block_rows : block_cols; }
};

// The elements of blocks past the edges are NaN, because nothing may come of them.
inline BlockProblem make_blocks(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols,
                                double density, bool transposed, Numbers numbers) {
  const Format& format = kFormats[dtype];
  const int64_t lines = blocks_over(rows, block_rows), limit = blocks_over(cols, block_cols);
  std::vector<bool> kept(static_cast<size_t>(lines * limit));
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = static_cast<double>(random_below(1 << 20)) < density * (1 << 20);
  const IndexParts by_row = index_parts(kept, lines, limit);
  BlockProblem problem{
      dtype, m, rows, cols, block_rows, block_cols, transposed, transposed ? transpose(by_row) : by_row, {}, {}, {}, numbers != kReals};
  for (int64_t line = 0, block = 0; line < lines; ++line) {
    for (; block < by_row.starts[static_cast<size_t>(line + 1)]; ++block) {
      const int64_t col = by_row.positions[static_cast<size_t>(block)] * block_cols;
      for (int64_t i = 0; i < block_rows * block_cols; ++i) {
        const bool past = line * block_rows + i / block_cols >= rows || col + i % block_cols >= cols;
        problem.values.push_back(past ? format.encode(NAN) : random_element(format, numbers, 16, false));
      }
    }
  }
  problem.x.resize(static_cast<size_t>(m * problem.depth()));
  problem.bias.resize(static_cast<size_t>(problem.across()));
  for (uint64_t& element : problem.x) element = random_element(format, numbers, 15, true);
  for (uint64_t& element : problem.bias) element = random_element(format, numbers, 100, false);
  return problem;
}

// How far off a sum of this many products may be, and once more by a rounding of each operand to tf32.
inline double slack_of(const Format& format, double magnitude, int64_t terms, bool exact, bool tf32) {
  if (exact || !std::isfinite(magnitude)) return 0;
  return std::ldexp(magnitude, -format.sum_mantissa) * static_cast<double>(terms + 4) + format.step(magnitude) +
         (tf32 ? std::ldexp(magnitude, -9) : 0);
}

// Checks y [m, across]. A faulty line gives NaN.
inline void check_product(const BlockProblem& problem, const Bytes& y, bool biased) {
  const Format& format = problem.format();
  const std::vector<double> x = decode(format, problem.x), values = decode(format, problem.values);
  const int64_t across = problem.across(), depth = problem.depth();
  Mismatches wrong;
  for (int64_t column = 0; column < across && wrong.count == 0; ++column) {
    const int64_t inside = column % problem.block_across();
    const auto line = read_line(problem.index, column / problem.block_across());
    const double bias = biased ? format.decode(problem.bias[static_cast<size_t>(column)]) : 0;
    for (int64_t row = 0; row < problem.m; ++row) {
      double sum = line ? bias : NAN, magnitude = std::fabs(bias);
      for (size_t i = 0; line && i < line->size(); ++i) {
        const int64_t first = (*line)[i].position * problem.block_depth();
        const int64_t block = (*line)[i].place * problem.block_rows * problem.block_cols;
        for (int64_t j = 0; j < problem.block_depth() && first + j < depth; ++j) {
          const int64_t at = block + (problem.transposed ? j * problem.block_cols + inside : inside * problem.block_cols + j);
          const double product = x[static_cast<size_t>(row * depth + first + j)] * values[static_cast<size_t>(at)];
          sum += product;
          magnitude += std::fabs(product);
        }
      }
      wrong.compare(format, y.data() + (row * across + column) * format.width, sum,
                    slack_of(format, magnitude, depth, problem.exact, problem.tf32), row, column);
    }
  }
  check(wrong.count == 0, "x row %" PRId64 ", column %" PRId64 ": %g instead of %g", wrong.row, wrong.col, wrong.got, wrong.expected);
}

inline Bytes bytes_of(const std::vector<int64_t>& numbers) {
  const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(numbers.data());
  return Bytes(bytes, bytes + numbers.size() * 8);
}

// An index in watched memory of exactly its size.
struct StoredIndex {
  Buffer starts, positions, order;
  cuda::BlockIndex index;

  explicit StoredIndex(const IndexParts& parts)
      : starts(bytes_of(parts.starts)), positions(bytes_of(parts.positions)), order(bytes_of(parts.order)) {
    const auto numbers = [](Buffer& buffer) { return reinterpret_cast<const int64_t*>(buffer.data()); };
    index = {numbers(starts), numbers(positions), numbers(order), parts.lines(), parts.blocks(), parts.limit};
  }
};

// A launcher under test.
struct BlockKernel {
  const char* name;
  cudaError_t (*launch)(const cuda::BlockParams&, const cuda::Device&, void*, cudaStream_t);
  int64_t (*workspace_bytes)(const cuda::BlockParams&, const cuda::Device&);
};

struct BlockSkews {
  int values, x, y;  // bytes off a cache line
};

// Runs a launcher on the device that it is told of; checks that it succeeds and writes nothing outside of what it is given.
template <typename Kernel, typename Params>
void run_watched(const Kernel& kernel, const Params& params, const cuda::Device& device) {
  Buffer workspace(kernel.workspace_bytes(params, device));
  twin::properties.multiprocessors = device.multiprocessors;
  twin::properties.shared_bytes = device.shared_bytes;
  const cudaError_t error = kernel.launch(params, device, workspace.data(), nullptr);
  twin::properties = {};
  check(error == cudaSuccess, "returns %d", static_cast<int>(error));
  check(workspace.canaries_intact(), "writes outside of the workspace");
}

inline Bytes run_blocks(const BlockKernel& kernel, const BlockProblem& problem, const cuda::Device& device, bool biased,
                        const BlockSkews& skews = {0, 0, 0}, cuda::Fault fault = cuda::kNoFault) {
  const Format& format = problem.format();
  StoredIndex stored(problem.index);
  Buffer values(pack(format, problem.values), skews.values), x(pack(format, problem.x), skews.x), bias(pack(format, problem.bias), skews.x);
  Buffer y(problem.m * problem.across() * format.width, skews.y);
  cuda::BlockParams params{};
  params.index = stored.index;
  params.values = values.data();
  params.rows = problem.rows;
  params.cols = problem.cols;
  params.block_rows = problem.block_rows;
  params.block_cols = problem.block_cols;
  params.transposed = problem.transposed;
  params.x = x.data();
  params.bias = biased ? bias.data() : nullptr;
  params.y = y.data();
  params.m = problem.m;
  params.dtype = problem.dtype;
  params.tf32 = problem.tf32;
  params.fault = &fault;
  run_watched(kernel, params, device);
  check(y.canaries_intact(), "writes outside");
  return y.bytes();
}

inline void set_place(const char* kernel, const BlockProblem& problem, const cuda::Device& device) {
  place = std::string(kernel) + " " + problem.format().name + (problem.transposed ? " transposed" : "") + (problem.tf32 ? " tf32" : "") +
          " m " + std::to_string(problem.m) + " [" + std::to_string(problem.rows) + ", " + std::to_string(problem.cols) + "] blocks " +
          std::to_string(problem.index.blocks()) + " of " + std::to_string(problem.block_rows) + " x " +
          std::to_string(problem.block_cols) + ", " + std::to_string(device.multiprocessors) + " processors";
}

inline void test_blocks(const BlockKernel& kernel, const BlockProblem& problem, const cuda::Device& device, bool biased,
                        const BlockSkews& skews = {0, 0, 0}) {
  set_place(kernel.name, problem, device);
  check_product(problem, run_blocks(kernel, problem, device, biased, skews), biased);
}

// Changes something of an index, such that a line or a few may be faulty.
inline void mutate(IndexParts& index) {
  const int64_t blocks = index.blocks();
  const int64_t odd[] = {-1, 1, blocks, blocks + 1, blocks - 1, index.limit, INT64_MIN, INT64_MAX, int64_t{1} << 40};
  std::vector<int64_t>& part = blocks == 0 || random_below(2) == 0           ? index.starts
                               : index.order.empty() || random_below(2) == 0 ? index.positions
                                                                             : index.order;
  int64_t& entry = part[static_cast<size_t>(random_below(static_cast<int64_t>(part.size())))];
  entry =
      random_below(2) == 0 ? odd[random_below(std::size(odd))] : static_cast<int64_t>(static_cast<uint64_t>(entry) + random_word() % 5 - 2);
}

// The same for the gradient of values.
struct SampleKernel {
  const char* name;
  cudaError_t (*launch)(const cuda::BlockSampleParams&, const cuda::Device&, void*, cudaStream_t);
  int64_t (*workspace_bytes)(const cuda::BlockSampleParams&, const cuda::Device&);
};

// g lies where a product's x does: `problem` has x [m, rows], as if transposed; `x` is [m, cols].
struct SampleProblem {
  BlockProblem weight;
  std::vector<uint64_t> g, x;
};

inline SampleProblem make_sample(cuda::LinearDtype dtype, int64_t m, int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols,
                                 double density, Numbers numbers) {
  SampleProblem problem{make_blocks(dtype, m, rows, cols, block_rows, block_cols, density, false, numbers), {}, {}};
  problem.x = problem.weight.x;
  problem.g.resize(static_cast<size_t>(m * rows));
  for (uint64_t& element : problem.g) element = random_element(kFormats[dtype], numbers == kTiny ? kIntegers : numbers, 7, false);
  return problem;
}

// The line of each block: of those past what the starts say, any line.
inline std::vector<int64_t> lines_of(const IndexParts& index) {
  std::vector<int64_t> lines(static_cast<size_t>(index.blocks()), 0);
  for (int64_t line = 0; line < index.lines(); ++line) {
    for (int64_t i = std::max<int64_t>(index.starts[static_cast<size_t>(line)], 0);
         i < std::min(index.starts[static_cast<size_t>(line + 1)], index.blocks()); ++i) {
      lines[static_cast<size_t>(i)] = line;
    }
  }
  return lines;
}

inline Bytes run_sample(const SampleKernel& kernel, const SampleProblem& problem, const cuda::Device& device,
                        const BlockSkews& skews = {0, 0, 0}, cuda::Fault fault = cuda::kNoFault) {
  const BlockProblem& w = problem.weight;
  const Format& format = w.format();
  StoredIndex stored(w.index);
  Buffer lines(bytes_of(lines_of(w.index))), g(pack(format, problem.g), skews.x), x(pack(format, problem.x), skews.x);
  Buffer values(w.index.blocks() * w.block_rows * w.block_cols * format.width, skews.values);
  cuda::BlockSampleParams params{};
  params.index = stored.index;
  params.lines = reinterpret_cast<const int64_t*>(lines.data());
  params.values = values.data();
  params.rows = w.rows;
  params.cols = w.cols;
  params.block_rows = w.block_rows;
  params.block_cols = w.block_cols;
  params.g = g.data();
  params.x = x.data();
  params.m = w.m;
  params.dtype = w.dtype;
  params.tf32 = w.tf32;
  params.fault = &fault;
  run_watched(kernel, params, device);
  check(values.canaries_intact(), "writes outside");
  return values.bytes();
}

// Checks values [blocks][block_rows][block_cols] of a sound index: zero past the edges.
inline void check_sample(const SampleProblem& problem, const Bytes& values) {
  const BlockProblem& w = problem.weight;
  const Format& format = w.format();
  const std::vector<double> g = decode(format, problem.g), x = decode(format, problem.x);
  const std::vector<int64_t> lines = lines_of(w.index);
  const int64_t size = w.block_rows * w.block_cols;
  Mismatches wrong;
  for (int64_t at = 0; at < w.index.blocks() * size; ++at) {
    const size_t block = static_cast<size_t>(at / size);
    const int64_t row = lines[block] * w.block_rows + at % size / w.block_cols;
    const int64_t col = w.index.positions[block] * w.block_cols + at % w.block_cols;
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; row < w.rows && col < w.cols && i < w.m; ++i) {
      const double product = g[static_cast<size_t>(i * w.rows + row)] * x[static_cast<size_t>(i * w.cols + col)];
      sum += product;
      magnitude += std::fabs(product);
    }
    wrong.compare(format, values.data() + at * format.width, sum, slack_of(format, magnitude, w.m, w.exact, w.tf32), at / size, at % size);
  }
  check(wrong.count == 0, "block %" PRId64 ", element %" PRId64 ": %g instead of %g", wrong.row, wrong.col, wrong.got, wrong.expected);
}

inline void test_sample(const SampleKernel& kernel, const SampleProblem& problem, const cuda::Device& device,
                        const BlockSkews& skews = {0, 0, 0}) {
  set_place(kernel.name, problem.weight, device);
  check_sample(problem, run_sample(kernel, problem, device, skews));
}

// Checks that no element of a result is a number.
inline void check_all_nan(const Format& format, const Bytes& bytes) {
  int64_t numbers = 0;
  for (size_t at = 0; at < bytes.size(); at += static_cast<size_t>(format.width)) {
    numbers += !std::isnan(format.decode(format.load(bytes.data() + at)));
  }
  check(numbers == 0, "%" PRId64 " elements are numbers", numbers);
}

}  // namespace bitmask::testing
