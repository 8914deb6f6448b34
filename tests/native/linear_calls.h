// What the tests of the linear kernels share: compressed weights, and calls of a kernel in memory that is watched.
#pragma once

#include "products.h"

namespace bitmask::testing {

using cpu::LinearKernels;

// ---------------------------------------------------------------------------------------------------------------- weights

// Compressed rows, each part free to be wrong.
struct Weight {
  int64_t rows, cols;
  Bytes values, bitmasks;
  std::vector<int64_t> row_offsets;
};

// Compresses the elements of `bits` [rows, cols] that `kept` names.
inline Weight compress(const Format& format, int64_t rows, int64_t cols, const std::vector<uint64_t>& bits, const std::vector<bool>& kept) {
  const int64_t row_bytes = bitmask_bytes(cols);
  Weight weight{rows, cols, {}, Bytes(static_cast<size_t>(rows * row_bytes), 0), {}};
  for (int64_t row = 0; row < rows; ++row) {
    weight.row_offsets.push_back(static_cast<int64_t>(weight.values.size()) / format.width);
    for (int64_t col = 0; col < cols; ++col) {
      const size_t at = static_cast<size_t>(row * cols + col);
      if (!kept[at]) continue;
      uint8_t& mask = weight.bitmasks[static_cast<size_t>(row * row_bytes + col / 8)];
      mask = static_cast<uint8_t>(mask | 1 << (col % 8));
      weight.values.resize(weight.values.size() + static_cast<size_t>(format.width));
      format.store(bits[at], &*weight.values.end() - format.width);
    }
  }
  return weight;
}

// ---------------------------------------------------------------------------------------------------------------- calls

using Subject = SubjectOf<LinearKernels>;
using Subjects = SubjectsOf<LinearKernels>;

enum Way { kStream, kMultiply };
constexpr Way kWays[] = {kStream, kMultiply};
constexpr const char* kWayNames[] = {"stream", "multiply"};

struct Call {
  Way way;
  int64_t m, begin, end;
  bool biased;
  int skew;
};

// The weight in memory of exactly its size.
struct Stored {
  Buffer values, bitmasks, row_offsets;
  BitmaskMatrix matrix;

  Stored(const Weight& weight, int width, int skew)
      : values(weight.values, skew), bitmasks(weight.bitmasks, skew), row_offsets(weight.rows * 8) {
    if (weight.rows > 0) std::memcpy(row_offsets.data(), weight.row_offsets.data(), weight.row_offsets.size() * 8);
    matrix = {values.data(), bitmasks.data(), reinterpret_cast<const int64_t*>(row_offsets.data()),
              weight.rows,   weight.cols,     static_cast<int64_t>(weight.values.size()) / width};
  }
};

// Does `rows` rows of x in one piece -> the faulty row, or the end.
inline int64_t run_piece(Subject& subject, const BitmaskMatrix& w, const Call& call, const uint8_t* x_data, int64_t m, const void* bias,
                         uint8_t* y) {
  const LinearKernels& kernels = subject.kernels;
  const int64_t x_row = w.cols * subject.format.width, lanes_row = (w.cols + kGroup - 1) / kGroup * kernels.group_bytes;
  const Bytes x_bytes(x_data, x_data + m * x_row);
  Buffer x(x_bytes, call.skew);
  const int64_t step = call.way == kStream ? m : kernels.panel_rows;
  Buffer packed((m + step - 1) / step * step * lanes_row);
  if (packed.data() != nullptr) std::memset(packed.data(), 0xff, static_cast<size_t>((m + step - 1) / step * step * lanes_row));
  if (call.way == kStream) {
    kernels.pack_rows(x.data(), m, w.cols, packed.data());
  } else {
    for (int64_t i = 0; i < m; i += step) {
      kernels.pack_panel(x.data() + i * x_row, std::min(step, m - i), w.cols, packed.data() + i * lanes_row);
    }
  }
  check(packed.canaries_intact() && x.bytes() == x_bytes, "%s: packing writes outside", kWayNames[call.way]);
  if (call.way == kStream) return kernels.stream(w, call.begin, call.end, packed.data(), m, bias, y);
  for (int64_t begin = call.begin; begin < call.end; begin += kernels.tile_rows) {
    const int64_t end = std::min(begin + kernels.tile_rows, call.end);
    const int64_t faulty = kernels.multiply(w, begin, end, packed.data(), m, bias, y, subject.scratch.data());
    if (faulty != end) return faulty;
  }
  return call.end;
}

// Does the call in pieces that the kernels take, into y [call.m, rows]. False if they do not return `expected` or write outside of y's
// columns.
inline bool run(Subject& subject, const Weight& weight, const Bytes& x, const Bytes& bias, const Call& call, int64_t expected, Buffer& y) {
  const int64_t width = subject.format.width, y_row = weight.rows * width;
  Stored stored(weight, subject.format.width, call.skew);
  Buffer offsets(bias, call.skew);
  int64_t got = call.end;
  for (int64_t i = 0, m = 0; i < call.m && got == call.end; i += m) {
    m = std::min(call.m - i, call.way == kStream ? subject.kernels.streaming_rows : subject.kernels.block_rows);
    got = run_piece(subject, stored.matrix, call, x.data() + i * weight.cols * width, m, call.biased ? offsets.data() : nullptr,
                    y.data() + i * y_row);
  }
  const bool outside = written_outside(y, y_row, call.begin * width, call.end * width);
  check(!outside, "%s: m %" PRId64 ", rows %" PRId64 " to %" PRId64 ": writes outside", kWayNames[call.way], call.m, call.begin, call.end);
  check(got == expected, "%s: m %" PRId64 ", rows %" PRId64 " to %" PRId64 ": returns %" PRId64 " instead of %" PRId64, kWayNames[call.way],
        call.m, call.begin, call.end, got, expected);
  return !outside && got == expected;
}

inline void set_place(const Subject& subject, const Weight& weight, const std::string& what) {
  place = std::string(subject.isa) + " linear " + subject.format.name + " [" + std::to_string(weight.rows) + ", " +
          std::to_string(weight.cols) + "] " + what;
}

// Faulty rows are found, and nothing is read or written outside, whatever the parts say (test_linear_faults.cpp).
void test_linear_faults(Subject& subject, bool brief);

}  // namespace bitmask::testing
