// Launchers of the CUDA kernels: plain pointers to device memory, sizes, a stream. They allocate nothing, wait for nothing, and may be
// captured in a CUDA graph. Sizes have been checked by the caller; contents have not: kernels touch nothing outside of the buffers they
// are given, whatever these hold.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../layout.h"

namespace bitmask::cuda {

// A word of device memory that proves a weight: kNoFault, or the lowest row that is faulty (an offset out of order or out of range, a
// popcount that does not lead to the next offset, padding bits set); of blocks the lowest faulty line of the index, of 2:4 the lowest row
// with faulty metadata. Kernels only lower it.
using Fault = unsigned long long;
constexpr Fault kNoFault = ~Fault{0};

// ---------------------------------------------------------------------------------------------------------------- codec

// Bytes of scratch memory that compress and decompress take; aligned to 16 bytes, contents irrelevant.
int64_t codec_workspace_bytes(const Geometry& g);

// *nnz = how many elements of dense [rows, cols] are not zero.
cudaError_t count_nonzero(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, int64_t* nnz, cudaStream_t stream);

// Reads `dense` once. Writes bitmasks [rows, bitmask_bytes(cols)], row_offsets [rows], *nnz, and the first `capacity` values.
cudaError_t compress(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* row_offsets,
                     void* values, int64_t capacity, int64_t* nnz, void* workspace, cudaStream_t stream);

// Proves the rows [begin, end) and writes them to dense [end - begin, cols], unless that is null. `fault` is set to kNoFault first if
// `first` says that this is the first part of the weight. What is written for a weight that proves faulty is worthless.
cudaError_t decompress(const BitmaskMatrix& w, int64_t begin, int64_t end, int width, void* dense, bool first, Fault* fault,
                       void* workspace, cudaStream_t stream);

// Sets all bits of `bytes` bytes, which is NaN for every floating-point dtype, if the weight has proven faulty.
cudaError_t poison(void* data, int64_t bytes, const Fault* fault, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------------------------- linear

// Dtypes that products are of, as cpu::LinearDtype; float64 has kernels for blocks alone.
enum LinearDtype { kFloat32, kBfloat16, kFloat16, kFloat64 };

// Bytes of an element.
constexpr int64_t width_of(LinearDtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// y [m, rows] = x [m, cols] W^T + bias [rows], all of one dtype, summed in fp32 in an order that depends on the sizes alone. `bias` may be
// null. A faulty row of W gives NaN in its column of y, since a kernel cannot throw.
struct LinearParams {
  BitmaskMatrix w;
  const void* x;
  const void* bias;
  void* y;
  int64_t m;
  LinearDtype dtype;
};

// What the launchers ask of a GPU, so that they can be planned without one.
struct Device {
  int multiprocessors;
  int shared_bytes;         // that one block may have
  bool warpgroups = false;  // whether it has the instructions of sm_90a, and kernels were built for them
};

// How a product is to be done.
enum class LinearWay {
  kStream,    // CUDA cores, few rows of x: W is one stream of bytes
  kMultiply,  // tensor cores, more rows of x: W is expanded in registers, as fragments
  kLibrary,   // decompressed a part at a time and multiplied by cuBLAS
};

struct LinearPlan {
  LinearWay way;
  int64_t workspace_bytes;  // aligned to 16 bytes; contents irrelevant
};

LinearPlan plan_linear(const LinearParams& params, const Device& device);

// Both need params.m to be within what plan_linear chooses them for.
cudaError_t linear_stream(const LinearParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t linear_multiply(const LinearParams& params, const Device& device, void* workspace, cudaStream_t stream);

// ---------------------------------------------------------------------------------------------------------------- blocks

// The kept blocks of a block-sparse weight, line by line, as BlockMatrix has them, but on the GPU and not proven: kernels prove each line
// that they walk. A line is faulty if its starts are out of order or out of range, or its positions do not ascend from 0 on, below `limit`;
// so are the first line, unless it starts at 0, and the last one, unless it ends at `blocks`.
struct BlockIndex {
  const int64_t* starts;     // [lines + 1]
  const int64_t* positions;  // [blocks]
  const int64_t* order;      // [blocks]: where each block lies in values; null where they lie in the order of the lines
  int64_t lines;
  int64_t blocks;
  int64_t limit;  // of positions
};

// Proves all lines; sets `fault` to kNoFault or the lowest faulty line. `lines` [blocks], unless it is null, gets the line of each block,
// in [0, index.lines) whatever the index holds.
cudaError_t prove_block_index(const BlockIndex& index, int64_t* lines, Fault* fault, cudaStream_t stream);

// Proves that the order of an index by columns says where the blocks lie row by row; lowers `fault` to the line of a block for which it
// does not. `lines` are those that prove_block_index made. `workspace`: [blocks] int64.
cudaError_t prove_block_order(const BlockIndex& by_column, const int64_t* lines, Fault* fault, void* workspace, cudaStream_t stream);

// Proves that an index by columns has the blocks of an index by rows, whose blocks lie in its own order; lowers `fault` to the line of a
// block for which it has not.
cudaError_t prove_transposed(const BlockIndex& by_row, const BlockIndex& by_column, Fault* fault, cudaStream_t stream);

// schedule [lines]: the lines, those with many blocks first (of equally many, the lower one first), so that what is dealt last is short.
// Of faulty lines any number of blocks may be taken. `lines` is less than 2^31.
cudaError_t schedule_lines(const BlockIndex& index, int32_t* schedule, cudaStream_t stream);

// y [m, rows] = x [m, cols] W^T + bias [rows] or, transposed, y [m, cols] = x [m, rows] W, W being block-sparse, all of one dtype. Summed
// in fp32 (float64 in float64) in an order that depends on the sizes and on the index alone. Lines are block rows, transposed block
// columns; a faulty line gives NaN in its columns of y. Elements of blocks past the edges of W count for nothing, whatever they are.
struct BlockParams {
  BlockIndex index;
  const void* values;  // [blocks][block_rows][block_cols]
  int64_t rows, cols;  // of W
  int64_t block_rows, block_cols;
  bool transposed;
  const void* x;
  const void* bias;  // null: none
  void* y;
  int64_t m;
  LinearDtype dtype;
  bool tf32;           // whether float32 may be multiplied as tf32, by tensor cores
  const Fault* fault;  // unless it is null or holds kNoFault, all of y becomes NaN

  // What is multiplied has this many columns; a block takes so many of them.
  __host__ __device__ int64_t depth() const { return transposed ? rows : cols; }
  __host__ __device__ int64_t block_depth() const { return transposed ? block_rows : block_cols; }
  // y has this many columns; a line is so many of them.
  __host__ __device__ int64_t across() const { return transposed ? cols : rows; }
  __host__ __device__ int64_t block_across() const { return transposed ? block_cols : block_rows; }
};

// values [blocks][block_rows][block_cols] = the kept blocks of g^T x, g [m, rows], x [m, cols]: the gradient of W's values. Elements past
// the edges of W become zero.
struct BlockSampleParams {
  BlockIndex index;      // by rows
  const int64_t* lines;  // [blocks], from prove_block_index
  void* values;
  int64_t rows, cols;
  int64_t block_rows, block_cols;
  const void* g;
  const void* x;
  int64_t m;
  LinearDtype dtype;
  bool tf32;
  const Fault* fault;  // unless it holds kNoFault, all values become NaN; what it does not prove stays within the buffers all the same
};

// How a product with blocks is to be done.
enum class BlockWay {
  kStream,     // few rows of x: the kept blocks are one stream of bytes
  kMultiply,   // tensor cores, by the instructions that every GPU from sm_80 on has
  kWarpgroup,  // tensor cores, by those of sm_90a
  kCores,      // CUDA cores: any dtype, blocks of any shape
};

struct BlockPlan {
  BlockWay way;
  int64_t workspace_bytes;  // aligned to 16 bytes; contents irrelevant
};

// The one table of which kernel does what.
BlockPlan plan_block(const BlockParams& params, const Device& device);
BlockPlan plan_block_sample(const BlockSampleParams& params, const Device& device);

// Each does what the function beside it says that it takes, and returns cudaErrorInvalidValue for anything else. The cores take everything.
bool block_stream_takes(const BlockParams& params, const Device& device);
bool block_multiply_takes(const BlockParams& params, const Device& device);
bool block_warpgroup_takes(const BlockParams& params, const Device& device);
cudaError_t block_stream(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t block_multiply(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t block_warpgroup(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t block_cores(const BlockParams& params, const Device& device, void* workspace, cudaStream_t stream);
int64_t block_stream_workspace_bytes(const BlockParams& params, const Device& device);
int64_t block_multiply_workspace_bytes(const BlockParams& params, const Device& device);
int64_t block_warpgroup_workspace_bytes(const BlockParams& params, const Device& device);
int64_t block_cores_workspace_bytes(const BlockParams& params, const Device& device);

bool block_sample_takes(const BlockSampleParams& params, const Device& device);
bool block_sample_warpgroup_takes(const BlockSampleParams& params, const Device& device);
cudaError_t block_sample(const BlockSampleParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t block_sample_warpgroup(const BlockSampleParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t block_sample_cores(const BlockSampleParams& params, const Device& device, void* workspace, cudaStream_t stream);
int64_t block_sample_workspace_bytes(const BlockSampleParams& params, const Device& device);
int64_t block_sample_warpgroup_workspace_bytes(const BlockSampleParams& params, const Device& device);
int64_t block_sample_cores_workspace_bytes(const BlockSampleParams& params, const Device& device);

// ---------------------------------------------------------------------------------------------------------------- 2:4

// Packs dense [rows, cols], cols a multiple of 4: values [rows, cols / 2], metadata [rows, bitmask_bytes(cols)] (FORMAT.md). `fault`
// becomes kNoFault or, unless `prune`, the lowest row that has a group of more than two non-zeros; what is written is then worthless. With
// `prune` the two largest magnitudes of each group are kept. `width`: 1, 2, 4 or 8 bytes.
cudaError_t pack_24(const void* dense, const Geometry& g, int width, const ZeroTest& zero_test, Magnitude magnitude, bool prune,
                    void* values, uint8_t* metadata, Fault* fault, cudaStream_t stream);

// Proves the rows [begin, end) of the metadata and writes them to dense [end - begin, cols], unless that is null. `fault` is set to
// kNoFault first if `first` says that this is the first part of the weight. What is written for faulty metadata is worthless.
cudaError_t unpack_24(const TwoFourMatrix& w, int64_t begin, int64_t end, int width, void* dense, bool first, Fault* fault,
                      cudaStream_t stream);

// Sets to zero what pack_24 would not keep, in place.
cudaError_t prune_24(void* dense, const Geometry& g, int width, const ZeroTest& zero_test, Magnitude magnitude, cudaStream_t stream);

// The same in rows and in columns at once: of each 4 x 4 elements the eight of the largest sum of magnitudes, as the CPU does it.
cudaError_t prune_24_transposable(void* dense, const Geometry& g, LinearDtype dtype, cudaStream_t stream);

// y [m, rows] = x [m, cols] W^T + bias [rows], W being 2:4 as a whole or block-sparse with kept blocks that are 2:4. Elements that are not
// stored take no part, as with torch's 2:4 kernels. Row r's metadata are proven by whoever multiplies with them: a faulty row of W, or line
// of blocks, gives NaN in its columns of y.
struct TwoFourParams {
  const void* values;       // [rows, cols / 2], or [blocks][block_rows][block_cols / 2]
  const uint8_t* metadata;  // [rows, bitmask_bytes(cols)], or [blocks][block_rows][bitmask_bytes(block_cols)]
  int64_t rows, cols;
  BlockIndex index;  // by rows; starts are null where W is 2:4 as a whole, and then the block is all of W
  int64_t block_rows, block_cols;
  const void* x;
  const void* bias;  // null: none
  void* y;
  int64_t m;
  LinearDtype dtype;

  __host__ __device__ bool has_blocks() const { return index.starts != nullptr; }
};

enum class TwoFourWay {
  kStream,    // few rows of x: W is one stream of bytes
  kMultiply,  // sparse tensor cores
  kLibrary,   // unpacked first, then multiplied by cuBLAS, or by the kernels for blocks: what is not stored takes part as zero
};

struct TwoFourPlan {
  TwoFourWay way;
  int64_t workspace_bytes;  // aligned to 16 bytes; contents irrelevant
};

TwoFourPlan plan_two_four(const TwoFourParams& params, const Device& device);

// Each does what the function beside it says that it takes, as those for blocks.
bool two_four_stream_takes(const TwoFourParams& params, const Device& device);
bool two_four_multiply_takes(const TwoFourParams& params, const Device& device);
cudaError_t two_four_stream(const TwoFourParams& params, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t two_four_multiply(const TwoFourParams& params, const Device& device, void* workspace, cudaStream_t stream);
int64_t two_four_stream_workspace_bytes(const TwoFourParams& params, const Device& device);
int64_t two_four_multiply_workspace_bytes(const TwoFourParams& params, const Device& device);

}  // namespace bitmask::cuda
