// The kept blocks of g^T x, the gradient of a block-sparse W: bound by arithmetic. Rows of g and x are what is summed over, so they are the
// lanes, kDepth rows in each.
//
//   columns  [strips][lanes][columns of the strip]    g and x alike: a block of columns is cut into strips, the last perhaps narrower
//   tile     what a strip of g and one of x make of a block: kSampledLanes lanes of both stay in the first cache, while rows of sums that
//            the registers hold go over them
//
// Vectors and rows of sums may reach past a strip. What they read there are lanes of what is packed behind it, and their sums are dropped.

constexpr int kSampledVectors = 2;      // of a strip
constexpr int64_t kSampledLanes = 128;  // multiplied at a time

// Rows whose packed lanes a call takes. More would give sums fewer detours through memory, but packed columns more of it.
template <class L>
constexpr int64_t kBlockSampledRows = 1024 * L::kDepth;

template <class L>
constexpr int64_t kStripColumns = kSampledVectors * L::kLanes;

template <class L>
constexpr int64_t kStripBytes = kSampledVectors * kVectorBytes<L>;  // of a lane

// ---- Packed columns

// A block that is wider than all columns is the only one, and packed no wider than they are.
template <class L>
int64_t block_columns_bytes(int64_t m, int64_t cols, int64_t block) {
  if (m == 0 || cols == 0) return 0;
  const int64_t width = at_most(block, cols), packed = lanes_of<L>(m) * blocks_across(cols, width) * width;
  return whole_cache_lines(packed * kLaneBytes<L> + kStripBytes<L>);
}

// The lanes [begin, end) of `columns` <= kLanes columns of a strip, whose lanes are `step` bytes. Of the `row_bytes` of a row of x,
// `inside` are at or right of the first column; columns that are not there are zeros.
template <class L>
void pack_lanes(const uint8_t* x, int64_t m, int64_t row_bytes, int64_t inside, int64_t columns, int64_t begin, int64_t end, uint8_t* dst,
                int64_t step) {
  for (int64_t lane = begin; lane < end; ++lane) {
    const int64_t row = lane * L::kDepth;
    const typename L::Lanes lanes = load_lanes_within<L>(x + row * row_bytes, row_bytes, m - row, inside);
    if (columns == L::kLanes) {
      L::store(lanes, dst + lane * step);
    } else {
      uint8_t bytes[kVectorBytes<L>];
      L::store(lanes, bytes);
      copy_bytes(dst + lane * step, bytes, columns * kLaneBytes<L>);
    }
  }
}

template <class L>
void block_pack_columns(const void* x, int64_t m, int64_t cols, int64_t block, int64_t first, int64_t last, void* columns) {
  constexpr int64_t kLanesAtOnce = 16;  // every strip is a place that is written to: a lane at a time would be too little for each
  const int64_t lanes = lanes_of<L>(m), row_bytes = cols * L::Element::kWidth;
  block = at_most(block, cols);
  uint8_t* const packed = static_cast<uint8_t*>(columns);
  for (int64_t lane = 0; lane < lanes; lane += kLanesAtOnce) {
    for (int64_t start = first * block; start < last * block; start += block) {
      for (int64_t strip = 0; strip < block; strip += kStripColumns<L>) {
        const int64_t width = at_most(block - strip, kStripColumns<L>), step = width * kLaneBytes<L>;
        for (int64_t i = 0; i < width; i += L::kLanes) {
          const int64_t left = at_most(start + strip + i, cols) * L::Element::kWidth;
          pack_lanes<L>(static_cast<const uint8_t*>(x) + left, m, row_bytes, row_bytes - left, at_most(width - i, L::kLanes), lane,
                        at_most(lane + kLanesAtOnce, lanes), packed + (start + strip) * lanes * kLaneBytes<L> + i * kLaneBytes<L>, step);
        }
      }
    }
  }
  if (first < last && lanes > 0 && last * block >= cols) __builtin_memset(packed + last * block * lanes * kLaneBytes<L>, 0, kStripBytes<L>);
}

// ---- Tiles of blocks

// A strip, or some lanes of it.
struct PackedStrip {
  const uint8_t* lanes;
  int64_t columns;
};

// The sums of a tile: a row for each column of g.
template <class L>
using TileSums = typename L::Sum[kStripColumns<L>][kStripColumns<L>];

