// y = g W for few rows of g and a block-sparse W: bound by the bytes of W.
//
// Lines are block columns. Vectors are columns of W, read where they lie; elements of g are broadcast from its packed tile. The sums of
// some columns stay in registers from block to block, as far as a line goes.

// Columns of W beside each other, as vectors: the sums of M rows of g fill the registers.
template <class L, int M>
constexpr int kColumnVectors = M <= 4 ? 4 : 2;

// Some columns of a block.
struct BlockColumns {
  const uint8_t* src;
  const uint8_t* upcoming;  // the same of the next block, or null
  int64_t row_bytes;
  int64_t rows;   // that lie in W
  int64_t bytes;  // of a row's columns
};

// sums [M][V] += g [lanes][M], broadcast, times the columns of a block.
template <class L, int M, int V>
inline void add_columns(const BlockColumns& block, const uint8_t* g, int64_t g_lane, typename L::Sums (&sums)[M][V]) {
  constexpr int64_t kBytes = L::kLanes * L::Element::kWidth;
  for (int64_t row = 0; row < block.rows; row += L::kDepth, g += g_lane) {
    const uint8_t* const src = block.src + row * block.row_bytes;
    typename L::Lanes vectors[V];
    if (block.upcoming != nullptr) {
      for (int i = 0; i < L::kDepth; ++i) prefetch_bytes<V * kBytes>(block.upcoming + (row + i) * block.row_bytes, 0);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      vectors[v] = load_lanes_within<L>(src + v * kBytes, block.row_bytes, block.rows - row, block.bytes - v * kBytes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const typename L::Lanes operand = L::broadcast(g + i * kLaneBytes<L>);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[i][v] = L::multiply_add(vectors[v], operand, sums[i][v]);
    }
  }
}

// The columns [first, first + columns) of the blocks of one line, V vectors of them.
template <class L, int M, int V>
void stream_columns(const BlockMatrix& w, int64_t line, int64_t first, int64_t columns, const uint8_t* g, int64_t g_lane, uint8_t* y) {
  constexpr int64_t kWidth = L::Element::kWidth;
  typename L::Sums sums[M][V];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
  for (int i = 0; i < M * V; ++i) sums[i / V][i % V] = L::zero();
  const int64_t row_bytes = w.block_cols * kWidth;
  const auto block = [&](int64_t at) { return block_at<L>(w, at) + first * kWidth; };
  for (int64_t at = w.line_starts[line]; at < w.line_starts[line + 1]; ++at) {
    const int64_t row = w.positions[at] * w.block_rows;
    const BlockColumns there{block(at), at + 1 < w.line_starts[line + 1] ? block(at + 1) : nullptr, row_bytes,
                             at_most(w.rows - row, w.block_rows), columns * kWidth};
    add_columns<L, M, V>(there, g + row / L::kDepth * g_lane, g_lane, sums);
  }
  const int64_t col = line * w.block_cols + first;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    uint8_t rounded[V * L::kLanes * kWidth];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) L::round(sums[i][v], rounded + v * L::kLanes * kWidth);
    copy_bytes(y + (i * w.cols + col) * kWidth, rounded, columns * kWidth);
  }
}

// The columns of a line, V vectors at a time, the rest in fewer.
template <class L, int M, int V>
void stream_line(const BlockMatrix& w, int64_t line, int64_t first, const uint8_t* g, int64_t g_lane, uint8_t* y) {
  constexpr int64_t kColumns = V * L::kLanes;
  const int64_t width = at_most(w.cols - line * w.block_cols, w.block_cols);
  for (; width - first >= kColumns; first += kColumns) stream_columns<L, M, V>(w, line, first, kColumns, g, g_lane, y);
  if constexpr (V > 1) {
    stream_line<L, M, V / 2>(w, line, first, g, g_lane, y);
  } else if (first < width) {
    stream_columns<L, M, 1>(w, line, first, width - first, g, g_lane, y);
  }
}

// Whether lanes of g meet lanes of blocks: a pair of rows of W must be one of g.
template <class L>
bool streams_transposed(const BlockMatrix& w, int64_t m) {
  return m <= L::kStreamedRows && w.block_rows % L::kDepth == 0;
}

// `tile` is the one that block_pack_tiles makes of m rows, `g_lane` bytes from lane to lane.
template <class L, int M = L::kStreamedRows>
void stream_transposed(const BlockMatrix& w, int64_t begin, int64_t end, const uint8_t* tile, int64_t g_lane, int64_t m, uint8_t* y) {
  if constexpr (M > 1) {
    if (m < M) return stream_transposed<L, M - 1>(w, begin, end, tile, g_lane, m, y);
  }
  for (int64_t line = begin; line < end; ++line) stream_line<L, M, kColumnVectors<L, M>>(w, line, 0, tile, g_lane, y);
}
