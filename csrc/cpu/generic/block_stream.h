// y = x W^T + bias for few rows of x and a block-sparse W: bound by the bytes of W.
//
// One pass over the blocks, in the order of memory: vectors of W are multiplied with each row of x where they lie. The sums of a block row
// are vectors, too; their lanes are added up when the line ends.
//
//   unit   the rows of a block that share a vector of sums: one, or where rows divide a vector as many as fill it
//   x      [block columns][vectors of a unit][m] vectors: zero past the edge, repeated for each row of a unit
//   run    some blocks of a line, prefetched into the first cache as one stream while those before are multiplied; then unit by unit, so
//          that sums stay in registers from block to block
//   band   as many rows as scratch has sums for: those of a block, unless it is very high

template <class L>
constexpr int64_t kVectorElements = L::kLanes * L::kDepth;

template <class L>
struct BlockStreamScratch {
  static constexpr int64_t kSums = 1024;

  alignas(64) uint8_t sums[kSums * kVectorBytes<L>];
  alignas(64) uint8_t lanes[L::kLanes * kVectorBytes<L>];             // [lanes][kLanes units]
  alignas(64) uint8_t totals[L::kLanes * L::kLanes * kLaneBytes<L>];  // [kLanes units][rows of a unit]
};

template <class L>
constexpr int64_t kBlockStreamScratchBytes = sizeof(BlockStreamScratch<L>);

// Bytes of W and x in a run, where one block is not more: what the first cache holds besides the next run; more where there are many sums,
// for loading and storing them to pay.
template <int M>
constexpr int64_t kRunBytes = (M <= 4 ? 8 : 40) << 10;

// How many vectors, and rows of W, a unit has in blocks of `block_cols` columns. A lane belongs to one row.
template <class L>
inline int64_t rows_of_unit(int64_t block_cols) {
  const bool shared = block_cols < kVectorElements<L> && kVectorElements<L> % block_cols == 0 && block_cols % L::kDepth == 0;
  return shared ? kVectorElements<L> / block_cols : 1;
}

template <class L>
inline int64_t vectors_of_unit(int64_t block_cols, int64_t cols) {
  return blocks_across(at_most(block_cols, cols), kVectorElements<L>);
}

// ---- Rows of x

template <class L>
int64_t block_rows_bytes(int64_t m, int64_t cols, int64_t block_cols) {
  return whole_cache_lines(blocks_across(cols, block_cols) * vectors_of_unit<L>(block_cols, cols) * m * kVectorBytes<L>);
}

template <class L>
void block_pack_rows(const void* x, int64_t m, int64_t cols, int64_t block_cols, void* rows) {
  constexpr int64_t kWidth = L::Element::kWidth;
  const int64_t copies = rows_of_unit<L>(block_cols);
  const int64_t step = copies == 1 ? kVectorElements<L> : block_cols;
  uint8_t* dst = static_cast<uint8_t*>(rows);
  for (int64_t block = 0; block < cols; block += block_cols) {
    const int64_t end = cols - block < block_cols ? cols : block + block_cols;
    for (int64_t col = block; col < end; col += step) {
      const int64_t columns = end - col < step ? end - col : step;
      for (int64_t i = 0; i < m; ++i, dst += kVectorBytes<L>) {
        uint8_t elements[kVectorElements<L> * kWidth] = {};
        for (int64_t copy = 0; copy < copies; ++copy) {
          copy_bytes(elements + copy * block_cols * kWidth, static_cast<const uint8_t*>(x) + (i * cols + col) * kWidth, columns * kWidth);
        }
        L::store(L::widen(elements), dst);
      }
    }
  }
}

// ---- Blocks of W

// What is multiplied at a time.
struct Run {
  const uint8_t* src;
  int64_t blocks;
  int64_t block_bytes;       // from block to block
  const int64_t* positions;  // of the blocks
  int64_t units;             // of each block
  int64_t unit_bytes;        // from unit to unit
  int64_t whole;             // vectors of a unit that are read in place
  int64_t rest;              // bytes after them that count
};

