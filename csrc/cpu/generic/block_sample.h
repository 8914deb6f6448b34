// The kept blocks of g^T x, the gradient of a block-sparse W: bound by arithmetic. Rows of g and x are what is summed over, so they are the
// lanes, kDepth rows in each.
//
//   columns  [strips][lanes][columns of the strip]    g and x, packed alike: a block of columns is cut into strips, the last of which may
//                                                     be narrower
//   tile     a strip of g x a strip of x, some lanes at a time: they stay in the first cache while every row of sums meets them
//
// Vectors and rows of sums may reach past a narrow strip. What they read there are lanes of what is packed behind it; the sums are dropped.

template <class L>
constexpr int kSampledVectors = 2;  // of sums, beside each other

template <class L>
constexpr int64_t kStripColumns = kSampledVectors<L> * L::kLanes;

constexpr int64_t kSampledLanes = 128;      // that are multiplied at a time
constexpr int64_t kBlockSampledRows = 512;  // packed at a time

template <class L>
int64_t sampled_lanes(int64_t m) {
  return (m + L::kDepth - 1) / L::kDepth;
}

template <class L>
int64_t block_columns_bytes(int64_t m, int64_t cols, int64_t block) {
  const int64_t packed = sampled_lanes<L>(m) * ((cols + block - 1) / block) * block;
  return packed == 0 ? 0 : whole_cache_lines((packed + kStripColumns<L>)*kLaneBytes<L>);
}

// Lanes [begin, end) of `columns` <= kLanes columns of x, of which `present` are inside it, `step` bytes apart.
template <class L>
void pack_strip(const uint8_t* x, int64_t m, int64_t row_bytes, int64_t present, int64_t columns, int64_t begin, int64_t end, uint8_t* dst,
                int64_t step) {
  constexpr int64_t kEdge = L::kLanes * L::Element::kWidth;
  for (int64_t lane = begin; lane < end; ++lane) {
    const int64_t row = lane * L::kDepth;
    if (present == L::kLanes && row + L::kDepth <= m) {
      L::store(L::load_rows(x + row * row_bytes, row_bytes), dst + lane * step);
    } else {
      uint8_t edge[L::kDepth * kEdge] = {}, lanes[L::kLanes * kLaneBytes<L>];
      for (int64_t i = 0; i < L::kDepth && row + i < m; ++i) {
        copy_bytes(edge + i * kEdge, x + (row + i) * row_bytes, present * L::Element::kWidth);
      }
      L::store(L::load_rows(edge, kEdge), lanes);
      copy_bytes(dst + lane * step, lanes, columns * kLaneBytes<L>);
    }
  }
}

template <class L>
void block_pack_columns(const void* x, int64_t m, int64_t cols, int64_t block, int64_t first, int64_t last, void* columns) {
  constexpr int64_t kLanesAtOnce = 16;  // whole rows would be as many streams of writes as there are strips
  const int64_t lanes = sampled_lanes<L>(m), row_bytes = cols * L::Element::kWidth, end = (cols + block - 1) / block * block;
  for (int64_t lane = 0; lane < lanes; lane += kLanesAtOnce) {
    const int64_t last_lane = lanes - lane < kLanesAtOnce ? lanes : lane + kLanesAtOnce;
    for (int64_t start = first * block; start < last * block; start += block) {
      for (int64_t strip = 0; strip < block; strip += kStripColumns<L>) {
        const int64_t width = block - strip < kStripColumns<L> ? block - strip : kStripColumns<L>;
        uint8_t* const dst = static_cast<uint8_t*>(columns) + (start + strip) * lanes * kLaneBytes<L>;
        for (int64_t i = 0; i < width; i += L::kLanes) {
          const int64_t wide = width - i < L::kLanes ? width - i : L::kLanes, col = start + strip + i;
          const int64_t present = cols - col < 0 ? 0 : cols - col < wide ? cols - col : wide;
          pack_strip<L>(static_cast<const uint8_t*>(x) + (present == 0 ? 0 : col * L::Element::kWidth), m, row_bytes, present, wide, lane,
                        last_lane, dst + i * kLaneBytes<L>, width * kLaneBytes<L>);
        }
      }
    }
  }
  if (last * block == end && lanes > 0) {
    __builtin_memset(static_cast<uint8_t*>(columns) + end * lanes * kLaneBytes<L>, 0, kStripColumns<L> * kLaneBytes<L>);
  }
}

// The sums of one tile, [rows][kStripColumns].
template <class L>
using TileSums = typename L::Sum[kStripColumns<L>][kStripColumns<L>];