// sums [R rows][V vectors], which are zero before the first lanes, += g [lanes][R columns] x [lanes][V vectors].
template <class L, int R, int V>
void sample_rows(const uint8_t* g, int64_t g_lane, const uint8_t* x, int64_t x_lane, int64_t lanes, bool first, Ahead ahead,
                 uint8_t* tile) {
  typename L::Sums sums[R][V];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = first ? L::zero() : L::load_sums(tile + r * kStripBytes<L> + v * kVectorBytes<L>);
  }
  multiply_lanes<L, R, V>(g, kLaneBytes<L>, g_lane, x, x_lane, lanes, sums, ahead);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) L::store_sums(sums[r][v], tile + r * kStripBytes<L> + v * kVectorBytes<L>);
  }
}

// The same for every column of g, R of them at a time, as long as there are so many. Each time asks for its part of the
// next strip of x, which comes from far away.
template <class L, int R, int V>
void sample_strips(PackedStrip g, PackedStrip x, int64_t lanes, PackedStrip next, TileSums<L>& tile) {
  static_assert(R / 4 > 0 && (kStripColumns<L> % R == 0 || kStripColumns<L> == R / 2), "rows of sums fit into the tile");
  const int64_t g_lane = g.columns * kLaneBytes<L>, x_lane = x.columns * kLaneBytes<L>;
  const int64_t part = next.columns * kLaneBytes<L> / ((g.columns + R - 1) / R);  // of a lane of the next strip
  for (int64_t lane = 0; lane < lanes; lane += kSampledLanes) {
    const int64_t count = at_most(lanes - lane, kSampledLanes);
    const uint8_t* const after = next.lanes + lane * next.columns * kLaneBytes<L>;
    for (int64_t row = 0; row < g.columns; row += R) {
      const int64_t left = g.columns - row;
      const auto run = left > R / 2 ? sample_rows<L, R, V> : left > R / 4 ? sample_rows<L, R / 2, V> : sample_rows<L, R / 4, V>;
      run(g.lanes + lane * g_lane + row * kLaneBytes<L>, g_lane, x.lanes + lane * x_lane, x_lane, count, lane == 0,
          {after + row / R * part * count, part}, reinterpret_cast<uint8_t*>(tile[row]));
    }
  }
  if (lanes == 0) __builtin_memset(tile, 0, sizeof(tile));
}

// For strips of x narrower than a vector: x is broadcast and g is loaded, which gives the tile transposed.
template <class L>
void sample_narrow(PackedStrip g, PackedStrip x, int64_t lanes, PackedStrip next, TileSums<L>& tile) {
  TileSums<L> transposed;
  sample_strips<L, L::kMicroRows, kSampledVectors>(x, g, lanes, next, transposed);
  for (int64_t row = 0; row < g.columns; ++row) {
    for (int64_t col = 0; col < x.columns; ++col) tile[row][col] = transposed[col][row];
  }
}

template <class L>
void sample_tile(PackedStrip g, PackedStrip x, int64_t lanes, PackedStrip next, TileSums<L>& tile) {
  if (x.columns > L::kLanes) {
    sample_strips<L, L::kMicroRows, kSampledVectors>(g, x, lanes, next, tile);
  } else if (x.columns < L::kLanes && x.columns < g.columns) {
    sample_narrow<L>(g, x, lanes, next, tile);
  } else {
    sample_strips<L, kSampledVectors * L::kMicroRows, 1>(g, x, lanes, next, tile);
  }
}

// Rows and columns of a block, in the order of the lines, that lie in W.
inline int64_t rows_inside(const BlockMatrix& w, int64_t block) { return at_most(w.rows - w.lines[block] * w.block_rows, w.block_rows); }
inline int64_t cols_inside(const BlockMatrix& w, int64_t block) {
  return at_most(w.cols - w.positions[block] * w.block_cols, w.block_cols);
}

// Where a tile lies: in which block of W, in the order of the lines, and below and right of which element of it, which lies in W.
template <class L>
struct SampledTile {
  int64_t block, top, left;