// Adds the products of R units of each block, from `unit` on, with M rows of x to their sums. Meanwhile prefetches as many bytes, from
// `ahead` bytes after the start of the run on, and moves that on.
template <class L, int R, int M>
inline void add_products(const Run& run, int64_t unit, const uint8_t* x, int64_t x_bytes, uint8_t* sums, int64_t& ahead) {
  constexpr int64_t kBytes = kVectorElements<L> * L::Element::kWidth;
  typename L::Sums chains[R][M];
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) chains[i / M][i % M] = L::load_sums(sums + (unit * M + i) * kVectorBytes<L>);
  for (int64_t block = 0; block < run.blocks; ++block) {
    const uint8_t* src = run.src + block * run.block_bytes + unit * run.unit_bytes;
    const uint8_t* operands = x + run.positions[block] * x_bytes;
    typename L::Lanes weights[R];
    const auto add = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i, operands += kVectorBytes<L>) {
        const typename L::Lanes operand = L::load(operands);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) chains[r][i] = L::multiply_add(weights[r], operand, chains[r][i]);
      }
    };
    for (int64_t vector = 0; vector < run.whole; ++vector, src += kBytes, ahead += R * kBytes) {
      prefetch_bytes<R * kBytes>(run.src, ahead);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) weights[r] = L::widen(src + r * run.unit_bytes);
      add();
    }
    if (run.rest > 0) {
      for (int r = 0; r < R; ++r, ahead += run.rest) {
        prefetch_bytes<kBytes>(run.src, ahead);
        uint8_t edge[kBytes] = {};
        copy_bytes(edge, src + r * run.unit_bytes, run.rest);
        weights[r] = L::widen(edge);
      }
      add();
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) L::store_sums(chains[i / M][i % M], sums + (unit * M + i) * kVectorBytes<L>);
}

template <class L, int M>
inline void add_run(const Run& run, const uint8_t* x, int64_t x_bytes, uint8_t* sums, int64_t ahead) {
  constexpr int kFit = L::kStreamSums / M;
  constexpr int R = kFit < 4 ? kFit : 4;  // units that share what is loaded of x
  int64_t unit = 0;
  for (; unit + R <= run.units; unit += R) add_products<L, R, M>(run, unit, x, x_bytes, sums, ahead);
  for (; unit < run.units; ++unit) add_products<L, 1, M>(run, unit, x, x_bytes, sums, ahead);
}

// ---- Lines of W

// Columns of W that the block at `at` meets.
inline int64_t columns_of(const BlockMatrix& w, int64_t at) { return at_most(w.cols - w.positions[at] * w.block_cols, w.block_cols); }

// Some rows of a line, and the sums of their products with M rows of x.
template <class L, int M>
struct Band {
  static constexpr int64_t kWidth = L::Element::kWidth;
  static constexpr int64_t kBytes = kVectorElements<L> * kWidth;

  const BlockMatrix& w;
  const uint8_t* x;
  BlockStreamScratch<L>& scratch;
  int64_t first;  // row of each block
  int64_t rows;
  int64_t row_bytes = w.block_cols * kWidth;
  int64_t x_bytes = vectors_of_unit<L>(w.block_cols, w.cols) * M * kVectorBytes<L>;  // that a block meets
  int64_t unit_rows = rows_of_unit<L>(w.block_cols);
  int64_t units = blocks_across(rows, unit_rows);

  uint8_t* sums_of(int64_t unit) const { return scratch.sums + unit * M * kVectorBytes<L>; }

  // Sums of nothing: `bias` of each row, which may be null, in the first of its lanes.
  void clear(const uint8_t* bias) const {
    for (int64_t unit = 0; unit < (units + L::kLanes - 1) / L::kLanes * L::kLanes; ++unit) {
      for (int i = 0; i < M; ++i) L::store_sums(L::zero(), sums_of(unit) + i * kVectorBytes<L>);
    }
    for (int64_t row = 0; bias != nullptr && row < rows; ++row) {
      uint8_t* const lane = sums_of(row / unit_rows) + row % unit_rows * (kVectorBytes<L> / unit_rows);
      for (int i = 0; i < M; ++i) store_as(L::Element::widen(bias + row * kWidth), lane + i * kVectorBytes<L>);
    }
  }

  // Adds the products with the blocks [begin, end), of one line.
  void add(int64_t begin, int64_t end) const {
    if (begin == end) return;
    const int64_t block_bytes = w.block_rows * row_bytes;
    const int64_t fit = kRunBytes<M> / (block_bytes + x_bytes), most = fit > 1 ? fit : 1;
    const int64_t ahead = fit > 1 && most * block_bytes > kPrefetchBytes ? most * block_bytes : kPrefetchBytes;
    for (int64_t at = begin, next; at < end; at = next) {
      const int64_t columns = columns_of(w, at);
      next = end - at < most ? end : at + most;
      if (columns_of(w, next - 1) != columns) --next;  // the one at the edge is a run of its own
      Run run{start_of(at),
              next - at,
              block_bytes,
              w.positions + at,
              units,
              row_bytes,
              columns / kVectorElements<L>,
              columns % kVectorElements<L> * kWidth};
      if (unit_rows == 1) {
        add_run<L, M>(run, x, x_bytes, scratch.sums, ahead);
      } else if (columns == w.block_cols && is_readable(next - 1)) {
        run.unit_bytes = kBytes, run.whole = 1, run.rest = 0;
        add_run<L, M>(run, x, x_bytes, scratch.sums, ahead);
      } else {
        for (int64_t block = at; block < next; ++block) add_copied(block, columns);
      }
    }
  }

