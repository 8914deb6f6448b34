// Rows of a bitmask as lists of columns, which CSR and COO are, and back.
//
//   bits     1 0 1 1 0 0 0 1 | 1 0 0 1      columns  0 2 3 7 | 0 3      row_starts  0 4
//
// Bound by the bytes of the lists, eight for each stored element, of which the bitmask itself is one bit for each column.
//
// Included after codec.h, with one more word of the vocabulary:
//   Simd::list(mask, first, dst) -> dst past the positions of the set bits, each plus `first`; may write all 64

// list into [dst, end) and nothing past it.
inline int64_t* list_bounded(uint64_t mask, int64_t first, int64_t* dst, int64_t* end) {
  if (end - dst >= kGroup) return Simd::list(mask, first, dst);
  int64_t listed[kGroup];
  const int64_t found = Simd::list(mask, first, listed) - listed;
  const int64_t kept = found < end - dst ? found : end - dst;
  copy_bytes(dst, listed, kept * 8);
  return dst + kept;
}

inline int64_t list_columns(const uint8_t* bitmasks, int64_t rows, int64_t cols, int64_t first, int64_t start, int64_t* columns,
                            int64_t most, int64_t* row_starts) {
  int64_t* dst = columns;
  int64_t* const end = columns + most;
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row, bitmasks += bitmask_bytes(cols)) {
    if (row_starts != nullptr) row_starts[row] = start + count;
    for (int64_t col = 0; col < cols; col += kGroup) {
      const uint64_t mask = load_mask(bitmasks + col / 8, cols - col < kGroup ? cols - col : kGroup);
      dst = list_bounded(mask, first + col, dst, end);
      count += __builtin_popcountll(mask);
    }
  }
  return count;
}

// One read of memory that others may write to: what is checked is what is used.
inline int64_t read_once(const int64_t* entry) { return __atomic_load_n(entry, __ATOMIC_RELAXED); }

// Stores a mask word of a row, as many bytes of it as the row has.
inline void store_mask(uint64_t mask, int64_t word, int64_t cols, uint8_t* bits) {
  const int64_t left = bitmask_bytes(cols) - word * 8;
  copy_bytes(bits + word * 8, &mask, left < 8 ? left : 8);
}

// Columns ascend, so a mask word is gathered in a register and stored once.
inline int64_t mark_columns(const int64_t* columns, int64_t count, const uint8_t* kept, int64_t first_kept, int64_t cols, uint8_t* bits,
                            int64_t* marked) {
  int64_t before = -1, word = 0;
  uint64_t mask = 0;
  *marked = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = read_once(columns + i);
    if (column <= before || column >= cols) return i;
    before = column;
    if (column / kGroup != word) {
      *marked += __builtin_popcountll(mask);
      store_mask(mask, word, cols, bits);
      mask = 0;
      word = column / kGroup;
    }
    const int64_t bit = first_kept + i;
    const uint64_t keeps = kept == nullptr ? 1 : kept[bit / 8] >> (bit % 8) & 1;
    mask |= keeps << (column % kGroup);
  }
  *marked += __builtin_popcountll(mask);
  if (cols > 0) store_mask(mask, word, cols, bits);
  return count;
}

// The row of an entry of a COO tensor, of whose indices [dims, nnz] all but the last tell it; -1 if one is out of range.
inline int64_t row_of_entry(const int64_t* indices, int64_t nnz, const int64_t* sizes, int64_t dims, int64_t entry) {
  int64_t row = 0;
  for (int64_t dim = 0; dim < dims; ++dim) {
    const int64_t index = read_once(indices + dim * nnz + entry);
    if (index < 0 || index >= sizes[dim]) return -1;
    row = row * sizes[dim] + index;
  }
  return row;
}

inline int64_t start_rows(const int64_t* indices, int64_t nnz, const int64_t* sizes, int64_t dims, int64_t rows, int64_t begin, int64_t end,
                          int64_t* row_starts) {
  int64_t before = begin == 0 ? -1 : row_of_entry(indices, nnz, sizes, dims, begin - 1);
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t row = row_of_entry(indices, nnz, sizes, dims, entry);
    if (row < 0 || row < before) return entry;
    while (before < row) row_starts[++before] = entry;
  }
  if (end == nnz) {
    while (before < rows) row_starts[++before] = nnz;
  }
  return end;
}
