// Compress and decompress, written once over the vocabulary of simd_<isa>.h and compiled by isa_<isa>.cpp.
//
//   dense   a 0 b c 0 0 0 d | e ...      64 columns make a group: one 64-bit mask word, least significant bit first.
//   mask    1 0 1 1 0 0 0 1 | 1 ...
//   values  a b c d e ...
//
// Compressing reads the dense data twice (build_bitmasks, then pack_values once the counts size the output): on fresh memory the page
// faults of an upper-bound output would cost more than the second read. Vector code sees whole groups only and may run up to one group
// past the packed end; the last columns of a row and the last values of a range go through a group-sized stack buffer instead, so that
// nothing outside the caller's ranges is ever touched. Decompressing stores through the cache: fresh memory has just been zeroed by the
// kernel and its lines are still there, so streaming stores lose (benchmarks/NOTES.md).
//
// Included inside an anonymous namespace, after `Simd`:
//   Simd::nonzero<W>(src, test)       -> mask word of 64 elements of W bytes
//   Simd::compress<W>(src, mask, dst) -> dst past the packed elements; may write all 64 * W bytes
//   Simd::expand<W>(src, mask, dst)   -> src past the taken elements; may read all 64 * W bytes

// How far ahead of the dense stream to prefetch: hardware prefetchers stop at the 4 KB page end.
constexpr int64_t kPrefetchBytes = 4096;

// Asks for the cache lines of the kBytes that lie `ahead` of `src`. The address may lie past the data, or `src` be null: a prefetch does
// not fault, but pointer arithmetic would be undefined, hence the integer.
template <int kBytes>
inline void prefetch_bytes(const uint8_t* src, int64_t ahead) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(src) + static_cast<uintptr_t>(ahead);
  for (uintptr_t line = 0; line < kBytes; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + line));
}

template <int W>
inline void prefetch_group(const uint8_t* src) {
  prefetch_bytes<kGroup * W>(src, kPrefetchBytes);
}

inline void copy_bytes(void* dst, const void* src, int64_t bytes) {
  if (bytes > 0) __builtin_memcpy(dst, src, static_cast<size_t>(bytes));
}

// The mask word of `columns` <= 64 columns; the bits past them are zero.
inline uint64_t load_mask(const uint8_t* bits, int64_t columns) {
  uint64_t mask = 0;
  if (columns == kGroup) {
    __builtin_memcpy(&mask, bits, 8);
  } else {
    copy_bytes(&mask, bits, bitmask_bytes(columns));
    mask &= (uint64_t{1} << columns) - 1;
  }
  return mask;
}

template <int W>
void build_bitmasks(const void* dense, int64_t rows, int64_t cols, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* counts) {
  const uint8_t* src = static_cast<const uint8_t*>(dense);
  const ZeroTest test = zero_test;  // a local copy stays in registers: the byte stores below cannot alias it
  const int64_t tail = cols % kGroup;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t count = 0;
    for (int64_t group = 0; group < cols / kGroup; ++group) {
      prefetch_group<W>(src);
      const uint64_t mask = Simd::nonzero<W>(src, test);
      __builtin_memcpy(bitmasks, &mask, 8);
      count += __builtin_popcountll(mask);
      src += kGroup * W;
      bitmasks += 8;
    }
    if (tail != 0) {
      uint8_t edge[kGroup * W] = {};
      copy_bytes(edge, src, tail * W);
      const uint64_t mask = Simd::nonzero<W>(edge, test);
      copy_bytes(bitmasks, &mask, bitmask_bytes(tail));
      count += __builtin_popcountll(mask);
      src += tail * W;
      bitmasks += bitmask_bytes(tail);
    }
    counts[row] = count;
  }
}

// compress<W> into [dst, end) and nothing past it.
template <int W>
inline uint8_t* compress_bounded(const uint8_t* src, uint64_t mask, uint8_t* dst, uint8_t* end) {
  if (end - dst >= kGroup * W) return Simd::template compress<W>(src, mask, dst);
  uint8_t packed[kGroup * W];
  const int64_t bytes = Simd::template compress<W>(src, mask, packed) - packed;
  const int64_t kept = bytes < end - dst ? bytes : end - dst;
  copy_bytes(dst, packed, kept);
  return dst + kept;
}

