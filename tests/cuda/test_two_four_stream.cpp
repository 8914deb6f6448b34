// Tests two_four_stream against products in double precision: whole weights and blocks, aligned and not, faulty metadata and indices.
#include "two_four_problems.h"

namespace bitmask::testing {
namespace {

constexpr TwoFourKernel kKernel{"two_four_stream", cuda::two_four_stream, cuda::two_four_stream_workspace_bytes};
constexpr cuda::Device kDevices[] = {{1, 99 << 10}, {2, 163 << 10}, {132, 227 << 10}};
constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16};
constexpr Numbers kNumbers[] = {kIntegers, kTiny, kSpecials, kReals};

const cuda::Device& any_device() { return kDevices[random_below(std::size(kDevices))]; }

void test_whole(cuda::LinearDtype dtype) {
  constexpr int64_t kColumns[] = {4, 8, 12, 16, 20, 60, 64, 68, 100, 128, 192, 256, 516};
  for (int i = 0; i < 52; ++i) {
    test_two_four(kKernel, make_two_four(dtype, 1 + i % 16, 1 + random_below(70), kColumns[i % 13], kNumbers[i % 4]), any_device(),
                  i % 2 == 0);
  }
}

TEST_FAMILY(two_four_stream) {
  for (const cuda::LinearDtype dtype : kDtypes) test_whole(dtype);
}

}  // namespace
}  // namespace bitmask::testing
