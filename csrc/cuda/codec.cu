// Compress and decompress. Both are one scan over the bytes of the bitmask, rows being no border: one row of a billion columns and a
// million rows of three keep a GPU equally busy.
//
//   bitmask   [  tile 0  |  tile 1  |  ...  ]   a tile: kTileBytes consecutive bytes, one block
//   byte      bits of 8 elements, an octet (fewer in the last byte of a row); byte i of a warp's share is lane i % 32's
//   dense     [ octets of tile 0 | ... ]        contiguous: bytes in order are elements in order
//   values    [ . | . . | . |  ...    ]         contiguous: those of a tile begin at the number of bits set before it (scan.cuh)
//
// Dense memory is read or written once, octets straight between registers and global memory where they are whole and aligned, else by way
// of shared memory. Values always go by way of shared memory, packed, since only there single elements are cheap.
#include <cuda_runtime.h>
#include <ptx.cuh>

#include <cstdint>

#include "codec_launch.cuh"
#include "codec_tile.cuh"
#include "kernels.h"
#include "scan.cuh"

namespace bitmask::cuda {
namespace {

using namespace codec;

// ---------------------------------------------------------------------------------------------------------------- compress

struct CompressParams {
  const uint8_t* dense;
  Bytes bytes;
  ZeroWords zero_test;
  uint8_t* bitmasks;
  int64_t* row_offsets;
  void* values;
  int64_t capacity;  // elements of `values`
  int64_t* nnz;
  scan::Workspace workspace;
};

// The octets of a thread; what lies past the matrix is zero.
template <int W, bool kStaged>
__device__ __forceinline__ void load_octets(const CompressParams& p, const Tile<W>& tile, TileMemory<W>& memory,
                                            Octet<W> (&octets)[kBytes<W>]) {
  if constexpr (kStaged) {
    const DenseTile<W> dense(p.dense, tile, p.bytes);
    dense.span.copy_to(memory.elements);
    dense.span.finish_copy();
#pragma unroll
    for (int i = 0; i < kBytes<W>; ++i) {
      octets[i] = Octet<W>{};
      if (tile.byte(i) >= tile.count) continue;
      dense.for_octet(memory.elements, tile.begin + tile.byte(i), p.bytes,
                      [&](int e, const Element<W>& element) { set(octets[i], e, element); });
    }
  } else {
    const Octet<W>* const dense = reinterpret_cast<const Octet<W>*>(p.dense) + tile.begin;
#pragma unroll
    for (int i = 0; i < kBytes<W>; ++i) octets[i] = tile.byte(i) < tile.count ? dense[tile.byte(i)] : Octet<W>{};
  }
}

// Blocks that a multiprocessor is to hold at least, which bounds their registers; with more, octets spill.
template <int W>
[[maybe_unused]] constexpr int kCompressBlocks = W == 1 || W == 16 ? 4 : 5;

// W: bytes of an element. kStaged: octets may be partial or not aligned, and are read by way of shared memory.
template <int W, bool kStaged>
__global__ void __launch_bounds__(kThreads, kCompressBlocks<W>) compress_tiles(const CompressParams p) {
  TileMemory<W>& memory = *ptx::dynamic_shared<TileMemory<W>>();
  const Tile<W> tile(scan::take_tile(p.workspace, memory.scan), p.bytes);

  Octet<W> octets[kBytes<W>];
  load_octets<W, kStaged>(p, tile, memory, octets);
  uint32_t bits[kBytes<W>];
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
    bits[i] = nonzero_bits(octets[i], p.zero_test);
    if (tile.byte(i) < tile.count) p.bitmasks[tile.begin + tile.byte(i)] = static_cast<uint8_t>(bits[i]);
  }
  scan_bits(tile, bits, p.workspace, 0, memory);

  const Span<W> values = values_of<W>(memory.scan, p.values, p.capacity);
  Element<W>* places[kBytes<W>];
  find_values(values, tile, memory, places);
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if ((bits[i] >> e & 1) != 0) *places[i]++ = get(octets[i], e);
    }
  }
  for_each_row(tile, p.bytes, memory, [&](int64_t row, int64_t offset) { p.row_offsets[row] = offset; });
  if (threadIdx.x == 0 && tile.last) *p.nnz = memory.scan.before + memory.scan.sum;
  __syncthreads();
  values.copy_from(memory.elements);
}

// ---------------------------------------------------------------------------------------------------------------- decompress

