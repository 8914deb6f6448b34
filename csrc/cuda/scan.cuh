// Prefix sums over a whole grid in one pass: decoupled look-back (Merrill and Garland, "Single-pass Parallel Prefix Scan with Decoupled
// Look-back", 2016). Each block sums a tile.
//
//   tile        0       1       2       3       4        taken in the order in which blocks start: a tile waits for those before it only,
//   state    [P 7]   [P 12]  [T 4]   [T 9]   [--]        and their blocks run already, whatever order the GPU starts blocks in
//                       ^       ^       ^
//                       '-------'-------'-- tile 4 looks back: 9 + 4 + 12, so its own state becomes P (25 + its sum)
//
//   T  the sum of this tile alone        P  the sum of all tiles up to this one        --  nothing yet
//
// A state is one word that says everything, so relaxed loads and stores suffice. A warp looks at 32 states at a time.
#pragma once

#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

namespace bitmask::cuda::scan {

constexpr int kLanes = 32;  // of a warp
constexpr int kWarps = 8;   // of a block
constexpr int kThreads = kLanes * kWarps;
constexpr uint32_t kAllLanes = ~0u;

// What lies in global memory, zeroed beforehand.
struct Workspace {
  uint64_t* words;  // the number of tiles taken, then the state of each tile

  static constexpr int64_t bytes(int64_t tiles) { return (1 + tiles) * 8; }
};

// A state: two bits that say what the other 62 are the sum of.
constexpr int kSumBits = 62;
constexpr uint64_t kSumMask = (uint64_t{1} << kSumBits) - 1;
constexpr uint64_t kNothing = 0, kTile = 1, kPrefix = 2;

__device__ inline uint64_t make_state(uint64_t kind, int64_t sum) { return kind << kSumBits | static_cast<uint64_t>(sum); }

// Called by a whole warp: publishes the sum of a tile, and returns `start` plus the sums of all tiles before it.
__device__ inline int64_t look_back(uint64_t* states, int64_t tile, uint32_t tile_sum, int64_t start) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  int64_t before = start;
  if (tile > 0) {
    if (lane == 0) ptx::store_relaxed(states + tile, make_state(kTile, tile_sum));
    before = 0;
    uint32_t prefixes = 0;  // lanes that see a prefix
    for (int64_t last = tile - 1; prefixes == 0; last -= kLanes) {
      const int64_t mine = last - lane;  // before tile 0 there is nothing to wait for, and tile 0 has a prefix
      uint64_t state;
      uint32_t needed;  // lanes that come before the nearest prefix
      while (true) {
        state = mine >= 0 ? ptx::load_relaxed(states + mine) : make_state(kPrefix, 0);
        prefixes = __ballot_sync(kAllLanes, state >> kSumBits == kPrefix);
        needed = (prefixes - 1) & ~prefixes;
        if ((__ballot_sync(kAllLanes, state >> kSumBits == kNothing) & needed) == 0) break;
        ptx::pause();
      }
      uint32_t sum = (needed >> lane & 1) != 0 ? static_cast<uint32_t>(state) : 0;
      for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      before += sum;
      if (prefixes != 0) before += static_cast<int64_t>(__shfl_sync(kAllLanes, state & kSumMask, __ffs(static_cast<int>(prefixes)) - 1));
    }
  }
  if (lane == 0) ptx::store_relaxed(states + tile, make_state(kPrefix, before + tile_sum));
  return before;
}

// What the threads of a block tell each other.
struct Memory {
  uint32_t tile;
  uint32_t sum;                  // of the tile
  int64_t before;                // `start` and the sums of all tiles before
  uint32_t warp_before[kWarps];  // sums of the warps before, in the tile; the warp's own sum first
};

// The next tile, for a whole block.
__device__ inline uint32_t take_tile(Workspace workspace, Memory& memory) {
  if (threadIdx.x == 0) memory.tile = atomicAdd(reinterpret_cast<unsigned int*>(workspace.words), 1u);
  __syncthreads();
  return memory.tile;
}

// Replaces counts by the sums of what comes before them in the warp, and returns the sum of all, which fits 16 bits. Count i of lane l is
// number 32 i + l of the warp. Two at a time, in the halves of a word.
template <int kCounts>
__device__ uint32_t scan_warp(uint32_t (&counts)[kCounts]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  uint32_t before = 0;
#pragma unroll
  for (int i = 0; i < kCounts; i += 2) {
    const uint32_t pair = i + 1 < kCounts ? counts[i] | counts[(i + 1) % kCounts] << 16 : counts[i];
    uint32_t sums = pair;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const uint32_t others = __shfl_up_sync(kAllLanes, sums, step);
      if (lane >= step) sums += others;
    }
    const uint32_t total = __shfl_sync(kAllLanes, sums, kLanes - 1);
    const uint32_t exclusive = sums - pair;
    counts[i] = before + (exclusive & 0xffff);
    before += total & 0xffff;
    if (i + 1 < kCounts) {
      counts[(i + 1) % kCounts] = before + (exclusive >> 16);
      before += total >> 16;
    }
  }
  return before;
}

// For a whole block: completes `memory` from the sums of its warps. A barrier comes first and last.
__device__ inline void scan_tiles(Workspace workspace, uint32_t tile, uint32_t warp_sum, int64_t start, Memory& memory) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
  if (lane == 0) memory.warp_before[warp] = warp_sum;
  __syncthreads();
  if (warp == 0) {
    uint32_t sums[1] = {lane < kWarps ? memory.warp_before[lane] : 0};
    const uint32_t sum = scan_warp(sums);
    const int64_t before = look_back(workspace.words + 1, tile, sum, start);
    if (lane < kWarps) memory.warp_before[lane] = sums[0];
    if (lane == 0) {
      memory.sum = sum;
      memory.before = before;
    }
  }
  __syncthreads();
}

}  // namespace bitmask::cuda::scan
