// Tests pruning to 2:4 in rows and columns: every kernel table that this machine can run, every dtype, against all choices of eight of
// sixteen elements that leave two in each row and column.
#include "../../csrc/cpu/kernels.h"
#include "testing.h"
#include "transposable_reference.h"

using namespace bitmask;
using namespace bitmask::testing;
using namespace bitmask::testing::two_four;
using cpu::Kernels;

namespace {

void test_matrix(const Kernels& kernels, int dtype, Numbers numbers, int64_t rows, int64_t cols, int skew) {
  const Format& format = kFormats[dtype];
  const Bytes elements = random_elements(format, numbers, rows, cols);
  Buffer weight(elements, skew);
  kernels.two_four_linear[dtype].prune_transposable(weight.data(), rows, cols);
  check(weight.canaries_intact(), "writes outside of its range");
  test_pruned(format, rows, cols, elements, weight.bytes());
}

}  // namespace

void bitmask::testing::test_two_four_prune(bool brief) {
  check(patterns().size() == 90, "there are other than 90 patterns");
  for (int isa = 0; isa < cpu::isa_count(); ++isa) {
    cpu::force_isa(cpu::isa_name(isa));
    for (int dtype = 0; dtype < cpu::kLinearDtypes; ++dtype) {
      for (int numbers = 0; numbers < kNumbers; ++numbers) {
        for (const int64_t cols : {0, 4, 8, 60, 64, 68, 132, 320}) {
          for (const int64_t rows : {0, 4, 8, 12}) {
            if ((brief || kSanitized) && rows * cols > 8 * 68) continue;
            place = std::string(cpu::isa_name(isa)) + " 2:4 in rows and columns, " + kFormats[dtype].name + " " + kNumbersNames[numbers] +
                    " [" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
            test_matrix(cpu::kernels(), dtype, static_cast<Numbers>(numbers), rows, cols, kSkews[random_below(3)]);
          }
        }
      }
    }
  }
}