// A part of a weight: pointers to its first row, row numbers counted from there.
struct DecompressParams {
  const void* values;
  int64_t nnz;
  const uint8_t* bitmasks;
  const int64_t* row_offsets;
  Bytes bytes;
  int64_t first_row;          // in the weight
  const int64_t* end_offset;  // of the row after the part; null if there is none
  Fault* fault;
  uint8_t* dense;
  scan::Workspace workspace;
};

__device__ __forceinline__ void report(const DecompressParams& p, int64_t row) {
  atomicMin(p.fault, static_cast<Fault>(p.first_row + row));
}

// Where the values of the part begin; within the values, whatever the offset says.
__device__ __forceinline__ int64_t start_of(const DecompressParams& p) { return max(int64_t{0}, min(p.row_offsets[0], p.nnz)); }

// Rows lead from their offsets to the next, as long as none is reported: whoever sees that a row does not begin where the row before it
// ends reports the row before.
template <int W>
__device__ __forceinline__ void prove_tile(const DecompressParams& p, const Tile<W>& tile, const TileMemory<W>& memory) {
  const int padding = p.bytes.cols % 8 == 0 ? 0 : 0xff << (p.bytes.cols % 8) & 0xff;
  for_each_row(tile, p.bytes, memory, [&](int64_t row, int64_t offset) {
    if (p.row_offsets[row] != offset || offset > p.nnz) report(p, row > 0 ? row - 1 : 0);
    if (p.first_row + row == 0 && offset != 0) report(p, 0);
    if (padding != 0 && (p.bitmasks[(row + 1) * p.bytes.row_bytes - 1] & padding) != 0) report(p, row);
  });
  if (threadIdx.x == 0 && tile.last) {
    const int64_t end = memory.scan.before + memory.scan.sum;
    if (end > p.nnz || end != (p.end_offset == nullptr ? p.nnz : *p.end_offset)) report(p, p.bytes.rows - 1);
  }
}

// The octet whose elements are where `bits` are set, one after the other from `from` on.
template <int W>
__device__ __forceinline__ Octet<W> expand(uint32_t bits, const Element<W>* from) {
  Octet<W> octet{};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if ((bits >> e & 1) != 0) set(octet, e, *from++);
  }
  return octet;
}

// How octets get to dense memory.
enum class Write {
  kNothing,  // the weight is only proven
  kOctets,   // whole and aligned, straight from registers
  kStaged,   // some partial, or not aligned: by way of shared memory
};

// Blocks that a multiprocessor is to hold at least, which bounds their registers; with more, some spill.
template <int W, Write kWrite>
[[maybe_unused]] constexpr int kDecompressBlocks = W == 16 ? 4 : (kWrite == Write::kStaged ? 5 : 6);

// W: bytes of an element.
template <int W, Write kWrite>
__global__ void __launch_bounds__(kThreads, kDecompressBlocks<W, kWrite>) decompress_tiles(const DecompressParams p) {
  TileMemory<W>& memory = *ptx::dynamic_shared<TileMemory<W>>();
  const Tile<W> tile(scan::take_tile(p.workspace, memory.scan), p.bytes);

  uint32_t bits[kBytes<W>];
#pragma unroll
  for (int i = 0; i < kBytes<W>; ++i) bits[i] = tile.byte(i) < tile.count ? p.bitmasks[tile.begin + tile.byte(i)] : 0;
  scan_bits(tile, bits, p.workspace, tile.index == 0 ? start_of(p) : 0, memory);

  if constexpr (kWrite == Write::kNothing) {
    prove_tile(p, tile, memory);
  } else {
    // What bits mark past the last value is not read; such a weight proves faulty.
    const Span<W> values = values_of<W>(memory.scan, p.values, p.nnz);
    values.copy_to(memory.elements);
    prove_tile(p, tile, memory);
    values.finish_copy();

    Element<W>* places[kBytes<W>];
    find_values(values, tile, memory, places);
    if constexpr (kWrite == Write::kOctets) {
      Octet<W>* const dense = reinterpret_cast<Octet<W>*>(p.dense) + tile.begin;
#pragma unroll
      for (int i = 0; i < kBytes<W>; ++i) {
        if (tile.byte(i) < tile.count) dense[tile.byte(i)] = expand<W>(bits[i], places[i]);
      }
    } else {
      Octet<W> octets[kBytes<W>];
#pragma unroll
      for (int i = 0; i < kBytes<W>; ++i) octets[i] = expand<W>(bits[i], places[i]);
      __syncthreads();  // the dense elements take the place of the values
      const DenseTile<W> dense(p.dense, tile, p.bytes);
#pragma unroll
      for (int i = 0; i < kBytes<W>; ++i) {
        if (tile.byte(i) >= tile.count) continue;
        dense.for_octet(memory.elements, tile.begin + tile.byte(i), p.bytes,
                        [&](int e, Element<W>& element) { element = get(octets[i], e); });
      }
      __syncthreads();
      dense.span.copy_from(memory.elements);
    }
  }
}