  const uint8_t* start_of(int64_t block) const { return block_at<L>(w, block) + first * row_bytes; }

  // Whether the units of a block lie within the values: what follows its last row belongs to lanes that count for nothing.
  bool is_readable(int64_t block) const {
    const int64_t blocks = w.line_starts[blocks_across(w.rows, w.block_rows)];
    return units * kBytes <= ((blocks - block) * w.block_rows - first) * row_bytes;
  }

  // A block whose units cannot be read where they lie.
  void add_copied(int64_t block, int64_t columns) const {
    const uint8_t* src = start_of(block);
    for (int64_t unit = 0; unit < units; ++unit) {
      uint8_t copy[kBytes] = {};
      for (int64_t row = unit * unit_rows; row < (unit + 1) * unit_rows && row < rows; ++row, src += row_bytes) {
        copy_bytes(copy + row % unit_rows * row_bytes, src, columns * kWidth);
      }
      add_run<L, M>({copy, 1, 0, w.positions + block, 1, 0, 1, 0}, x, x_bytes, sums_of(unit), 0);
    }
  }

  // Rounds the sums to these rows of y, whose first one is at `y`, `y_stride` bytes from one row of x to the next.
  void round(uint8_t* y, int64_t y_stride) const {
    for (int64_t unit = 0; unit < units; unit += L::kLanes) {
      const int64_t row = unit * unit_rows, most = L::kLanes * unit_rows;
      for (int i = 0; i < M; ++i) {
        add_lanes(sums_of(unit) + i * kVectorBytes<L>);
        round_elements<L>(scratch.totals, at_most(rows - row, most), y + row * kWidth + i * y_stride);
      }
    }
  }

  // The totals of kLanes units.
  void add_lanes(const uint8_t* sums) const {
    const int64_t lanes = L::kLanes / unit_rows;  // of one row
    L::transpose(sums, M * kVectorBytes<L>, scratch.lanes);
    for (int64_t row = 0; row < unit_rows; ++row) {
      typename L::Sums total = L::zero();
      for (int64_t lane = row * lanes; lane < (row + 1) * lanes; ++lane) {
        total = L::add(total, L::load_sums(scratch.lanes + lane * kVectorBytes<L>));
      }
      if (unit_rows == 1) {
        L::store_sums(total, scratch.totals);
      } else {
        L::store_sums(total, scratch.lanes);
        for (int64_t unit = 0; unit < L::kLanes; ++unit) {
          copy_bytes(scratch.totals + (unit * unit_rows + row) * kLaneBytes<L>, scratch.lanes + unit * kLaneBytes<L>, kLaneBytes<L>);
        }
      }
    }
  }
};

template <class L, int M = L::kStreamedRows>
void block_stream(const BlockMatrix& w, int64_t begin, int64_t end, const void* rows, int64_t m, const void* bias, void* y, int64_t y_cols,
                  void* scratch) {
  constexpr int64_t kWidth = L::Element::kWidth;
  if constexpr (M > 1) {
    if (m < M) return block_stream<L, M - 1>(w, begin, end, rows, m, bias, y, y_cols, scratch);
  }
  const int64_t most = BlockStreamScratch<L>::kSums / M / L::kLanes * L::kLanes * rows_of_unit<L>(w.block_cols);
  for (int64_t line = begin; line < end; ++line) {
    const int64_t top = line * w.block_rows, height = at_most(w.rows - top, w.block_rows);
    for (int64_t first = 0; first < height; first += most) {
      const Band<L, M> band{w, static_cast<const uint8_t*>(rows), *static_cast<BlockStreamScratch<L>*>(scratch), first,
                            at_most(height - first, most)};
      band.clear(bias == nullptr ? nullptr : static_cast<const uint8_t*>(bias) + (top + first) * kWidth);
      band.add(w.line_starts[line], w.line_starts[line + 1]);
      band.round(static_cast<uint8_t*>(y) + (top + first) * kWidth, y_cols * kWidth);
    }
  }
}
