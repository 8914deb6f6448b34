// Tests the linear kernels with compressed weights that are faulty, or nothing but noise: they return the first faulty row of their range,
// write nothing outside of its columns and, as AddressSanitizer sees, read nothing outside of the parts.
#include "linear_calls.h"
#include "linear_faults.h"

using namespace bitmask;
using namespace bitmask::testing;

namespace {

int64_t first_faulty(const Weight& weight, int64_t begin, int64_t end, int64_t nnz) {
  const Bytes bitmasks(weight.bitmasks.begin() + begin * bitmask_bytes(weight.cols),
                       weight.bitmasks.begin() + end * bitmask_bytes(weight.cols));
  const std::vector<int64_t> offsets(weight.row_offsets.begin() + begin, weight.row_offsets.begin() + end);
  const int64_t stop = end < weight.rows ? weight.row_offsets[static_cast<size_t>(end)] : nnz;
  return begin + first_faulty_reference(bitmasks, offsets, end - begin, weight.cols, stop, nnz);
}

// Every kernel returns the first faulty row of all rows, of some, and of those from `row` on.
void test_fault(Subject& subject, const Weight& weight, const Bytes& x, const Bytes& bias, int64_t row) {
  const int64_t nnz = static_cast<int64_t>(weight.values.size()) / subject.format.width;
  const int64_t some = random_below(weight.rows);
  const int64_t ranges[][2] = {{0, weight.rows}, {some, some + random_below(weight.rows - some) + 1}, {row, weight.rows}};
  for (const Way way : kWays) {
    for (const auto& range : ranges) {
      const int64_t m = 1 + random_below(way == kStream ? subject.kernels.streaming_rows : subject.kernels.panel_rows + 1);
      const int64_t begin = range[0], end = std::min(range[1], begin + subject.kernels.tile_rows);
      Buffer y(m * weight.rows * subject.format.width);
      run(subject, weight, x, bias, {way, m, begin, end, random_below(2) == 0, kSkews[random_below(3)]},
          first_faulty(weight, begin, end, nnz), y);
    }
  }
}

}  // namespace

void bitmask::testing::test_linear_faults(Subject& subject, bool brief) {
  const Format& format = subject.format;
  for (const int64_t cols : {1, 7, 65, 130, 513, 1030}) {
    for (const int64_t rows : {1, 3, 37, 90}) {
      if (rows * cols > (brief ? 1000 : 50000)) continue;
      for (const double density : {0.0, 0.5, 1.0}) {
        const Weight honest = random_weight(format, rows, cols, density);
        const int64_t most_m = subject.kernels.streaming_rows + subject.kernels.panel_rows + 1;
        const Bytes x(static_cast<size_t>(most_m * cols * format.width), 0), bias(static_cast<size_t>(rows * format.width), 0);
        const int64_t nnz = static_cast<int64_t>(honest.values.size()) / format.width;
        for (const Fault& fault : kFaults) {
          set_place(subject, honest, std::string(fault.name) + ", density " + std::to_string(density).substr(0, 3));
          const int64_t candidates[] = {0, random_below(rows), rows - 1}, row = candidates[random_below(3)];
          Weight weight = honest;
          fault.make(weight, row, nnz);
          test_fault(subject, weight, x, bias, row);
          // A second fault.
          kFaults[random_below(sizeof(kFaults) / sizeof(Fault))].make(weight, random_below(rows), nnz);
          test_fault(subject, weight, x, bias, row);
        }
        set_place(subject, honest, "values missing");
        for (const int64_t kept : {int64_t{0}, nnz / 2, nnz - 1}) {
          if (kept < 0) continue;
          Weight weight = honest;
          weight.values.resize(static_cast<size_t>(kept * format.width));
          test_fault(subject, weight, x, bias, rows / 2);
        }
        set_place(subject, honest, "garbage");
        for (int i = 0; i < (brief ? 3 : 15); ++i) test_fault(subject, garbage(honest, format.width), x, bias, random_below(rows));
      }
    }
  }
  check(subject.scratch.canaries_intact(), "multiply writes outside of its scratch memory");
}