template <class L, int R, int V>
void sample_rows(const uint8_t* g, int64_t g_lane, const uint8_t* x, int64_t x_lane, int64_t lanes, typename L::Sum* tile) {
  typename L::Sums sums[R][V];
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(tile);
  constexpr int64_t kRow = kStripColumns<L> * kLaneBytes<L>, kVector = L::kLanes * kLaneBytes<L>;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sums[r][v] = L::load_sums(bytes + r * kRow + v * kVector);
  }
  multiply_lanes<L, R, V>(g, kLaneBytes<L>, g_lane, x, x_lane, lanes, sums);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) L::store_sums(sums[r][v], bytes + r * kRow + v * kVector);
  }
}

template <class L, int V>
void sample_strips(const uint8_t* g, int64_t rows, const uint8_t* x, int64_t cols, int64_t m_lanes, TileSums<L>& tile) {
  constexpr int R = L::kMicroRows;
  for (int64_t lane = 0; lane < m_lanes; lane += kSampledLanes) {
    const int64_t lanes = m_lanes - lane < kSampledLanes ? m_lanes - lane : kSampledLanes;
    for (int64_t row = 0; row < rows; row += R) {
      const int64_t left = rows - row;
      const auto run = left > R / 2 ? sample_rows<L, R, V> : left > R / 4 ? sample_rows<L, R / 2, V> : sample_rows<L, R / 4, V>;
      run(g + (lane * rows + row) * kLaneBytes<L>, rows * kLaneBytes<L>, x + lane * cols * kLaneBytes<L>, cols * kLaneBytes<L>, lanes,
          tile[row]);
    }
  }
}

template <class L>
void block_sample(const BlockMatrix& w, int64_t begin, int64_t end, const void* g_columns, const void* x_columns, int64_t m,
                  const void* earlier, void* sums, void* values, void*) {
  using Sum = typename L::Sum;
  constexpr int64_t kStrip = kStripColumns<L>, kWidth = L::Element::kWidth, kSum = sizeof(Sum);
  const int64_t lanes = sampled_lanes<L>(m);
  alignas(64) TileSums<L> tile;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first_row = w.lines[at] * w.block_rows, first_col = w.positions[at] * w.block_cols;
    for (int64_t top = 0; top < w.block_rows; top += kStrip) {
      const int64_t rows = w.block_rows - top < kStrip ? w.block_rows - top : kStrip;
      for (int64_t left = 0; left < w.block_cols; left += kStrip) {
        const int64_t cols = w.block_cols - left < kStrip ? w.block_cols - left : kStrip;
        const int64_t place = (at * w.block_rows + top) * w.block_cols + left;
        __builtin_memset(tile, 0, sizeof(tile));
        for (int64_t i = 0; earlier != nullptr && i < rows; ++i) {
          copy_bytes(tile[i], static_cast<const uint8_t*>(earlier) + (place + i * w.block_cols) * kSum, cols * kSum);
        }
        const uint8_t* const g = static_cast<const uint8_t*>(g_columns) + (first_row + top) * lanes * kLaneBytes<L>;
        const uint8_t* const x = static_cast<const uint8_t*>(x_columns) + (first_col + left) * lanes * kLaneBytes<L>;
        if (cols <= L::kLanes) {
          sample_strips<L, 1>(g, rows, x, cols, lanes, tile);
        } else {
          sample_strips<L, 2>(g, rows, x, cols, lanes, tile);
        }
        for (int64_t i = 0; i < rows; ++i) {
          const bool inside = first_row + top + i < w.rows;
          const int64_t kept = !inside ? 0 : w.cols - first_col - left < cols ? w.cols - first_col - left : cols;
          for (int64_t j = kept > 0 ? kept : 0; j < cols; ++j) tile[i][j] = 0;
          if (sums != nullptr) {
            copy_bytes(static_cast<uint8_t*>(sums) + (place + i * w.block_cols) * kSum, tile[i], cols * kSum);
          } else {
            uint8_t* const dst = static_cast<uint8_t*>(values) + (place + i * w.block_cols) * kWidth;
            for (int64_t j = 0; j < cols; j += L::kLanes) {
              uint8_t rounded[L::kLanes * kWidth];
              const bool whole = cols - j >= L::kLanes;
              L::round(L::load_sums(reinterpret_cast<const uint8_t*>(tile[i] + j)), whole ? dst + j * kWidth : rounded);
              if (!whole) copy_bytes(dst + j * kWidth, rounded, (cols - j) * kWidth);
            }
          }
        }
      }
    }
  }
}