// Rows without columns have no bytes: each begins where the next does.
__global__ void __launch_bounds__(kThreads) prove_empty_rows(const DecompressParams p) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < p.bytes.rows; row += int64_t{gridDim.x} * kThreads) {
    const int64_t start = p.row_offsets[row];
    const int64_t next = row + 1 < p.bytes.rows ? p.row_offsets[row + 1] : p.end_offset == nullptr ? p.nnz : *p.end_offset;
    if (start < 0 || start > p.nnz || next != start || (p.first_row + row == 0 && start != 0)) report(p, row);
  }
}

// ---------------------------------------------------------------------------------------------------------------- count, poison

constexpr int kCountOctets = 4;  // that a thread loads before it looks at the first

// Adds to *nnz the elements that are not zero: `octets` octets, and before and behind them, where alignment or number is not enough for
// one, `head` and `tail` single elements.
template <int W>
__global__ void __launch_bounds__(kThreads)
    count_elements(const Element<W>* dense, int64_t head, int64_t octets, int64_t tail, const ZeroWords zero_test, int64_t* nnz) {
  const Octet<W>* const whole = reinterpret_cast<const Octet<W>*>(dense + head);
  const int64_t stride = int64_t{gridDim.x} * kThreads, thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int64_t count = 0;
  for (int64_t at = thread; at < octets; at += kCountOctets * stride) {
    Octet<W> loaded[kCountOctets];
#pragma unroll
    for (int i = 0; i < kCountOctets; ++i) loaded[i] = at + i * stride < octets ? whole[at + i * stride] : Octet<W>{};
#pragma unroll
    for (int i = 0; i < kCountOctets; ++i) count += __popc(nonzero_bits(loaded[i], zero_test));
  }
  if (thread < head + tail) {
    Octet<W> edge{};
    set(edge, 0, dense[thread < head ? thread : octets * 8 + thread]);
    count += nonzero_bits(edge, zero_test);
  }
  for (int step = kLanes / 2; step > 0; step /= 2) count += __shfl_xor_sync(scan::kAllLanes, count, step);
  if (threadIdx.x % kLanes == 0) atomicAdd(reinterpret_cast<unsigned long long*>(nnz), static_cast<unsigned long long>(count));
}

__global__ void __launch_bounds__(kThreads) fill_if_faulty(uint8_t* data, int64_t bytes, const Fault* fault) {
  if (*fault == kNoFault) return;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < bytes; i += int64_t{gridDim.x} * kThreads) data[i] = 0xff;
}

// ---------------------------------------------------------------------------------------------------------------- launching

constexpr int64_t kLoopBlocks = 2048;  // of kernels that loop: enough for any GPU

// A block for each tile, after the workspace has been zeroed.
template <int W, typename Params>
cudaError_t launch_tiles(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
  static_assert(sizeof(TileMemory<W>) <= 48 * 1024, "more must be asked for");
  const int64_t tiles = quotient_up(p.bytes.count, kTileBytes<W>);
  if (tiles > kMostTiles) return cudaErrorInvalidValue;
  const cudaError_t zeroed = cudaMemsetAsync(p.workspace.words, 0, static_cast<size_t>(scan::Workspace::bytes(tiles)), stream);
  return zeroed != cudaSuccess ? zeroed : launch_kernel(kernel, {tiles, kThreads, sizeof(TileMemory<W>)}, stream, p);
}

// Whether all octets of a matrix are whole and aligned.
template <int W>
bool whole_octets(const void* dense, int64_t cols) {
  return cols % 8 == 0 && aligned(dense, alignof(Octet<W>));
}

template <int W>
cudaError_t launch_compress(const CompressParams& p, cudaStream_t stream) {
  if (!aligned(p.dense, W) || !aligned(p.values, W)) return cudaErrorInvalidValue;
  const bool staged = !whole_octets<W>(p.dense, p.bytes.cols);
  return launch_tiles<W>(staged ? compress_tiles<W, true> : compress_tiles<W, false>, p, stream);
}

