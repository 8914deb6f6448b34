// Pruning to 2:4 in rows and in columns at once, to the bit as csrc/cpu/generic/two_four_prune.h does it: of each 4 x 4 elements the best
// of 90 patterns, by sums of doubles in the same order. A thread does a block, the threads of a warp do neighbours.
//
// The model, for an H100, in elements of 16 bits per clock and multiprocessor: memory 3.4 (4 bytes), fp64 instructions 3.7 (17 an element;
// 64 lanes), all 2.9 (44; 128 lanes). GPUs with few fp64 lanes take far longer: 0.12 where there are two. Not timed.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>
#include <utility>

#include "../two_four_patterns.h"
#include "codec_launch.cuh"
#include "elements.cuh"
#include "kernels.h"

namespace bitmask::cuda {
namespace {

constexpr int kBlock = 4;  // rows and columns
constexpr int kElements = kBlock * kBlock;

// The elements that pattern I keeps: column c of row r at bit 4 r + c.
template <int I>
constexpr uint32_t kKept = static_cast<uint32_t>(kTransposable.row(I, 0) | kTransposable.row(I, 1) << 4 | kTransposable.row(I, 2) << 8 |
                                                 kTransposable.row(I, 3) << 12);

// The sums of two elements of a row, by the number of the row's pattern.
struct RowSums {
  double sums[kRowPatterns];

  __device__ __forceinline__ explicit RowSums(const double* terms)
      : sums{terms[0] + terms[1], terms[0] + terms[2], terms[1] + terms[2], terms[0] + terms[3], terms[1] + terms[3], terms[2] + terms[3]} {
  }
};

// The sum of what pattern I keeps: row 0 and row 1 first, then row 2 and row 3, then both.
template <int I>
__device__ __forceinline__ double sum_of(const RowSums (&rows)[kBlock]) {
  constexpr int kUpper = kTransposable.upper[I], kLower = kTransposable.lower[I];
  return (rows[0].sums[kUpper / kRowPatterns] + rows[1].sums[kUpper % kRowPatterns]) +
         (rows[2].sums[kLower / kRowPatterns] + rows[3].sums[kLower % kRowPatterns]);
}

// Which magnitudes are not finite, as bits of what patterns keep.
struct Extremes {
  uint32_t nans, infinities;
};

// What the best pattern keeps; of equally good ones the first stays. kRanked: more NaNs are better than fewer, then more infinities, whose
// terms are zero.
template <bool kRanked, int... I>
__device__ __forceinline__ uint32_t best_of(const double (&terms)[kElements], const Extremes& extremes, std::integer_sequence<int, I...>) {
  const RowSums rows[kBlock] = {RowSums(terms), RowSums(terms + 4), RowSums(terms + 8), RowSums(terms + 12)};
  double best = 0;
  int best_rank = 0;
  uint32_t kept = kKept<0>;
  const auto look_at = [&](double sum, uint32_t pattern) {
    const int rank = kRanked ? 16 * __popc(extremes.nans & pattern) + __popc(extremes.infinities & pattern) : 0;
    const bool better = rank > best_rank || (rank == best_rank && sum > best);
    best = better ? sum : best;
    best_rank = better ? rank : best_rank;
    kept = better ? pattern : kept;
  };
  (look_at(sum_of<I>(rows), kKept<I>), ...);
  return kept;
}

constexpr auto kPatterns = std::make_integer_sequence<int, TransposablePatterns::kCount>{};

// Bits of fp64 magnitudes, which compare as these do.
constexpr int64_t kTooLarge = 0x7e70000000000000;  // 2^1000: eight of them may add up to infinity
constexpr int64_t kInfinity = 0x7ff0000000000000;

// The same for magnitudes of which some are too large: those that are not finite are ranked, the others scaled. (GPUs keep subnormal
// doubles, so none but the largest need a scale.)
__device__ __forceinline__ uint32_t best_of_extremes(double (&terms)[kElements]) {
  Extremes extremes{};
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int64_t bits = __double_as_longlong(terms[i]);
    extremes.infinities |= bits == kInfinity ? 1u << i : 0;
    extremes.nans |= bits > kInfinity ? 1u << i : 0;
    terms[i] = bits < kInfinity ? terms[i] : 0;
  }
  double largest = 0;
#pragma unroll
  for (const double term : terms) largest = max(largest, term);
  const double scale = largest >= 0x1p1000 ? 0x1p-8 : 1;
#pragma unroll
  for (double& term : terms) term *= scale;
  return best_of<true>(terms, extremes, kPatterns);
}

// Element e of four that lie in registers, as a magnitude.
template <LinearDtype kDtype>
__device__ __forceinline__ double magnitude_of(const uint32_t* words, int e) {
  if constexpr (kDtype == kFloat64) {
    const uint2 bits = codec::get<8>(words, e);
    return fabs(__longlong_as_double(static_cast<int64_t>(static_cast<uint64_t>(bits.y) << 32 | bits.x)));
  } else if constexpr (kDtype == kFloat32) {
    return fabs(static_cast<double>(__uint_as_float(words[e])));
  } else {
    return fabs(static_cast<double>(Element<kDtype>::widen(codec::get<2>(words, e))));
  }
}

struct PruneParams {
  uint8_t* dense;
  int64_t blocks, cols;
};

// kTogether: elements that are aligned together.
template <LinearDtype kDtype, int kTogether>
__global__ void __launch_bounds__(codec::kThreads, kDtype == kFloat64 ? 1 : 2) prune_blocks(const PruneParams p) {
  constexpr int W = sizeof(typename Element<kDtype>::Stored), V = codec::kVectorBytes<W, kTogether>;
  const int64_t at = int64_t{blockIdx.x} * codec::kThreads + threadIdx.x;
  if (at >= p.blocks) return;
  const int64_t across = p.cols / kBlock, line = at / across;
  uint8_t* const dense = p.dense + (line * kBlock * p.cols + (at - line * across) * kBlock) * W;
  uint32_t words[kBlock][W] = {};  // four elements in each row
#pragma unroll
  for (int row = 0; row < kBlock; ++row) codec::load_vectors<V, kBlock * W>(dense + row * p.cols * W, true, words[row]);

  double terms[kElements];
  bool extreme = false;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    terms[i] = magnitude_of<kDtype>(words[i / kBlock], i % kBlock);
    extreme |= __double_as_longlong(terms[i]) >= kTooLarge;
  }
  const uint32_t kept = extreme ? best_of_extremes(terms) : best_of<false>(terms, {}, kPatterns);
#pragma unroll
  for (int row = 0; row < kBlock; ++row) {
    uint32_t pruned[W] = {};
#pragma unroll
    for (int e = 0; e < kBlock; ++e) {
      if ((kept >> (kBlock * row + e) & 1) != 0) codec::set<W>(pruned, e, codec::get<W>(words[row], e));
    }
    codec::store_vectors<V, kBlock * W>(pruned, true, dense + row * p.cols * W);
  }
}