template <int W>
void pack_values(const void* dense, const uint8_t* bitmasks, int64_t rows, int64_t cols, void* values, int64_t nnz) {
  const uint8_t* src = static_cast<const uint8_t*>(dense);
  uint8_t* dst = static_cast<uint8_t*>(values);
  uint8_t* const end = dst + nnz * W;
  const int64_t tail = cols % kGroup;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < cols / kGroup; ++group) {
      prefetch_group<W>(src);
      dst = compress_bounded<W>(src, load_mask(bitmasks, kGroup), dst, end);
      src += kGroup * W;
      bitmasks += 8;
    }
    if (tail != 0) {
      uint8_t edge[kGroup * W];
      copy_bytes(edge, src, tail * W);
      dst = compress_bounded<W>(edge, load_mask(bitmasks, tail), dst, end);
      src += tail * W;
      bitmasks += bitmask_bytes(tail);
    }
  }
}

// expand<W> from [src, end) and nothing past it; elements that are not there come out as zero.
template <int W>
inline const uint8_t* expand_bounded(const uint8_t* src, const uint8_t* end, uint64_t mask, uint8_t* dst) {
  const int64_t left = end - src;
  if (left >= kGroup * W) return Simd::template expand<W>(src, mask, dst);
  uint8_t packed[kGroup * W] = {};
  copy_bytes(packed, src, left);
  const int64_t taken = Simd::template expand<W>(packed, mask, dst) - packed;
  return src + (taken < left ? taken : left);
}

// The same for a row of `cols` columns.
template <int W>
inline const uint8_t* expand_row(const uint8_t* src, const uint8_t* end, const uint8_t* bits, int64_t cols, uint8_t* dst) {
  for (int64_t group = 0; group < cols / kGroup; ++group) {
    prefetch_group<W>(src);
    src = expand_bounded<W>(src, end, load_mask(bits, kGroup), dst);
    dst += kGroup * W;
    bits += 8;
  }
  const int64_t tail = cols % kGroup;
  if (tail != 0) {
    uint8_t edge[kGroup * W];
    src = expand_bounded<W>(src, end, load_mask(bits, tail), edge);
    copy_bytes(dst, edge, tail * W);
  }
  return src;
}

template <int W>
void expand_values(const void* values, int64_t nnz, const uint8_t* bitmasks, int64_t rows, int64_t cols, void* dense) {
  const uint8_t* src = static_cast<const uint8_t*>(values);
  const uint8_t* const end = src + nnz * W;
  uint8_t* dst = static_cast<uint8_t*>(dense);
  for (int64_t row = 0; row < rows; ++row, bitmasks += bitmask_bytes(cols), dst += cols * W) {
    src = expand_row<W>(src, end, bitmasks, cols, dst);
  }
}

// Set bits in `bytes` bytes.
int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0;
  for (; bytes >= 8; bits += 8, bytes -= 8) count += __builtin_popcountll(load_mask(bits, kGroup));
  return bytes == 0 ? count : count + __builtin_popcountll(load_mask(bits, bytes * 8));
}

int64_t first_faulty_row(const uint8_t* bitmasks, const int64_t* row_offsets, int64_t rows, int64_t cols, int64_t end, int64_t nnz) {
  const int64_t row_bytes = bitmask_bytes(cols);
  const int padding = cols % 8 == 0 ? 0 : 0xff << (cols % 8) & 0xff;
  for (int64_t row = 0; row < rows; ++row, bitmasks += row_bytes) {
    const int64_t start = row_offsets[row];
    const int64_t next = row + 1 < rows ? row_offsets[row + 1] : end;
    if (start < 0 || start > nnz || next < start || next > nnz) return row;
    if (next - start != count_bits(bitmasks, row_bytes)) return row;
    if (padding != 0 && (bitmasks[row_bytes - 1] & padding) != 0) return row;
  }
  return rows;
}

template <int W>
constexpr CodecKernels codec_kernels() {
  return {build_bitmasks<W>, pack_values<W>, expand_values<W>};
}
