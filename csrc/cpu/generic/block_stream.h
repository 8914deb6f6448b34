// y = x W^T + bias for few rows of x and a block-sparse W: bound by the bytes of W.
//
// One pass over the blocks, in the order of memory: each vector of W is multiplied with each row of x where it lies. The sums of a block
// row are vectors, too, kept in the first cache from block to block, and their lanes are added up when the line ends.
//
//   unit    the rows of a block that share a vector of sums: one, or where rows divide a vector as many as fill it
//   x       [block columns][vectors of a unit][m] vectors: zero past the edge, repeated for each row of a unit
//   sums    [units of a block][m] vectors
//   strip   as many units as scratch has sums for: those of one block, unless blocks are very high

template <class L>
constexpr int64_t kVectorBytes = L::kLanes * kLaneBytes<L>;

template <class L>
constexpr int64_t kVectorElements = L::kLanes * L::kDepth;

template <class L>
struct BlockStreamScratch {
  static constexpr int64_t kSums = 1024;

  alignas(64) uint8_t sums[kSums * kVectorBytes<L>];
  alignas(64) uint8_t lanes[L::kLanes * kVectorBytes<L>];
  alignas(64) typename L::Sum totals[L::kLanes * L::kLanes];  // of the rows of kLanes units
};

template <class L>
constexpr int64_t kBlockStreamScratchBytes = sizeof(BlockStreamScratch<L>);

// How many vectors, and rows of W, a unit has in blocks of `block_cols` columns. A lane belongs to one row.
template <class L>
inline int64_t rows_of_unit(int64_t block_cols) {
  const bool shared = block_cols < kVectorElements<L> && kVectorElements<L> % block_cols == 0 && block_cols % L::kDepth == 0;
  return shared ? kVectorElements<L> / block_cols : 1;
}

template <class L>
inline int64_t vectors_of_unit(int64_t block_cols, int64_t cols) {
  const int64_t columns = block_cols < cols ? block_cols : cols;
  return columns / kVectorElements<L> + (columns % kVectorElements<L> != 0);
}

// ---- Rows of x

template <class L>
int64_t block_rows_bytes(int64_t m, int64_t cols, int64_t block_cols) {
  const int64_t blocks = cols / block_cols + (cols % block_cols != 0);
  return whole_cache_lines(blocks * vectors_of_unit<L>(block_cols, cols) * m * kVectorBytes<L>);
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

// Units of W that follow each other.
struct Units {
  const uint8_t* src;
  int64_t count;
  int64_t bytes;  // of each
  int64_t whole;  // vectors of each that are read in place
  int64_t rest;   // bytes after them that count
  int64_t ahead;  // bytes to prefetch ahead
};

// Adds the products of R of them, from src on, with M rows of x to their sums.
template <class L, int R, int M>
inline void add_products(const uint8_t* src, const Units& units, const uint8_t* x, uint8_t* sums) {
  constexpr int64_t kBytes = kVectorElements<L> * L::Element::kWidth;
  typename L::Sums chains[R][M];
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) chains[i / M][i % M] = L::load_sums(sums + i * kVectorBytes<L>);
  const auto add = [&](const typename L::Lanes(&weights)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i, x += kVectorBytes<L>) {
      const typename L::Lanes operand = L::load(x);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) chains[r][i] = L::multiply_add(weights[r], operand, chains[r][i]);
    }
  };
  typename L::Lanes weights[R];
  for (int64_t vector = 0; vector < units.whole; ++vector, src += kBytes) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      prefetch_bytes<kBytes>(src + r * units.bytes, units.ahead);
      weights[r] = L::widen(src + r * units.bytes);
    }
    add(weights);
  }
  if (units.rest > 0) {
    for (int r = 0; r < R; ++r) {
      uint8_t edge[kBytes] = {};
      copy_bytes(edge, src + r * units.bytes, units.rest);
      weights[r] = L::widen(edge);
    }
    add(weights);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R * M; ++i) L::store_sums(chains[i / M][i % M], sums + i * kVectorBytes<L>);
}

