// Tiles of work, each of them a number of stages, dealt to as many threadblocks as the GPU holds, equally:
//
//   tile         0               1               2            blocks that share a tile each write their sums to the workspace; the last
//   stages   |---------------|---------------|---------------|   one to do so adds them, in the order of the blocks: the sum depends on
//   blocks   0         1         2         3         4           the sizes alone
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bitmask::cuda {

// Of parts of a workspace, for one.
constexpr int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Stages of one tile.
struct Segment {
  int64_t tile, begin, end;
};

// The stages of all tiles, dealt to blocks.
struct Deal {
  int64_t stages = 1;  // of a tile
  int64_t blocks = 0;
  int64_t share = 0;   // units, which are stages of any tile, of a block
  int64_t longer = 0;  // blocks, the first ones, that have one unit more

  Deal() = default;
  __host__ __device__ Deal(int64_t stages_of_tile, int64_t units, int64_t blocks_)
      : stages(stages_of_tile), blocks(blocks_), share(units / blocks_), longer(units % blocks_) {}

  __host__ __device__ int64_t begin(int64_t block) const { return block * share + (block < longer ? block : longer); }
  __host__ __device__ int64_t block_of(int64_t unit) const {
    return unit < longer * (share + 1) ? unit / (share + 1) : longer + (unit - longer * (share + 1)) / share;
  }
  bool whole_tiles() const { return stages == 1 || (longer == 0 && share % stages == 0); }

  // What a block does at a time: from `unit` on to the end of its tile, or to `last`, where the block's units end.
  __host__ __device__ Segment segment(int64_t unit, int64_t last) const {
    const int64_t begin = unit % stages, left = begin + last - unit;
    return {unit / stages, begin, left < stages ? left : stages};
  }
};

// Adds up the sums of tiles that several blocks share.
struct Join {
  uint32_t* arrived;  // [blocks]: how many blocks have written their sums of the tile that this block is the first of; zero before
  float4* partials;   // [blocks][2][sums of a tile]: of the tile that the block begins, and of the one that it does not begin

  // Whether this block is the one to store the tile, having all of its sums: it did all of the tile, or it came last and has added what
  // the others wrote. All threads call it.
  //
  // kThreads  of a block
  // kFours    sums of a thread, in fours
  template <int kThreads, int kFours>
  __device__ __forceinline__ bool add(const Deal& deal, const Segment& s, float (&sums)[kFours][4]) const {
    return (s.begin == 0 && s.end == deal.stages) || add_parts<kThreads>(deal, s, sums);
  }

 private:
  template <int kThreads, int kFours>
  __device__ bool add_parts(const Deal& deal, const Segment& s, float (&sums)[kFours][4]) const {
    constexpr int64_t kPartial = int64_t{kFours} * kThreads;
    const int64_t first = deal.block_of(s.tile * deal.stages), last = deal.block_of((s.tile + 1) * deal.stages - 1);
    float4* const own = partials + (2 * blockIdx.x + (s.begin > 0)) * kPartial + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kFours; ++i) own[i * kThreads] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    __syncthreads();
    bool comes_last = false;
    if (threadIdx.x == 0) {  // for the block: the barriers tell it what the fences order
      __threadfence();
      comes_last = atomicAdd(arrived + first, 1u) == static_cast<uint32_t>(last - first);
      __threadfence();
    }
    if (__syncthreads_or(comes_last) == 0) return false;
#pragma unroll
    for (auto& four : sums) four[0] = four[1] = four[2] = four[3] = 0;
    for (int64_t block = first; block <= last; ++block) {
      const float4* const part = partials + (2 * block + (block > first)) * kPartial + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 four = part[i * kThreads];
        sums[i][0] += four.x;
        sums[i][1] += four.y;
        sums[i][2] += four.z;
        sums[i][3] += four.w;
      }
    }
    return true;
  }
};

// What a join takes of a workspace: its counters, then its sums, both multiples of 16 bytes. Nothing if no tile is shared.
struct JoinSpace {
  int64_t arrived_bytes = 0, partials_bytes = 0;

  JoinSpace() = default;
  JoinSpace(const Deal& deal, int64_t sums_of_tile) {
    if (deal.whole_tiles()) return;
    arrived_bytes = round_up(deal.blocks * static_cast<int64_t>(sizeof(uint32_t)), 16);
    partials_bytes = deal.blocks * 2 * sums_of_tile * static_cast<int64_t>(sizeof(float));
  }

  int64_t bytes() const { return arrived_bytes + partials_bytes; }
  Join at(void* workspace) const {
    uint8_t* const space = static_cast<uint8_t*>(workspace);
    return {reinterpret_cast<uint32_t*>(space), reinterpret_cast<float4*>(space + arrived_bytes)};
  }
  cudaError_t clear(const Join& join, cudaStream_t stream) const {
    return arrived_bytes == 0 ? cudaSuccess : cudaMemsetAsync(join.arrived, 0, static_cast<size_t>(arrived_bytes), stream);
  }
};

}  // namespace bitmask::cuda
