// What the CPU implementations of all products share: how the work is split, and the memory it needs meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "layout.h"
#include "parallel.h"
#include "tensors.h"

namespace bitmask {

// Bytes that one task streams: at least, so that starting it is cheap, and at most, so that Ctrl-C need not wait.
constexpr int64_t kLeastTaskBytes = 32 << 10;
constexpr int64_t kMostTaskBytes = 4 << 20;
constexpr int64_t kTasksPerThread = 4;

// Packed bytes from which on threads share the packing.
constexpr int64_t kLeastPackBytes = 1 << 20;

inline int64_t threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// How many tasks to make of work that touches so many bytes.
inline int64_t task_count(int64_t bytes) {
  return std::max(std::min(threads() * kTasksPerThread, bytes / kLeastTaskBytes), bytes / kMostTaskBytes);
}

// Bytes that a product of m rows with so many elements of W is taken to touch: arithmetic costs time as well, a vector unit about as much
// for 64 rows as memory for a byte.
inline int64_t product_bytes(int64_t elements, int64_t m, int64_t width) { return elements * (width + m / 64); }

// Groups of columns that kernels take at a time.
inline int64_t groups_of(int64_t cols) { return blocks_across(cols, kGroup); }

// Runs body(index) for every task; each returns the first faulty row that it meets, or `none`. Returns the first of all, whatever the
// threads' order.
template <typename Body>
int64_t first_fault(int64_t count, int64_t bytes, int64_t none, const Body& body) {
  std::vector<int64_t> faults(static_cast<size_t>(count), none);
  for_each_task(count, bytes, [&](int64_t index) { faults[static_cast<size_t>(index)] = body(index); });
  return faults.empty() ? none : *std::min_element(faults.begin(), faults.end());
}

// Borders of at most `pieces` ranges of [0, count) that cost about the same; cost_before(i) is what all before i cost. Costs that do not
// ascend still give ranges that cover all of it once.
template <typename Cost>
std::vector<int64_t> split_by_cost(int64_t count, int64_t pieces, const Cost& cost_before) {
  const int64_t total = cost_before(count);
  std::vector<int64_t> borders{0};
  for (int64_t piece = 1; piece < pieces; ++piece) {
    const int64_t cost = total / pieces * piece;
    int64_t low = borders.back(), high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (cost_before(middle) < cost) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    if (low > borders.back() && low < count) borders.push_back(low);
  }
  borders.push_back(count);
  return borders;
}

// Calls block(first, count) for blocks of m rows that are about equal, whole tiles and at most most_rows, which is a multiple of tile_rows:
// so what is packed at a time is bounded, whatever m is.
template <typename Block>
void for_each_block(int64_t m, int64_t most_rows, int64_t tile_rows, const Block& block) {
  if (m == 0) return;
  const int64_t count = (m + most_rows - 1) / most_rows;
  const int64_t tiles = ((m + count - 1) / count + tile_rows - 1) / tile_rows;
  const int64_t rows = tiles * tile_rows;
  for (int64_t first = 0; first < m; first += rows) block(first, std::min(rows, m - first));
}

// Rows of a weight that a task multiplies with m rows: a fair share for each thread, of which `most` are expanded at a time.
inline int64_t tile_rows_of(int64_t rows, int64_t m, int64_t most) {
  constexpr int64_t kLeast = 32;
  constexpr int64_t kFewRows = 32;  // of m: they reuse a tile too little to pay for one that outgrows the first cache
  const int64_t fair = (rows / (threads() * kTasksPerThread) + kLeast - 1) / kLeast * kLeast;
  return std::max(std::min(fair, m <= kFewRows ? kLeast : most), kLeast);
}

inline Tensor empty_bytes(int64_t bytes) { return empty(std::vector<int64_t>{bytes}, aoti_torch_dtype_uint8()); }

// Memory of this thread, aligned to a cache line and kept from call to call: mapping it anew costs as much as a small product.
inline void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset(std::aligned_alloc(64, static_cast<size_t>(bytes + 63) / 64 * 64));
    size = memory == nullptr ? 0 : bytes;
    if (memory == nullptr) throw std::bad_alloc();
  }
  return memory.get();
}

// Rows [m, cols] repacked into the tiles of `kernels` by pack(first row, rows, tiles), in parallel where there is much of it.
template <typename Kernels, typename Pack>
Tensor pack_tiles(const Kernels& kernels, int64_t m, int64_t cols, const Pack& pack) {
  const int64_t bytes = kernels.tiles_bytes(m, cols);
  const Tensor tiles = empty_bytes(bytes);
  uint8_t* const packed = mutable_bytes(tiles);
  const int64_t rows = bytes < kLeastPackBytes ? m : kernels.tile_rows, count = (m + rows - 1) / rows;
  for_each_task(count, 2 * bytes / count, [&](int64_t task) {
    const int64_t first = task * rows;
    pack(first, std::min(rows, m - first), packed + kernels.tiles_bytes(first, cols));
  });
  return tiles;
}

}  // namespace bitmask
