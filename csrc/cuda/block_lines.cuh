// Lines of an index of blocks, proven while they are walked: whatever the index holds, nothing is read outside of it.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace bitmask::cuda {

// The blocks [begin, end) of a line; none if its starts cannot be.
struct BlockLine {
  int64_t begin, end;
  bool sound;  // so far: positions are for `holds`

  __device__ __forceinline__ BlockLine(const BlockIndex& index, int64_t line) : begin(index.starts[line]), end(index.starts[line + 1]) {
    sound =
        begin >= 0 && begin <= end && end <= index.blocks && (line > 0 || begin == 0) && (line + 1 < index.lines || end == index.blocks);
    sound = sound && end - begin <= index.limit;  // or some position would come twice, and walking all lines take lines times blocks
    if (!sound) begin = end = 0;
  }

  // One that needs no proof.
  __device__ __forceinline__ BlockLine(int64_t begin, int64_t end) : begin(begin), end(end), sound(true) {}

  // Whether block i of the line may lie at this position, its own.
  __device__ __forceinline__ bool holds(const BlockIndex& index, int64_t i, int64_t position) const {
    return position >= 0 && position < index.limit && (i == begin || index.positions[i - 1] < position);
  }
};

// Where block i of an index lies in values, and whether it can lie there.
__device__ __forceinline__ int64_t place_of(const BlockIndex& index, int64_t i) { return index.order == nullptr ? i : index.order[i]; }
__device__ __forceinline__ bool is_place(const BlockIndex& index, int64_t place) { return place >= 0 && place < index.blocks; }

// Whether what others have proven, if there is such, is sound.
__device__ __forceinline__ bool is_proven(const Fault* fault) { return fault == nullptr || *fault == kNoFault; }

}  // namespace bitmask::cuda