template <LinearDtype kDtype>
cudaError_t launch_prune(const PruneParams& p, cudaStream_t stream) {
  constexpr int W = sizeof(typename Element<kDtype>::Stored);
  const int64_t tiles = codec::quotient_up(p.blocks, codec::kThreads);
  if (!codec::aligned(p.dense, W) || tiles > codec::kMostTiles) return cudaErrorInvalidValue;
  const bool in_fours = codec::aligned(p.dense, codec::kVectorBytes<W, kBlock>);
  return launch_kernel(in_fours ? prune_blocks<kDtype, kBlock> : prune_blocks<kDtype, 1>, {tiles, codec::kThreads}, stream, p);
}

}  // namespace

cudaError_t prune_24_transposable(void* dense, const Geometry& g, LinearDtype dtype, cudaStream_t stream) {
  const PruneParams p{static_cast<uint8_t*>(dense), g.rows / kBlock * (g.cols / kBlock), g.cols};
  if (p.blocks == 0) return cudaSuccess;
  switch (dtype) {
    case kFloat32:
      return launch_prune<kFloat32>(p, stream);
    case kBfloat16:
      return launch_prune<kBfloat16>(p, stream);
    case kFloat16:
      return launch_prune<kFloat16>(p, stream);
    default:
      return launch_prune<kFloat64>(p, stream);
  }
}

}  // namespace bitmask::cuda