  SampledTile after(const BlockMatrix& w) const {
    if (left + kStripColumns<L> < cols_inside(w, block)) return {block, top, left + kStripColumns<L>};
    if (top + kStripColumns<L> < rows_inside(w, block)) return {block, top + kStripColumns<L>, 0};
    return {block + 1, 0, 0};
  }
  int64_t row(const BlockMatrix& w) const { return w.lines[block] * w.block_rows + top; }
  int64_t col(const BlockMatrix& w) const { return w.positions[block] * w.block_cols + left; }
  // As many as lie in W.
  int64_t rows(const BlockMatrix& w) const { return at_most(rows_inside(w, block) - top, kStripColumns<L>); }
  int64_t cols(const BlockMatrix& w) const { return at_most(cols_inside(w, block) - left, kStripColumns<L>); }
  // Of row i, in [blocks][block_rows][block_cols].
  int64_t place(const BlockMatrix& w, int64_t i) const { return (block * w.block_rows + top + i) * w.block_cols + left; }

  // Whole strips, as they are packed.
  PackedStrip g_strip(const BlockMatrix& w, const void* columns, int64_t lanes) const {
    return {static_cast<const uint8_t*>(columns) + row(w) * lanes * kLaneBytes<L>,
            at_most(at_most(w.block_rows, w.rows) - top, kStripColumns<L>)};
  }
  PackedStrip x_strip(const BlockMatrix& w, const void* columns, int64_t lanes) const {
    return {static_cast<const uint8_t*>(columns) + col(w) * lanes * kLaneBytes<L>,
            at_most(at_most(w.block_cols, w.cols) - left, kStripColumns<L>)};
  }
};

// Writes zeros where a block, whose elements are `width` bytes, reaches past W.
inline void clear_outside(const BlockMatrix& w, int64_t block, uint8_t* dst, int64_t width) {
  const int64_t rows = rows_inside(w, block), cols = cols_inside(w, block), row_bytes = w.block_cols * width;
  dst += block * w.block_rows * row_bytes;
  for (int64_t row = 0; row < rows && cols < w.block_cols; ++row) {
    __builtin_memset(dst + row * row_bytes + cols * width, 0, row_bytes - cols * width);
  }
  if (rows < w.block_rows) __builtin_memset(dst + rows * row_bytes, 0, (w.block_rows - rows) * row_bytes);
}

template <class Sum>
void add_row(const uint8_t* earlier, int64_t cols, Sum* sums) {
  for (int64_t col = 0; col < cols; ++col) sums[col] += load_as<Sum>(earlier + col * static_cast<int64_t>(sizeof(Sum)));
}

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(row) + i);
}

template <class L>
void block_sample(const BlockMatrix& w, int64_t begin, int64_t end, const void* g_columns, const void* x_columns, int64_t m,
                  const void* earlier, void* sums, void* values) {
  constexpr int64_t kWidth = L::Element::kWidth, kSum = sizeof(typename L::Sum);
  const int64_t lanes = lanes_of<L>(m);
  uint8_t* const dst = static_cast<uint8_t*>(sums != nullptr ? sums : values);
  const int64_t dst_width = sums != nullptr ? kSum : kWidth;
  for (SampledTile<L> at{begin, 0, 0}, next; at.block < end; at = next) {
    next = at.after(w);
    const int64_t rows = at.rows(w), cols = at.cols(w);
    for (int64_t i = 0; i < rows; ++i) {
      if (earlier != nullptr) prefetch_row(static_cast<const uint8_t*>(earlier) + at.place(w, i) * kSum, cols * kSum);
      prefetch_row(dst + at.place(w, i) * dst_width, cols * dst_width);
    }
    alignas(64) TileSums<L> tile;
    sample_tile<L>(at.g_strip(w, g_columns, lanes), at.x_strip(w, x_columns, lanes), lanes,
                   (next.block < end ? next : at).x_strip(w, x_columns, lanes), tile);
    for (int64_t i = 0; i < rows; ++i) {
      if (earlier != nullptr) add_row(static_cast<const uint8_t*>(earlier) + at.place(w, i) * kSum, cols, tile[i]);
      uint8_t* const row = dst + at.place(w, i) * dst_width;
      if (sums != nullptr) {
        copy_bytes(row, tile[i], cols * kSum);
      } else {
        round_elements<L>(reinterpret_cast<const uint8_t*>(tile[i]), cols, row);
      }
    }
    if (next.block > at.block) clear_outside(w, at.block, dst, dst_width);
  }
}
