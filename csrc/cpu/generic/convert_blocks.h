// A line of blocks (BSR) from the rows of a bitmask that it covers, and back. Which blocks hold anything is a bitmask too, a bit for each.

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

// Columns of a row that are dense at a time, on their way between blocks and the codec: they stay in the first cache.
constexpr int64_t kDealtColumns = 1024;

// Calls body(block, first, last) for the blocks, from `block` on, that columns [col, end) meet: in [first, last). Returns the first block
// that later columns meet.
template <class Body>
inline int64_t for_each_block(const int64_t* positions, int64_t blocks, int64_t block_cols, int64_t block, int64_t col, int64_t end,
                              const Body& body) {
  while (block < blocks && positions[block] * block_cols < end) {
    const int64_t block_col = positions[block] * block_cols, block_end = block_col + block_cols;
    body(block, block_col < col ? col : block_col, block_end < end ? block_end : end);
    if (block_end > end) break;
    ++block;
  }
  return block;
}

template <int W>
void expand_blocks(const void* values, int64_t nnz, const uint8_t* bitmasks, const BlockLine& line, void* expanded) {
  const uint8_t* src = static_cast<const uint8_t*>(values);
  const uint8_t* const src_end = src + nnz * W;
  uint8_t* const dst = static_cast<uint8_t*>(expanded);
  alignas(64) uint8_t dense[kDealtColumns * W];
  for (int64_t row = 0; row < line.block_rows; ++row, bitmasks += bitmask_bytes(line.cols)) {
    int64_t block = 0;
    for (int64_t col = 0; col < line.cols; col += kDealtColumns) {
      const int64_t end = line.cols - col < kDealtColumns ? line.cols : col + kDealtColumns;
      src = expand_row<W>(src, src_end, bitmasks + col / 8, end - col, dense);
      block = for_each_block(line.positions, line.blocks, line.block_cols, block, col, end, [&](int64_t i, int64_t first, int64_t last) {
        const int64_t in_block = first - line.positions[i] * line.block_cols;
        copy_bytes(dst + ((i * line.block_rows + row) * line.block_cols + in_block) * W, dense + (first - col) * W, (last - first) * W);
      });
    }
  }
}

// Gathers each row of a line of blocks, kDealtColumns at a time: calls body(row, col, columns, dense), `dense` being null where no block
// is.
template <int W, class Body>
inline void gather_rows(const void* values, const BlockLine& line, const Body& body) {
  const uint8_t* const src = static_cast<const uint8_t*>(values);
  alignas(64) uint8_t dense[kDealtColumns * W];
  for (int64_t row = 0; row < line.block_rows; ++row) {
    int64_t block = 0;
    for (int64_t col = 0; col < line.cols; col += kDealtColumns) {
      const int64_t end = line.cols - col < kDealtColumns ? line.cols : col + kDealtColumns;
      int64_t gathered = col;
      block = for_each_block(line.positions, line.blocks, line.block_cols, block, col, end, [&](int64_t i, int64_t first, int64_t last) {
        const int64_t in_block = first - line.positions[i] * line.block_cols;
        clear_bytes(dense + (gathered - col) * W, (first - gathered) * W);
        copy_bytes(dense + (first - col) * W, src + ((i * line.block_rows + row) * line.block_cols + in_block) * W, (last - first) * W);
        gathered = last;
      });
      const bool empty = gathered == col;
      if (!empty) clear_bytes(dense + (gathered - col) * W, (end - gathered) * W);
      body(row, col, end - col, empty ? nullptr : dense);
    }
  }
}

template <int W>
void build_block_bitmasks(const void* values, const BlockLine& line, const ZeroTest& zero_test, uint8_t* bitmasks, int64_t* counts) {
  for (int64_t row = 0; row < line.block_rows; ++row) counts[row] = 0;
  gather_rows<W>(values, line, [&](int64_t row, int64_t col, int64_t columns, const uint8_t* dense) {
    uint8_t* const bits = bitmasks + row * bitmask_bytes(line.cols) + col / 8;
    if (dense == nullptr) {
      clear_bytes(bits, bitmask_bytes(columns));
    } else {
      int64_t count;
      build_bitmasks<W>(dense, 1, columns, zero_test, bits, &count);
      counts[row] += count;
    }
  });
}

template <int W>
void pack_block_values(const void* values, const BlockLine& line, const uint8_t* bitmasks, void* packed, int64_t nnz) {
  uint8_t* dst = static_cast<uint8_t*>(packed);
  gather_rows<W>(values, line, [&](int64_t row, int64_t col, int64_t columns, const uint8_t* dense) {
    if (dense == nullptr) return;
    const uint8_t* const bits = bitmasks + row * bitmask_bytes(line.cols) + col / 8;
    const int64_t marked = count_bits(bits, bitmask_bytes(columns)), count = marked < nnz ? marked : nnz;
    pack_values<W>(dense, bits, 1, columns, dst, count);
    dst += count * W;
    nnz -= count;
  });
}
