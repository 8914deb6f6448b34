// Proofs of an index of blocks, and the order in which its lines are dealt.
//
//   starts      0     3  3        7    line by line; a block finds its line by binary search, so that one long line keeps
//   positions   1 4 5    0 2 3 6       as many threads busy as many short ones
//   order       0 2 5    1 3 4 6       by columns: where each block lies row by row
//
// Each thread proves what it alone can see wrong; together these are all that can be. What one proof relies on, an earlier kernel proved.
//
// On an H100 a launch takes 1 to 2 us of a stream, which hides what it does for up to some 100 000 blocks: a search is log2(lines) loads of
// about 250 cycles in turn, 1.3 us for 512 lines. A schedule of n <= 4096 lines takes log2(n)^2 / 2 steps of about 60 cycles, those of more
// than 2048 lines twice as many: 1.2 us for 256 lines, 5 us for 4096. Not timed.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "block_lines.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace bitmask::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }

__device__ __forceinline__ void report(Fault* fault, int64_t line) { atomicMin(fault, static_cast<Fault>(line)); }

// The last of the lines [0, lines), or line 0, that starts at or before block i: where starts ascend from 0 on, the one that holds it.
__device__ __forceinline__ int64_t find_line(const BlockIndex& index, int64_t i, int64_t lines) {
  int64_t low = 0;
  for (int64_t high = lines; high - low > 1;) {
    const int64_t middle = low + (high - low) / 2;
    (index.starts[middle] <= i ? low : high) = middle;
  }
  return low;
}

// ---------------------------------------------------------------------------------------------------------------- proofs

__global__ void __launch_bounds__(kThreads) prove_starts(const BlockIndex index, Fault* fault) {
  const int64_t line = thread_number();
  if (line < index.lines && !BlockLine(index, line).sound) report(fault, line);
}

// After prove_starts: starts ascend as far as the lowest fault, so that no line below it is missed. Whatever else is reported meanwhile
// is a faulty line as well.
__global__ void __launch_bounds__(kThreads) prove_positions(const BlockIndex index, int64_t* lines, Fault* fault) {
  const int64_t i = thread_number();
  if (i >= index.blocks) return;
  const Fault lowest = ptx::load_relaxed(reinterpret_cast<const uint64_t*>(fault));
  const bool sound = lowest >= static_cast<Fault>(index.lines);
  const int64_t line = find_line(index, i, sound ? index.lines : static_cast<int64_t>(lowest));
  if (lines != nullptr) lines[i] = line;
  const BlockLine walk(index, line);
  if (i >= walk.begin && i < walk.end && !walk.holds(index, i, index.positions[i])) report(fault, line);
}

// places[b] = the block of the index that lies at place b. Where several claim it, one of them wins.
__global__ void __launch_bounds__(kThreads) scatter_places(const BlockIndex by_column, uint64_t* places) {
  const int64_t i = thread_number();
  if (i >= by_column.blocks) return;
  const int64_t place = place_of(by_column, i);
  if (is_place(by_column, place)) ptx::store_relaxed(places + place, static_cast<uint64_t>(i));
}

// If no place is out of range or claimed twice, none is left over, and all places are known.
__global__ void __launch_bounds__(kThreads)
    prove_places(const BlockIndex by_column, const int64_t* lines, const uint64_t* places, Fault* fault) {
  const int64_t i = thread_number();
  if (i >= by_column.blocks) return;
  const int64_t place = place_of(by_column, i), row = by_column.positions[i], column = lines[i];
  bool sound = is_place(by_column, place) && places[place] == static_cast<uint64_t>(i);
  if (sound && place > 0 && places[place - 1] < static_cast<uint64_t>(by_column.blocks)) {
    const uint64_t before = places[place - 1];
    const int64_t row_before = by_column.positions[before];
    sound = row_before < row || (row_before == row && lines[before] < column);
  }
  if (!sound) report(fault, column);
}

