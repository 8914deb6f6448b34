// Tests which kernel is chosen for which product, and that the chosen one takes it: none of them may refuse, or be wrong.
#include "block_problems.h"

namespace bitmask::testing {
namespace {

using cuda::BlockParams;
using cuda::BlockSampleParams;
using cuda::BlockWay;
using cuda::Device;

constexpr Device kAmpere{108, 163 << 10}, kSmall{2, 99 << 10}, kHopper{132, 227 << 10, true};

const char* name_of(BlockWay way) {
  return way == BlockWay::kStream      ? "stream"
         : way == BlockWay::kMultiply  ? "multiply"
         : way == BlockWay::kWarpgroup ? "warpgroup"
                                       : "cores";
}

// ---------------------------------------------------------------------------------------------------------------- choices

BlockParams params_of(cuda::LinearDtype dtype, int64_t m, int64_t block, bool transposed, bool tf32) {
  static uint8_t memory[64] __attribute__((aligned(16)));
  BlockParams params{};
  params.index = {nullptr, nullptr, nullptr, 4096 / block, 0, 4096 / block};
  params.values = params.x = params.y = memory;
  params.rows = params.cols = 4096;
  params.block_rows = params.block_cols = block;
  params.m = m;
  params.dtype = dtype;
  params.transposed = transposed;
  params.tf32 = tf32;
  return params;
}

void expect(const BlockParams& params, const Device& device, BlockWay expected) {
  place = "plan_block: dtype " + std::to_string(params.dtype) + " m " + std::to_string(params.m) + " blocks of " +
          std::to_string(params.block_rows) + " x " + std::to_string(params.block_cols) + (params.transposed ? " transposed" : "");
  const BlockWay got = plan_block(params, device).way;
  check(got == expected, "%s instead of %s", name_of(got), name_of(expected));
}

TEST_FAMILY(plan_block) {
  using namespace cuda;
  for (const LinearDtype dtype : {kBfloat16, kFloat16}) {
    for (const int64_t block : {16, 32, 64, 128}) {
      const BlockWay large = block >= 64 ? BlockWay::kWarpgroup : BlockWay::kMultiply;
      expect(params_of(dtype, 1, block, false, false), kHopper, BlockWay::kStream);
      expect(params_of(dtype, 16, block, false, false), kAmpere, BlockWay::kStream);
      expect(params_of(dtype, 17, block, false, false), kHopper, BlockWay::kMultiply);
      expect(params_of(dtype, 1, block, true, false), kHopper, BlockWay::kMultiply);
      for (const bool transposed : {false, true}) {
        expect(params_of(dtype, 2048, block, transposed, false), kHopper, large);
        expect(params_of(dtype, 2048, block, transposed, false), kAmpere, BlockWay::kMultiply);
      }
    }
    BlockParams unaligned = params_of(dtype, 2048, 64, false, false);
    unaligned.x = static_cast<const uint8_t*>(unaligned.x) + 8;
    expect(unaligned, kHopper, BlockWay::kCores);
    BlockParams edge = params_of(dtype, 2048, 64, false, false);
    edge.cols = 4096 - 8;
    expect(edge, kHopper, BlockWay::kMultiply);
    edge.cols = 4096 - 1;
    expect(edge, kHopper, BlockWay::kCores);
    expect(params_of(dtype, 2048, 40, false, false), kHopper, BlockWay::kCores);
    expect(params_of(dtype, 4, 40, false, false), kHopper, BlockWay::kStream);
    expect(params_of(dtype, 4, 4, false, false), kHopper, BlockWay::kCores);
  }
  expect(params_of(kFloat32, 1, 64, false, false), kHopper, BlockWay::kStream);
  expect(params_of(kFloat32, 512, 64, false, false), kHopper, BlockWay::kCores);
  expect(params_of(kFloat32, 512, 64, false, true), kHopper, BlockWay::kMultiply);
  expect(params_of(kFloat64, 1, 64, false, true), kHopper, BlockWay::kCores);
}

// ---------------------------------------------------------------------------------------------------------------- the chosen ones

cudaError_t run_planned(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  switch (plan_block(params, device).way) {
    case BlockWay::kStream:
      return cuda::block_stream(params, device, workspace, stream);
    case BlockWay::kMultiply:
      return cuda::block_multiply(params, device, workspace, stream);
    case BlockWay::kWarpgroup:
      return cuda::block_warpgroup(params, device, workspace, stream);
    default:
      return cuda::block_cores(params, device, workspace, stream);
  }
}

cudaError_t run_planned_sample(const BlockSampleParams& params, const Device& device, void* workspace, cudaStream_t stream) {
  switch (plan_block_sample(params, device).way) {
    case BlockWay::kMultiply:
      return cuda::block_sample(params, device, workspace, stream);
    case BlockWay::kWarpgroup:
      return cuda::block_sample_warpgroup(params, device, workspace, stream);
    default:
      return cuda::block_sample_cores(params, device, workspace, stream);
  }
}

constexpr BlockKernel kPlanned{"planned", run_planned,
                               [](const BlockParams& params, const Device& device) { return plan_block(params, device).workspace_bytes; }};
constexpr SampleKernel kPlannedSample{"planned sample", run_planned_sample, [](const BlockSampleParams& params, const Device& device) {
                                        return plan_block_sample(params, device).workspace_bytes;
                                      }};

template <typename T, size_t kCount>
T pick(const T (&choices)[kCount]) {
  return choices[random_below(kCount)];
}

TEST_FAMILY(planned_blocks) {
  constexpr cuda::LinearDtype kDtypes[] = {cuda::kFloat32, cuda::kBfloat16, cuda::kFloat16, cuda::kFloat64};
  constexpr int64_t kSides[] = {1, 4, 8, 16, 24, 32, 48, 64, 128}, kSizes[] = {16, 40, 64, 100, 128, 192, 200};
  constexpr int64_t kMs[] = {0, 1, 2, 8, 16, 17, 33};
  constexpr int kSkews[] = {0, 0, 0, 8, 16};
  for (int i = 0; i < 150; ++i) {
    const cuda::LinearDtype dtype = pick(kDtypes);
    const int64_t m = pick(kMs), rows = pick(kSizes), cols = pick(kSizes), block_rows = pick(kSides), block_cols = pick(kSides);
    const Device& device = i % 3 == 0 ? kHopper : i % 3 == 1 ? kAmpere : kSmall;
    const BlockSkews skews{pick(kSkews), pick(kSkews), pick(kSkews)};
    BlockProblem problem = make_blocks(dtype, m, rows, cols, block_rows, block_cols, 0.4, random_below(2) == 0, kIntegers);
    problem.tf32 = random_below(2) == 0;
    test_blocks(kPlanned, problem, device, random_below(2) == 0 && !problem.transposed, skews);
    SampleProblem sample = make_sample(dtype, m, rows, cols, block_rows, block_cols, 0.4, kIntegers);
    sample.weight.tf32 = problem.tf32;
    test_sample(kPlannedSample, sample, device, skews);
  }
}

// With the instructions of sm_90a, which take many rows.
TEST_FAMILY(planned_warpgroups) {
  for (const bool transposed : {false, true}) {
    const BlockProblem problem = make_blocks(cuda::kBfloat16, 257, 192, 128, 64, 64, 0.5, transposed, kIntegers);
    test_blocks(kPlanned, problem, kHopper, !transposed);
    const BlockProblem edges = make_blocks(cuda::kFloat16, 256, 136, 200, 64, 64, 0.5, transposed, kIntegers);
    test_blocks(kPlanned, edges, kHopper, !transposed);
  }
  test_sample(kPlannedSample, make_sample(cuda::kBfloat16, 256, 136, 200, 64, 64, 0.5, kIntegers), kHopper);
}

}  // namespace
}  // namespace bitmask::testing