template <int W>
cudaError_t launch_decompress(const DecompressParams& p, cudaStream_t stream) {
  if (!aligned(p.dense, W) || !aligned(p.values, W)) return cudaErrorInvalidValue;
  const bool staged = !whole_octets<W>(p.dense, p.bytes.cols);
  return launch_tiles<W>(staged ? decompress_tiles<W, Write::kStaged> : decompress_tiles<W, Write::kOctets>, p, stream);
}

template <int W>
cudaError_t launch_count(const void* dense, int64_t elements, const ZeroWords& zero_test, int64_t* nnz, cudaStream_t stream) {
  if (!aligned(dense, W)) return cudaErrorInvalidValue;
  const int64_t skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dense) % alignof(Octet<W>)) / W;
  const int64_t to_aligned = skew == 0 ? 0 : static_cast<int64_t>(alignof(Octet<W>)) / W - skew;
  const int64_t head = to_aligned < elements ? to_aligned : elements;
  const int64_t octets = (elements - head) / 8, tail = (elements - head) % 8;
  const int64_t blocks = quotient_up(octets, kThreads * kCountOctets);
  const int64_t least = blocks < 1 ? 1 : blocks;
  return launch_kernel(count_elements<W>, {least < kLoopBlocks ? least : kLoopBlocks, kThreads}, stream,
                       static_cast<const Element<W>*>(dense), head, octets, tail, zero_test, nnz);
}

}  // namespace

int64_t codec_workspace_bytes(const Geometry& g) {
  return scan::Workspace::bytes(quotient_up(g.rows * bitmask_bytes(g.cols), kLeastTileBytes));
}

cudaError_t count_nonzero(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, int64_t* nnz, cudaStream_t stream) {
  const cudaError_t zeroed = cudaMemsetAsync(nnz, 0, sizeof(*nnz), stream);
  if (zeroed != cudaSuccess || g.rows == 0 || g.cols == 0) return zeroed;
  return for_width<16>(width, [&](auto bytes) { return launch_count<bytes>(dense, g.rows * g.cols, words_of(zero_test), nnz, stream); });
}

cudaError_t compress(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* row_offsets,
                     void* values, int64_t capacity, int64_t* nnz, void* workspace, cudaStream_t stream) {
  if (g.rows == 0 || g.cols == 0) {
    const cudaError_t zeroed = cudaMemsetAsync(nnz, 0, sizeof(*nnz), stream);
    if (zeroed != cudaSuccess || g.rows == 0) return zeroed;
    return cudaMemsetAsync(row_offsets, 0, static_cast<size_t>(g.rows) * sizeof(*row_offsets), stream);
  }
  const CompressParams p{static_cast<const uint8_t*>(dense), bytes_of(g), words_of(zero_test), bitmasks, row_offsets, values, capacity, nnz,
                         {static_cast<uint64_t*>(workspace)}};
  return for_width<16>(width, [&](auto bytes) { return launch_compress<bytes>(p, stream); });
}

cudaError_t decompress(const BitmaskMatrix& w, int64_t begin, int64_t end, int width, void* dense, bool first, Fault* fault,
                       void* workspace, cudaStream_t stream) {
  if (first) {
    const cudaError_t set = cudaMemsetAsync(fault, 0xff, sizeof(*fault), stream);
    if (set != cudaSuccess) return set;
  }
  if (begin == end) return cudaSuccess;
  const DecompressParams p{w.values,
                           w.nnz,
                           w.bitmasks + begin * bitmask_bytes(w.cols),
                           w.row_offsets + begin,
                           bytes_of({end - begin, w.cols}),
                           begin,
                           end < w.rows ? w.row_offsets + end : nullptr,
                           fault,
                           static_cast<uint8_t*>(dense),
                           {static_cast<uint64_t*>(workspace)}};
  if (w.cols == 0) {
    const int64_t blocks = quotient_up(end - begin, kThreads);
    return launch_kernel(prove_empty_rows, {blocks < kLoopBlocks ? blocks : kLoopBlocks, kThreads}, stream, p);
  }
  if (dense == nullptr) return launch_tiles<1>(decompress_tiles<1, Write::kNothing>, p, stream);
  return for_width<16>(width, [&](auto bytes) { return launch_decompress<bytes>(p, stream); });
}

cudaError_t poison(void* data, int64_t bytes, const Fault* fault, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const int64_t blocks = quotient_up(bytes, kThreads);
  return launch_kernel(fill_if_faulty, {blocks < kLoopBlocks ? blocks : kLoopBlocks, kThreads}, stream, static_cast<uint8_t*>(data), bytes,
                       fault);
}

}  // namespace bitmask::cuda