// Blocks of an index by columns are all different if its lines are sound. Those that lie at their places in one by rows are then as many
// as it has, so that none is missing.
__global__ void __launch_bounds__(kThreads) prove_same(const BlockIndex by_row, const BlockIndex by_column, Fault* fault) {
  const int64_t i = thread_number();
  if (i < by_column.lines && !BlockLine(by_column, i).sound) report(fault, i);
  if (i >= by_column.blocks) return;
  const int64_t column = find_line(by_column, i, by_column.lines), row = by_column.positions[i], place = place_of(by_column, i);
  const BlockLine walk(by_column, column);
  bool sound = i >= walk.begin && i < walk.end && walk.holds(by_column, i, row) && row < by_row.lines && is_place(by_row, place);
  sound = sound && by_row.starts[row] <= place && place < by_row.starts[row + 1] && by_row.positions[place] == column;
  if (!sound) report(fault, column);
}

// ---------------------------------------------------------------------------------------------------------------- schedule

// Lines are sorted by a network of comparators, whose steps need no memory but the schedule: in runs of doubling length, the first step of
// each length compares elements at mirrored places of its halves, further steps elements at a distance that halves (Batcher's bitonic
// sorter; Knuth, "The Art of Computer Programming", volume 3, 5.3.4). Lower places always get lower keys, so whatever is missing at the
// end counts as the highest key. All steps that stay within a tile are one launch: for few lines the only one.
constexpr int64_t kTile = 4096;
constexpr int kSortThreads = 1024;

// Ascends by descending number of blocks, then by line. 2^32 blocks of a line would have positions of 32 GiB.
__device__ __forceinline__ uint64_t key_of(const BlockIndex& index, int64_t line) {
  const BlockLine walk(index, line);
  const uint64_t blocks = static_cast<uint64_t>(min(walk.end - walk.begin, int64_t{UINT32_MAX}));
  return (UINT32_MAX - blocks) << 32 | static_cast<uint64_t>(line);
}

// The two places that comparator i of a step compares. `distance` is a power of two; `mirrored` says that the step is the first of its
// runs, which are twice as long.
struct Comparator {
  int64_t low, high;

  __device__ Comparator(int64_t i, int64_t distance, bool mirrored) {
    const int64_t inside = i & (distance - 1), run = (i - inside) * 2;
    low = run + inside;
    high = run + (mirrored ? 2 * distance - 1 - inside : distance + inside);
  }
};

// One step of a tile in shared memory, for a whole block.
__device__ __forceinline__ void sort_step(uint64_t* keys, int64_t count, int64_t distance, bool mirrored) {
  for (int64_t i = threadIdx.x; i < count / 2; i += blockDim.x) {
    const Comparator at(i, distance, mirrored);
    const uint64_t low = keys[at.low], high = keys[at.high];
    keys[at.low] = min(low, high);
    keys[at.high] = max(low, high);
  }
  __syncthreads();
}

// Sorts tiles of `tile` lines, a power of two. `merging`: the schedule has sorted runs already, of which mirrored and far elements have
// been compared.
__global__ void __launch_bounds__(kSortThreads) sort_tiles(const BlockIndex index, int64_t tile, bool merging, int32_t* schedule) {
  uint64_t* const keys = ptx::dynamic_shared<uint64_t>();
  const int64_t begin = int64_t{blockIdx.x} * tile, count = min(tile, index.lines - begin);
  for (int64_t i = threadIdx.x; i < tile; i += blockDim.x) {
    keys[i] = i < count ? key_of(index, merging ? schedule[begin + i] : begin + i) : UINT64_MAX;
  }
  __syncthreads();
  for (int64_t half = merging ? tile : 1; half < tile; half *= 2) {
    sort_step(keys, tile, half, true);
    for (int64_t distance = half / 2; distance > 0; distance /= 2) sort_step(keys, tile, distance, false);
  }
  for (int64_t distance = merging ? tile / 2 : 0; distance > 0; distance /= 2) sort_step(keys, tile, distance, false);
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) schedule[begin + i] = static_cast<int32_t>(keys[i] & INT32_MAX);
}