template <class L, int M>
inline void add_units(const Units& units, const uint8_t* x, uint8_t* sums) {
  constexpr int kFit = L::kStreamSums / M;
  constexpr int R = M < kFit ? M : kFit;  // units that share what is loaded of x
  constexpr int64_t kSums = M * kVectorBytes<L>;
  int64_t unit = 0;
  for (; unit + R <= units.count; unit += R) add_products<L, R, M>(units.src + unit * units.bytes, units, x, sums + unit * kSums);
  for (; unit < units.count; ++unit) add_products<L, 1, M>(units.src + unit * units.bytes, units, x, sums + unit * kSums);
}

// The rows [first, last) of the block at `at`, which meet `columns` columns of W: units of one row.
template <class L, int M>
inline void add_rows(const BlockMatrix& w, int64_t at, int64_t first, int64_t last, int64_t columns, int64_t ahead, const uint8_t* x,
                     uint8_t* sums) {
  constexpr int64_t kWidth = L::Element::kWidth;
  const uint8_t* const src = static_cast<const uint8_t*>(w.values) + (at * w.block_rows + first) * w.block_cols * kWidth;
  const int64_t rest = columns % kVectorElements<L> * kWidth;
  add_units<L, M>({src, last - first, w.block_cols * kWidth, columns / kVectorElements<L>, rest, ahead}, x, sums);
}

// The same for narrow rows, several of which are a unit, and a vector. What follows the last row, in lanes that count for nothing, may
// belong to the next block, but not lie past the values.
template <class L, int M>
inline void add_narrow_rows(const BlockMatrix& w, int64_t at, int64_t first, int64_t last, int64_t columns, int64_t ahead, const uint8_t* x,
                            uint8_t* sums) {
  constexpr int64_t kWidth = L::Element::kWidth;
  constexpr int64_t kBytes = kVectorElements<L> * kWidth;
  const int64_t rows = kVectorElements<L> / w.block_cols, row_bytes = w.block_cols * kWidth;
  const uint8_t* const src = static_cast<const uint8_t*>(w.values) + (at * w.block_rows + first) * row_bytes;
  const int64_t count = (last - first + rows - 1) / rows;
  const int64_t blocks = w.line_starts[w.rows / w.block_rows + (w.rows % w.block_rows != 0)];
  if (columns == w.block_cols && count * kVectorElements<L> <= ((blocks - at) * w.block_rows - first) * w.block_cols) {
    add_units<L, M>({src, count, kBytes, 1, 0, ahead}, x, sums);
    return;
  }
  for (int64_t row = first; row < last; row += rows) {
    uint8_t unit[kBytes] = {};
    for (int64_t i = 0; i < rows && row + i < last; ++i) {
      copy_bytes(unit + i * row_bytes, src + (row - first + i) * row_bytes, columns * kWidth);
    }
    add_units<L, M>({unit, 1, kBytes, 1, 0, ahead}, x, sums + (row - first) / rows * M * kVectorBytes<L>);
  }
}

// ---- Lines of W

// Adds up the lanes of kLanes units, sums of row i of x being m vectors apart, into totals [rows of kLanes units].
template <class L>
inline void add_lanes(const uint8_t* sums, int64_t m, int64_t rows, BlockStreamScratch<L>& scratch) {
  const int64_t lanes = L::kLanes / rows;  // of one row
  L::transpose(sums, m * kVectorBytes<L>, scratch.lanes);
  for (int64_t row = 0; row < rows; ++row) {
    typename L::Sums total = L::zero();
    for (int64_t lane = row * lanes; lane < (row + 1) * lanes; ++lane) {
      total = L::add(total, L::load_sums(scratch.lanes + lane * kVectorBytes<L>));
    }
    alignas(64) typename L::Sum of_units[L::kLanes];
    L::store_sums(total, reinterpret_cast<uint8_t*>(of_units));
    for (int64_t unit = 0; unit < L::kLanes; ++unit) scratch.totals[unit * rows + row] = of_units[unit];
  }
}

