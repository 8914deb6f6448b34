// A row of blocks (BSR) from the rows of a bitmask that it covers, and back. Which blocks hold anything is a bitmask too, a bit for each.

// The lowest `count` <= 64 bits.
inline uint64_t low_bits(int64_t count) { return count == kGroup ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

inline void clear_bytes(void* dst, int64_t bytes) {
  if (bytes > 0) __builtin_memset(dst, 0, static_cast<size_t>(bytes));
}

inline void mark_blocks(const uint8_t* bitmasks, int64_t rows, int64_t cols, int64_t block_cols, uint8_t* marks) {
  const int64_t row_bytes = bitmask_bytes(cols);
  clear_bytes(marks, bitmask_bytes(cols / block_cols));
  int64_t block = 0, block_end = block_cols;
  for (int64_t col = 0; col < cols; col += kGroup) {
    const int64_t end = cols - col < kGroup ? cols : col + kGroup;
    uint64_t any = 0;
    for (int64_t row = 0; row < rows; ++row) any |= load_mask(bitmasks + row * row_bytes + col / 8, end - col);
    for (int64_t at = col; at < end;) {
      const int64_t stop = block_end < end ? block_end : end;
      const bool occupied = (any >> (at - col) & low_bits(stop - at)) != 0;
      marks[block / 8] = static_cast<uint8_t>(marks[block / 8] | int{occupied} << (block % 8));
      if (stop == block_end) ++block, block_end += block_cols;
      at = stop;
    }
  }
}

// Columns of a row that are expanded at a time, before they are dealt out to blocks: they stay in the first cache.
constexpr int64_t kDealtColumns = 1024;

template <int W>
void expand_blocks(const void* values, int64_t nnz, const uint8_t* bitmasks, int64_t cols, int64_t block_rows, int64_t block_cols,
                   const int64_t* positions, int64_t blocks, void* expanded) {
  const uint8_t* src = static_cast<const uint8_t*>(values);
  const uint8_t* const src_end = src + nnz * W;
  uint8_t* const dst = static_cast<uint8_t*>(expanded);
  alignas(64) uint8_t dense[kDealtColumns * W];
  for (int64_t row = 0; row < block_rows; ++row, bitmasks += bitmask_bytes(cols)) {
    int64_t block = 0;
    for (int64_t col = 0; col < cols; col += kDealtColumns) {
      const int64_t end = cols - col < kDealtColumns ? cols : col + kDealtColumns;
      src = expand_row<W>(src, src_end, bitmasks + col / 8, end - col, dense);
      while (block < blocks && positions[block] * block_cols < end) {
        const int64_t block_col = positions[block] * block_cols, block_end = block_col + block_cols;
        const int64_t first = block_col < col ? col : block_col, last = block_end < end ? block_end : end;
        copy_bytes(dst + ((block * block_rows + row) * block_cols + first - block_col) * W, dense + (first - col) * W, (last - first) * W);
        if (block_end > end) break;
        ++block;
      }
    }
  }
}

// Sets `count` <= 64 bits, those of `mask`, from bit `at` on.
inline void set_bits(uint64_t mask, int64_t count, int64_t at, uint8_t* bits) {
  for (int64_t done = 0; done < count;) {
    const int64_t shift = (at + done) % 8;
    uint8_t& byte = bits[(at + done) / 8];
    byte = static_cast<uint8_t>(byte | (mask >> done & 0xff) << shift);
    done += 8 - shift;
  }
}

inline void join_blocks(const void* values, int64_t width, const uint8_t* block_bits, const int64_t* starts, const int64_t* positions,
                        int64_t blocks, int64_t block_rows, int64_t block_cols, int64_t cols, int64_t offset, uint8_t* bitmasks,
                        int64_t* row_offsets, void* joined) {
  const int64_t row_bytes = bitmask_bytes(cols), block_bytes = bitmask_bytes(block_cols);
  clear_bytes(bitmasks, block_rows * row_bytes);
  for (int64_t row = 0; row < block_rows; ++row) {
    row_offsets[row] = offset;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t line = block * block_rows + row;
      int64_t count = 0;
      for (int64_t col = 0; col < block_cols; col += kGroup) {
        const int64_t columns = block_cols - col < kGroup ? block_cols - col : kGroup;
        const uint64_t mask = load_mask(block_bits + line * block_bytes + col / 8, columns);
        set_bits(mask, columns, positions[block] * block_cols + col, bitmasks + row * row_bytes);
        count += __builtin_popcountll(mask);
      }
      copy_bytes(static_cast<uint8_t*>(joined) + offset * width, static_cast<const uint8_t*>(values) + starts[line] * width, count * width);
      offset += count;
    }
  }
}
