// Products with a block-sparse weight on CUDA cores: any dtype, blocks of any shape. A thread does one element of the result.
#include <cuda_runtime.h>

#include <cstdint>

#include "block_lines.cuh"
#include "elements.cuh"
#include "kernels.h"

namespace bitmask::cuda {
namespace {

constexpr int kThreads = 128;

template <LinearDtype kDtype>
__global__ __launch_bounds__(kThreads) void multiply(const BlockParams p) {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  using Sum = typename E::Sum;
  const int64_t across = p.across(), depth = p.depth();
  const Stored *const x = static_cast<const Stored*>(p.x), *const values = static_cast<const Stored*>(p.values);
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < p.m * across; at += int64_t{gridDim.x} * kThreads) {
    const int64_t row = at / across, column = at % across, line = column / p.block_across(), inside = column % p.block_across();
    const BlockLine walk(p.index, line);
    bool sound = walk.sound && is_proven(p.fault);
    Sum sum = 0;
    for (int64_t i = walk.begin; i < walk.end; ++i) {
      const int64_t position = p.index.positions[i], block = place_of(p.index, i);
      if (!walk.holds(p.index, i, position) || !is_place(p.index, block)) {
        sound = false;
        break;
      }
      const Stored* const w = values + block * p.block_rows * p.block_cols;
      for (int64_t j = 0; j < p.block_depth() && position * p.block_depth() + j < depth; ++j) {
        const int64_t element = p.transposed ? j * p.block_cols + inside : inside * p.block_cols + j;
        sum += E::widen(x[row * depth + position * p.block_depth() + j]) * E::widen(w[element]);
      }
    }
    const Sum bias = p.bias == nullptr ? Sum{0} : Sum{E::widen(static_cast<const Stored*>(p.bias)[column])};
    static_cast<Stored*>(p.y)[at] = E::narrow(sound ? sum + bias : Sum{not_a_number()});
  }
}

template <LinearDtype kDtype>
__global__ __launch_bounds__(kThreads) void sample(const BlockSampleParams p) {
  using E = Element<kDtype>;
  using Stored = typename E::Stored;
  using Sum = typename E::Sum;
  const Stored *const g = static_cast<const Stored*>(p.g), *const x = static_cast<const Stored*>(p.x);
  const int64_t size = p.block_rows * p.block_cols;
  const bool sound = is_proven(p.fault);
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < p.index.blocks * size; at += int64_t{gridDim.x} * kThreads) {
    const int64_t block = at / size, row = p.lines[block] * p.block_rows + at % size / p.block_cols;
    const int64_t position = p.index.positions[block], col = position * p.block_cols + at % p.block_cols;
    Sum sum = 0;
    const bool there = position >= 0 && position < p.index.limit && row < p.rows && col < p.cols;
    for (int64_t i = 0; there && i < p.m; ++i) sum += E::widen(g[i * p.rows + row]) * E::widen(x[i * p.cols + col]);
    static_cast<Stored*>(p.values)[at] = E::narrow(sound ? sum : Sum{not_a_number()});
  }
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t elements, const Device& device, cudaStream_t stream) {
  if (elements == 0) return cudaSuccess;
  const int64_t blocks = (elements + kThreads - 1) / kThreads, most = int64_t{device.multiprocessors} * 8;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace

int64_t block_cores_workspace_bytes(const BlockParams&, const Device&) { return 0; }
int64_t block_sample_cores_workspace_bytes(const BlockSampleParams&, const Device&) { return 0; }

cudaError_t block_cores(const BlockParams& params, const Device& device, void*, cudaStream_t stream) {
  const auto kernel = params.dtype == kFloat32    ? multiply<kFloat32>
                      : params.dtype == kBfloat16 ? multiply<kBfloat16>
                      : params.dtype == kFloat16  ? multiply<kFloat16>
                                                  : multiply<kFloat64>;
  return launch(kernel, params, params.m * params.across(), device, stream);
}

cudaError_t block_sample_cores(const BlockSampleParams& params, const Device& device, void*, cudaStream_t stream) {
  const auto kernel = params.dtype == kFloat32    ? sample<kFloat32>
                      : params.dtype == kBfloat16 ? sample<kBfloat16>
                      : params.dtype == kFloat16  ? sample<kFloat16>
                                                  : sample<kFloat64>;
  return launch(kernel, params, params.index.blocks * params.block_rows * params.block_cols, device, stream);
}

}  // namespace bitmask::cuda