// Rounded totals with their bias, which may be null.
template <class L>
inline void finish_totals(typename L::Sum* totals, int64_t count, const uint8_t* bias, uint8_t* y) {
  constexpr int64_t kWidth = L::Element::kWidth;
  for (int64_t at = 0; at < count; at += L::kLanes) {
    const int64_t rows = count - at < L::kLanes ? count - at : L::kLanes;
    for (int64_t row = 0; bias != nullptr && row < rows; ++row) totals[at + row] += L::Element::widen(bias + (at + row) * kWidth);
    uint8_t rounded[L::kLanes * kWidth];
    L::round(L::load_sums(reinterpret_cast<const uint8_t*>(totals + at)), rounded);
    copy_bytes(y + at * kWidth, rounded, rows * kWidth);
  }
}

// The rows [first, last) of the blocks of one line.
template <class L, int M>
void stream_strip(const BlockMatrix& w, int64_t line, int64_t first, int64_t last, int64_t ahead, const uint8_t* x, const uint8_t* bias,
                  uint8_t* y, BlockStreamScratch<L>& scratch) {
  constexpr int64_t kWidth = L::Element::kWidth;
  const int64_t rows = rows_of_unit<L>(w.block_cols);
  const int64_t x_bytes = vectors_of_unit<L>(w.block_cols, w.cols) * M * kVectorBytes<L>;
  const int64_t step = rows * L::kLanes;  // rows whose lanes are added up together
  for (int64_t vector = 0; vector < (last - first + step - 1) / step * L::kLanes * M; ++vector) {
    L::store_sums(L::zero(), scratch.sums + vector * kVectorBytes<L>);
  }
  for (int64_t at = w.line_starts[line]; at < w.line_starts[line + 1]; ++at) {
    const int64_t left = w.cols - w.positions[at] * w.block_cols, columns = left < w.block_cols ? left : w.block_cols;
    const uint8_t* const operands = x + w.positions[at] * x_bytes;
    if (rows == 1) {
      add_rows<L, M>(w, at, first, last, columns, ahead, operands, scratch.sums);
    } else {
      add_narrow_rows<L, M>(w, at, first, last, columns, ahead, operands, scratch.sums);
    }
  }
  for (int64_t row = first; row < last; row += step) {
    const int64_t place = line * w.block_rows + row, count = last - row < step ? last - row : step;
    for (int64_t i = 0; i < M; ++i) {
      add_lanes<L>(scratch.sums + ((row - first) / rows * M + i) * kVectorBytes<L>, M, rows, scratch);
      finish_totals<L>(scratch.totals, count, bias == nullptr ? nullptr : bias + place * kWidth, y + (i * w.rows + place) * kWidth);
    }
  }
}

template <class L, int M = L::kStreamedRows>
void block_stream(const BlockMatrix& w, int64_t begin, int64_t end, const void* rows, int64_t m, const void* bias, void* y, void* scratch) {
  if constexpr (M > 1) {
    if (m < M) return block_stream<L, M - 1>(w, begin, end, rows, m, bias, y, scratch);
  }
  const int64_t strip = BlockStreamScratch<L>::kSums / M / L::kLanes * L::kLanes * rows_of_unit<L>(w.block_cols);
  // Parts of blocks are short: what is asked for then is the same part of the next one.
  const int64_t ahead = w.block_rows <= strip ? kPrefetchBytes : w.block_rows * w.block_cols * L::Element::kWidth;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t left = w.rows - line * w.block_rows, height = left < w.block_rows ? left : w.block_rows;
    for (int64_t first = 0; first < height; first += strip) {
      const int64_t last = height - first < strip ? height : first + strip;
      stream_strip<L, M>(w, line, first, last, ahead, static_cast<const uint8_t*>(rows), static_cast<const uint8_t*>(bias),
                         static_cast<uint8_t*>(y), *static_cast<BlockStreamScratch<L>*>(scratch));
    }
  }
}
