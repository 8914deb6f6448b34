// The table of CPU kernels: plain pointers and sizes, one table per instruction set (isa_<name>.cpp fills it), one chosen at run time
// (dispatch.cpp). Kernels are single-threaded, allocate nothing and throw nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layout.h"

namespace bitmask::cpu {

// Compress and decompress for one element width. `dense` is row-major [rows, cols]; `bitmasks` is [rows, bitmask_bytes(cols)].
struct CodecKernels {
  // Writes every row of `bitmasks` (padding bits zero) and the number of its set bits to `counts` [rows].
  void (*build_bitmasks)(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* counts);

  // Writes the elements marked in `bitmasks`, in order, to `values`, never past `values` + nnz elements, whatever the bitmasks say.
  void (*pack_values)(const void* dense, const uint8_t* bitmasks, int64_t rows, int64_t cols, void* values, int64_t nnz);

  // Writes every element of `dense`, taking marked ones in order from `values`, never reading past `values` + nnz elements, whatever
  // the bitmasks say.
  void (*expand_values)(const void* values, int64_t nnz, const uint8_t* bitmasks, int64_t rows, int64_t cols, void* dense);
};

struct Kernels {
  const char* isa;
  CodecKernels codec[kWidths];  // indexed by log2 of the element width in bytes

  // Set bits in `bytes` bytes.
  int64_t (*count_bits)(const uint8_t* bits, int64_t bytes);

  // Proves `rows` rows: offsets within [0, nnz], each row's popcount leading to the next offset (`end` after the last row), padding bits
  // zero. Returns the first faulty row, or `rows` if there is none. Reads bitmasks and offsets only.
  int64_t (*first_faulty_row)(const uint8_t* bitmasks, const int64_t* row_offsets, int64_t rows, int64_t cols, int64_t end, int64_t nnz);
};

// The tables; an ISA that this architecture cannot have is absent from the build (see dispatch.cpp).
const Kernels& kernels_scalar();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
#elif defined(__aarch64__)
const Kernels& kernels_neon();
#endif

// The table in use: the best one that this machine can run, unless BITMASK_ISA or force_isa() says otherwise.
const Kernels& kernels();

// Number and names of the tables this machine can run, best first.
int isa_count();
const char* isa_name(int index);

// Makes `name` the table in use; nullptr or "" goes back to the best. False, and no change, if this machine cannot run it.
bool force_isa(const char* name);

}  // namespace bitmask::cpu