// One step of elements that are farther apart than a tile reaches.
__global__ void __launch_bounds__(kThreads) sort_far(const BlockIndex index, int64_t distance, bool mirrored, int32_t* schedule) {
  const Comparator at(thread_number(), distance, mirrored);
  if (at.high >= index.lines) return;
  const int32_t low = schedule[at.low], high = schedule[at.high];
  if (key_of(index, low) <= key_of(index, high)) return;
  schedule[at.low] = high;
  schedule[at.high] = low;
}

// ---------------------------------------------------------------------------------------------------------------- launching

// A thread for each of so many items.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t items, cudaStream_t stream, const Arguments&... arguments) {
  if (items == 0) return cudaSuccess;
  return launch_kernel(kernel, {(items + kThreads - 1) / kThreads, kThreads}, stream, arguments...);
}

cudaError_t launch_tiles(const BlockIndex& index, int64_t tile, bool merging, int32_t* schedule, cudaStream_t stream) {
  const int64_t threads = tile < 64 ? 32 : tile / 2 < kSortThreads ? tile / 2 : kSortThreads;
  const LaunchSize size{(index.lines + tile - 1) / tile, static_cast<int>(threads), tile * static_cast<int64_t>(sizeof(uint64_t))};
  return launch_kernel(sort_tiles, size, stream, index, tile, merging, schedule);
}

}  // namespace

cudaError_t prove_block_index(const BlockIndex& index, int64_t* lines, Fault* fault, cudaStream_t stream) {
  const bool lineless = index.lines == 0;
  const int no_fault = lineless && index.blocks > 0 ? 0 : 0xff;  // line 0 would have to have them
  cudaError_t error = cudaMemsetAsync(fault, no_fault, sizeof(Fault), stream);
  if (error == cudaSuccess && lineless && lines != nullptr) {
    error = cudaMemsetAsync(lines, 0, static_cast<size_t>(index.blocks) * sizeof(int64_t), stream);
  }
  if (error == cudaSuccess) error = launch(prove_starts, index.lines, stream, index, fault);
  if (error == cudaSuccess && !lineless) error = launch(prove_positions, index.blocks, stream, index, lines, fault);
  return error;
}

cudaError_t prove_block_order(const BlockIndex& by_column, const int64_t* lines, Fault* fault, void* workspace, cudaStream_t stream) {
  uint64_t* const places = static_cast<uint64_t*>(workspace);
  const cudaError_t error = launch(scatter_places, by_column.blocks, stream, by_column, places);
  return error != cudaSuccess ? error : launch(prove_places, by_column.blocks, stream, by_column, lines, places, fault);
}

cudaError_t prove_transposed(const BlockIndex& by_row, const BlockIndex& by_column, Fault* fault, cudaStream_t stream) {
  if (by_column.lines == 0) return by_column.blocks == 0 ? cudaSuccess : cudaMemsetAsync(fault, 0, sizeof(Fault), stream);
  const int64_t items = by_column.lines > by_column.blocks ? by_column.lines : by_column.blocks;
  return launch(prove_same, items, stream, by_row, by_column, fault);
}

cudaError_t schedule_lines(const BlockIndex& index, int32_t* schedule, cudaStream_t stream) {
  if (index.lines == 0) return cudaSuccess;
  int64_t tile = 1;
  while (tile < index.lines && tile < kTile) tile *= 2;
  cudaError_t error = launch_tiles(index, tile, false, schedule, stream);
  for (int64_t half = tile; half < index.lines && error == cudaSuccess; half *= 2) {
    for (int64_t distance = half; distance >= tile && error == cudaSuccess; distance /= 2) {
      const int64_t comparators = (index.lines + 2 * distance - 1) / (2 * distance) * distance;
      error = launch(sort_far, comparators, stream, index, distance, distance == half, schedule);
    }
    if (error == cudaSuccess) error = launch_tiles(index, tile, true, schedule, stream);
  }
  return error;
}

}  // namespace bitmask::cuda
