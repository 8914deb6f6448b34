// y = x W^T + bias straight from the compressed W, written once over the lanes of lanes.h and simd_<isa>.h.
//
//   stream     few rows of x: bound by the bytes of W. One pass over them, in order; a group of 64 columns is expanded in registers and
//              multiplied with each row of x. One stream of values a thread, prefetched by software: hardware prefetchers stop at
//              page ends, and lose streams that are short or many.
//   multiply   more rows of x: bound by arithmetic. A tile of W is expanded once into the cache, transposed, and multiplied with all rows
//              of x, kPanelRows at a time, by a product blocked as in BLIS (https://github.com/flame/blis): the panel of x stays in the
//              first cache, the tile in the second, kPanelRows x 2 vectors of sums in registers.
//
// The rows of W are proven as they are walked: a row must hold as many values as its bitmask has bits, and the kernels look only at values
// inside the range given. Dropped elements are multiplied as zeros, so that infinities and NaNs in x come out as in a dense product.

constexpr int kStrips = 2;            // vectors of W rows in registers, beside each other
constexpr int64_t kBlockLanes = 512;  // lanes of a row that multiply expands at a time
constexpr int64_t kTileRows = 128;    // rows of W in a tile: kTileRows * kBlockLanes * 4 bytes take a quarter of a second-level cache
constexpr int64_t kBlockRows = 1032;  // rows of x for which multiply keeps sums; a multiple of every kPanelRows
constexpr int kChains = 4;            // independent sums that hide the latency of an addition

template <class L>
constexpr int64_t kLaneBytes = sizeof(typename L::Sum);

template <class L>
constexpr int kVectors = kGroup / L::kDepth / L::kLanes;  // of a group

template <class L>
constexpr int64_t kGroupBytes = kGroup / L::kDepth * kLaneBytes<L>;

constexpr int64_t groups_of(int64_t cols) { return cols / kGroup + (cols % kGroup != 0); }

// ---- Rows of W

// Where the values of up to R rows from `row` on, but before `end`, begin, and where those of the last one end: each offset is read once,
// so that they stay in order whoever writes to them. Returns how many rows there are before one whose offsets cannot be.
template <int R>
inline int find_rows(const BitmaskMatrix& w, int64_t row, int64_t end, int64_t (&borders)[R + 1]) {
  borders[0] = w.row_offsets[row];
  for (int found = 0; found < R; ++found) {
    if (row + found == end) return found;
    const int64_t next = row + found + 1 < w.rows ? w.row_offsets[row + found + 1] : w.nnz;
    if (borders[found] < 0 || next < borders[found] || next > w.nnz) return found;
    borders[found + 1] = next;
  }
  return R;
}

// Where the values of one row begin and how many there are; false if its offset or the next one cannot be.
inline bool find_row(const BitmaskMatrix& w, int64_t row, int64_t* start, int64_t* count) {
  int64_t borders[2];
  if (find_rows<1>(w, row, row + 1, borders) == 0) return false;
  *start = borders[0];
  *count = borders[1] - borders[0];
  return true;
}

inline bool padding_is_zero(const BitmaskMatrix& w, int64_t row) {
  const int used = w.cols % 8;
  return used == 0 || w.bitmasks[(row + 1) * bitmask_bytes(w.cols) - 1] >> used == 0;
}

// Reads the packed values of a row, group by group.
//
// kBounded  the end of the values may be near: absent elements come out as zero and are counted, nothing past `end` is read
template <class L, bool kBounded>
struct RowReader {
  static constexpr int64_t kWidth = L::Element::kWidth;

  const uint8_t* src;
  const uint8_t* end;
  int64_t absent;  // bytes that the bitmask asked for past the end

  void next(uint64_t mask, typename L::Lanes (&lanes)[kVectors<L>]) {
    if (!kBounded || end - src >= kGroup * kWidth) {
      src = L::expand(src, mask, lanes);
    } else {
      next_near_end(mask, lanes);
    }
  }

  __attribute__((noinline, cold)) void next_near_end(uint64_t mask, typename L::Lanes (&lanes)[kVectors<L>]) {
    uint8_t packed[kGroup * kWidth] = {};
    copy_bytes(packed, src, end - src);
    const int64_t taken = L::expand(packed, mask, lanes) - packed;
    const int64_t kept = taken < end - src ? taken : end - src;
    src += kept;
    absent += taken - kept;
  }

  // Elements read, or asked for, since `start`.
  int64_t taken_since(const uint8_t* start) const { return (src - start + absent) / kWidth; }
};

template <class L, bool kBounded>
inline RowReader<L, kBounded> reader_at(const BitmaskMatrix& w, int64_t start) {
  const uint8_t* const values = static_cast<const uint8_t*>(w.values);
  return {values + start * L::Element::kWidth, values + w.nnz * L::Element::kWidth, 0};
}

// ---- Rows of x

// The lanes of `columns` <= 64 elements, padded with zeros to a whole group.
template <class L>
inline void widen_group(const uint8_t* src, int64_t columns, typename L::Lanes (&lanes)[kVectors<L>]) {
  if (columns == kGroup) {
    L::expand(src, ~uint64_t{0}, lanes);
  } else {
    uint8_t edge[kGroup * L::Element::kWidth] = {};
    copy_bytes(edge, src, columns * L::Element::kWidth);
    L::expand(edge, ~uint64_t{0}, lanes);
  }
}

template <class L>
inline void widen_row(const uint8_t* src, int64_t cols, uint8_t* dst) {
  for (int64_t col = 0; col < cols; col += kGroup, dst += kGroupBytes<L>) {
    typename L::Lanes lanes[kVectors<L>];
    widen_group<L>(src + col * L::Element::kWidth, cols - col < kGroup ? cols - col : kGroup, lanes);
    for (int vector = 0; vector < kVectors<L>; ++vector) L::store(lanes[vector], dst + vector * L::kLanes * kLaneBytes<L>);
  }
}

template <class L>
void pack_rows(const void* x, int64_t rows, int64_t cols, void* lanes) {
  const uint8_t* src = static_cast<const uint8_t*>(x);
  uint8_t* dst = static_cast<uint8_t*>(lanes);
  for (int64_t row = 0; row < rows; ++row) {
    widen_row<L>(src + row * cols * L::Element::kWidth, cols, dst + row * groups_of(cols) * kGroupBytes<L>);
  }
}

// The panel is [lanes of a row][kPanelRows].
template <class L>
void pack_panel(const void* x, int64_t rows, int64_t cols, void* panel) {
  constexpr int64_t kStep = L::kPanelRows * kLaneBytes<L>;
  constexpr int64_t kLanesOfGroup = kGroup / L::kDepth;
  if (cols == 0) return;  // the panel may be a null pointer
  for (int64_t row = 0; row < L::kPanelRows; ++row) {
    const uint8_t* const src = static_cast<const uint8_t*>(x) + row * cols * L::Element::kWidth;
    uint8_t* dst = static_cast<uint8_t*>(panel) + row * kLaneBytes<L>;
    for (int64_t col = 0; col < cols; col += kGroup) {
      alignas(64) uint8_t group[kGroupBytes<L>] = {};
      const int64_t columns = cols - col < kGroup ? cols - col : kGroup;
      if (row < rows) widen_row<L>(src + col * L::Element::kWidth, columns, group);
      for (int64_t lane = 0; lane < kLanesOfGroup; ++lane, dst += kStep) copy_bytes(dst, group + lane * kLaneBytes<L>, kLaneBytes<L>);
    }
  }
}

// ---- Few rows of x

// Products of R rows of W with M rows of x, whose lanes are x_stride bytes apart. `taken` tells the number of values each row of W took.
// What lies `ahead` bytes after the values read is prefetched: at least as far as these R rows reach, so that none is asked for twice.
template <class L, int R, int M, bool kBounded>
inline void dot_rows(const BitmaskMatrix& w, int64_t row, const int64_t* starts, int64_t ahead, const uint8_t* x, int64_t x_stride,
                     typename L::Sum (&y)[R][M], int64_t (&taken)[R]) {
  constexpr int kOwn = R * M >= kChains ? 1 : kChains / (R * M);  // chains of each product
  constexpr int kUnroll = kOwn > kVectors<L> ? kOwn / kVectors<L> : 1;
  typename L::Sums sums[R][M][kOwn];
  RowReader<L, kBounded> readers[R];
  const uint8_t* first[R];
  const uint8_t* bits = w.bitmasks + row * bitmask_bytes(w.cols);
  for (int r = 0; r < R; ++r) {
    readers[r] = reader_at<L, kBounded>(w, starts[r]);
    first[r] = readers[r].src;
    for (auto& chains : sums[r]) {
      for (auto& chain : chains) chain = L::zero();
    }
  }
  const auto step = [&](int64_t columns, int at) __attribute__((always_inline)) {
    typename L::Lanes lanes[R][kVectors<L>];
    for (int r = 0; r < R; ++r) {
      prefetch_bytes<(L::Element::kWidth + 1) / 2 * 64>(readers[r].src, ahead);
      readers[r].next(load_mask(bits + r * bitmask_bytes(w.cols), columns), lanes[r]);
    }
    for (int vector = 0; vector < kVectors<L>; ++vector) {
      for (int i = 0; i < M; ++i) {
        const typename L::Lanes operand = L::load(x + i * x_stride + vector * L::kLanes * kLaneBytes<L>);
        for (int r = 0; r < R; ++r) {
          typename L::Sums& chain = sums[r][i][(at * kVectors<L> + vector) % kOwn];
          chain = L::multiply_add(lanes[r][vector], operand, chain);
        }
      }
    }
    x += kGroupBytes<L>;
    bits += 8;
  };
  int64_t group = 0;
  for (; group + kUnroll <= w.cols / kGroup; group += kUnroll) {
    for (int at = 0; at < kUnroll; ++at) step(kGroup, at);
  }
  for (; group < w.cols / kGroup; ++group) step(kGroup, 0);
  if (w.cols % kGroup != 0) step(w.cols % kGroup, 0);
  for (int r = 0; r < R; ++r) {
    taken[r] = readers[r].taken_since(first[r]);
    for (int i = 0; i < M; ++i) {
      for (int chain = 1; chain < kOwn; ++chain) sums[r][i][0] = L::add(sums[r][i][0], sums[r][i][chain]);
      y[r][i] = L::reduce(sums[r][i][0]);
    }
  }
}

// R rows from `row` on: the first faulty one, or row + R.
template <class L, int R, int M, bool kBounded>
inline int64_t stream_rows(const BitmaskMatrix& w, int64_t row, const int64_t* borders, const uint8_t* x, const uint8_t* bias, uint8_t* y) {
  using Element = typename L::Element;
  typename L::Sum products[R][M];
  int64_t taken[R];
  const int64_t reach = (borders[R] - borders[0]) * Element::kWidth;
  dot_rows<L, R, M, kBounded>(w, row, borders, reach > kPrefetchBytes ? reach : kPrefetchBytes, x, groups_of(w.cols) * kGroupBytes<L>,
                              products, taken);
  for (int r = 0; r < R; ++r, ++row) {
    if (taken[r] != borders[r + 1] - borders[r] || !padding_is_zero(w, row)) return row;
    const typename L::Sum offset = bias == nullptr ? 0 : Element::widen(bias + row * Element::kWidth);
    for (int i = 0; i < M; ++i) Element::narrow(products[r][i] + offset, y + (i * w.rows + row) * Element::kWidth);
  }
  return row;
}

template <class L, int M>
int64_t stream_all(const BitmaskMatrix& w, int64_t begin, int64_t end, const uint8_t* lanes, const uint8_t* bias, uint8_t* y) {
  constexpr int kFit = L::kStreamSums / M;
  constexpr int R = M < kFit ? M : kFit;  // one row of x: the one stream of bytes that memory delivers fastest
  for (int64_t row = begin; row < end;) {
    int64_t borders[R + 1];
    const int found = find_rows<R>(w, row, end, borders);
    if (found == 0) return row;
    const bool together = found == R && w.nnz - borders[R - 1] >= w.cols + kGroup;  // far enough from the end of the values
    const int64_t next = together ? stream_rows<L, R, M, false>(w, row, borders, lanes, bias, y)
                                  : stream_rows<L, 1, M, true>(w, row, borders, lanes, bias, y);
    if (next < row + (together ? R : 1)) return next;
    row = next;
  }
  return end;
}

template <class L, int M = L::kStreamedRows>
int64_t stream(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* lanes, int64_t m, const void* bias, void* y) {
  if constexpr (M > 1) {
    if (m < M) return stream<L, M - 1>(w, begin, end, lanes, m, bias, y);
  }
  return stream_all<L, M>(w, begin, end, static_cast<const uint8_t*>(lanes), static_cast<const uint8_t*>(bias), static_cast<uint8_t*>(y));
}

// ---- More rows of x

// Memory of one call of multiply.
template <class L>
struct Scratch {
  alignas(64) uint8_t rows[L::kLanes][kGroupBytes<L>];                                       // one group of each row of a strip
  alignas(64) uint8_t tile[kTileRows / L::kLanes][kBlockLanes * L::kLanes * kLaneBytes<L>];  // of each strip, [kBlockLanes][kLanes rows]
  alignas(64) typename L::Sum bias[kTileRows];
  alignas(64) typename L::Sum sums[kBlockRows * kTileRows];  // [rows of x][rows of W]
};

// The rows [begin, begin + rows) of W and how far each has been read: strips of kLanes rows, the last ones perhaps absent.
template <class L>
struct Tile {
  int64_t begin, rows, strips;
  int64_t pace;  // bytes of values that a group of a row takes on average
  RowReader<L, true> readers[kTileRows];
  const uint8_t* first[kTileRows];
  int64_t counts[kTileRows];

  int64_t rows_of(int64_t strip) const {
    const int64_t left = rows - strip * L::kLanes;
    return left < 0 ? 0 : left < L::kLanes ? left : L::kLanes;
  }
};

// Finds the rows of a tile; returns the first one whose offsets cannot be, or one before it whose bitmask is faulty, or `end`.
template <class L>
int64_t open_tile(const BitmaskMatrix& w, int64_t begin, int64_t end, Tile<L>& tile) {
  tile.begin = begin;
  tile.rows = end - begin;
  tile.strips = (tile.rows + kStrips * L::kLanes - 1) / (kStrips * L::kLanes) * kStrips;
  int64_t total = 0;
  for (int64_t i = 0; i < tile.rows; ++i) {
    int64_t start;
    if (!find_row(w, begin + i, &start, &tile.counts[i])) {
      const uint8_t* const bitmasks = w.bitmasks + begin * bitmask_bytes(w.cols);
      return begin + first_faulty_row(bitmasks, w.row_offsets + begin, i, w.cols, w.row_offsets[begin + i], w.nnz);
    }
    tile.readers[i] = reader_at<L, true>(w, start);
    tile.first[i] = tile.readers[i].src;
    total += tile.counts[i];
  }
  tile.pace = w.cols == 0 ? 0 : total * L::Element::kWidth / (tile.rows * groups_of(w.cols));
  for (int64_t i = tile.rows; i < tile.strips * L::kLanes; ++i) tile.readers[i] = tile.readers[0];  // absent, but prefetched
  return end;
}

// Expands one group of each of `rows` <= kLanes rows of W into a transposed block of the tile; absent rows are zero. All rows advance
// together, as that many streams, which are too short for the hardware to foresee: so each asks for a piece of the row that has its place
// in the next strip, `ahead` bytes after where that one was left.
template <class L>
inline void expand_block(const uint8_t* bits, int64_t row_bytes, int64_t columns, int64_t rows, RowReader<L, true>* readers,
                         const RowReader<L, true>* next, int64_t ahead, uint8_t (&expanded)[L::kLanes][kGroupBytes<L>], uint8_t* block) {
  constexpr int64_t kVector = L::kLanes * kLaneBytes<L>;
  for (int64_t i = 0; i < rows; ++i, bits += row_bytes) {
    typename L::Lanes lanes[kVectors<L>];
    prefetch_bytes<(L::Element::kWidth + 1) / 2 * 64>(next[i].src, ahead);
    readers[i].next(load_mask(bits, columns), lanes);
    for (int vector = 0; vector < kVectors<L>; ++vector) L::store(lanes[vector], expanded[i] + vector * kVector);
  }
  for (int vector = 0; vector < kVectors<L>; ++vector) {
    L::transpose(expanded[0] + vector * kVector, kGroupBytes<L>, block + vector * L::kLanes * kVector);
  }
}

// Expands `groups` groups, from the group-th on, of a strip of the tile.
template <class L>
void expand_strip(const BitmaskMatrix& w, Tile<L>& tile, int64_t strip, int64_t group, int64_t groups, Scratch<L>& scratch) {
  const int64_t row_bytes = bitmask_bytes(w.cols), rows = tile.rows_of(strip);
  const uint8_t* bits = w.bitmasks + (tile.begin + strip * L::kLanes) * row_bytes + group * 8;
  const RowReader<L, true>* const next = tile.readers + (strip + 1) % tile.strips * L::kLanes;
  RowReader<L, true>* const readers = tile.readers + strip * L::kLanes;
  uint8_t* block = scratch.tile[strip];
  if (rows < L::kLanes) __builtin_memset(scratch.rows, 0, sizeof(scratch.rows));
  for (int64_t i = 0; i < rows; ++i) {  // the bitmasks of the next strip
    prefetch_bytes<kBlockLanes * L::kDepth / 8>(bits, (L::kLanes + i) * row_bytes);
  }
  for (int64_t i = 0; i < groups; ++i, bits += 8, block += L::kLanes * kGroupBytes<L>) {
    const int64_t columns = w.cols - (group + i) * kGroup;
    if (columns >= kGroup) {
      expand_block<L>(bits, row_bytes, kGroup, rows, readers, next, i * tile.pace, scratch.rows, block);
    } else {
      expand_block<L>(bits, row_bytes, columns, rows, readers, next, i * tile.pace, scratch.rows, block);
    }
  }
}

// sums [MR, kStrips * kLanes] += panel [lanes, MR] x two strips [lanes, kLanes].
template <class L, int MR>
void product(const uint8_t* panel, const uint8_t* strip0, const uint8_t* strip1, int64_t lanes, uint8_t* sums) {
  constexpr int64_t kVector = L::kLanes * kLaneBytes<L>;
  constexpr int64_t kStride = kTileRows * kLaneBytes<L>;
  typename L::Sums acc[MR][kStrips];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    acc[i][0] = L::load_sums(sums + i * kStride);
    acc[i][1] = L::load_sums(sums + i * kStride + kVector);
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const typename L::Lanes w0 = L::load(strip0 + lane * kVector);
    const typename L::Lanes w1 = L::load(strip1 + lane * kVector);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const typename L::Lanes x = L::broadcast(panel + (lane * L::kPanelRows + i) * kLaneBytes<L>);
      acc[i][0] = L::multiply_add(w0, x, acc[i][0]);
      acc[i][1] = L::multiply_add(w1, x, acc[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    L::store_sums(acc[i][0], sums + i * kStride);
    L::store_sums(acc[i][1], sums + i * kStride + kVector);
  }
}

// The product of one panel, `rows` rows of which are there, with the strips of a tile.
template <class L>
void multiply_panel(const uint8_t* panel, int64_t rows, const Scratch<L>& scratch, int64_t strips, int64_t lanes, uint8_t* sums) {
  constexpr int kThird = L::kPanelRows / 3;
  const auto run = rows <= kThird ? product<L, kThird> : rows <= 2 * kThird ? product<L, 2 * kThird> : product<L, 3 * kThird>;
  for (int64_t strip = 0; strip < strips; strip += kStrips) {
    run(panel, scratch.tile[strip], scratch.tile[strip + 1], lanes, sums + strip * L::kLanes * kLaneBytes<L>);
  }
}

template <class L>
void round_sums(const Scratch<L>& scratch, int64_t m, int64_t rows, uint8_t* y, int64_t y_stride) {
  constexpr int64_t kWidth = L::Element::kWidth;
  for (int64_t i = 0; i < m; ++i, y += y_stride) {
    const uint8_t* const sums = reinterpret_cast<const uint8_t*>(scratch.sums + i * kTileRows);
    for (int64_t row = 0; row < rows; row += L::kLanes) {
      uint8_t rounded[L::kLanes * kWidth];
      const bool whole = rows - row >= L::kLanes;
      uint8_t* const dst = y + row * kWidth;
      L::round(L::load_sums(sums + row * kLaneBytes<L>), whole ? dst : rounded);
      if (!whole) copy_bytes(dst, rounded, (rows - row) * kWidth);
    }
  }
}

template <class L>
int64_t multiply(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* panels, int64_t m, const void* bias, void* y,
                 void* scratch_memory) {
  using Element = typename L::Element;
  constexpr int64_t kGroups = kBlockLanes * L::kDepth / kGroup;  // of a block
  Scratch<L>& scratch = *static_cast<Scratch<L>*>(scratch_memory);
  Tile<L> tile;
  const int64_t faulty = open_tile(w, begin, end, tile);
  if (faulty < end) return faulty;
  for (int64_t i = 0; i < kTileRows; ++i) {
    const bool present = bias != nullptr && i < tile.rows;
    scratch.bias[i] = present ? Element::widen(static_cast<const uint8_t*>(bias) + (begin + i) * Element::kWidth) : 0;
  }
  const int64_t padded = (m + L::kPanelRows - 1) / L::kPanelRows * L::kPanelRows;
  for (int64_t i = 0; i < padded; ++i) copy_bytes(scratch.sums + i * kTileRows, scratch.bias, static_cast<int64_t>(sizeof(scratch.bias)));
  for (int64_t group = 0; group < groups_of(w.cols); group += kGroups) {
    const int64_t groups = groups_of(w.cols) - group < kGroups ? groups_of(w.cols) - group : kGroups;
    const int64_t lanes = groups * kGroup / L::kDepth;
    for (int64_t strip = 0; strip < tile.strips; ++strip) expand_strip<L>(w, tile, strip, group, groups, scratch);
    for (int64_t i = 0; i < m; i += L::kPanelRows) {
      const uint8_t* const panel = static_cast<const uint8_t*>(panels) + (i * groups_of(w.cols) + group * L::kPanelRows) * kGroupBytes<L>;
      multiply_panel<L>(panel, m - i, scratch, tile.strips, lanes, reinterpret_cast<uint8_t*>(scratch.sums + i * kTileRows));
    }
  }
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (tile.readers[i].taken_since(tile.first[i]) != tile.counts[i] || !padding_is_zero(w, begin + i)) return begin + i;
  }
  round_sums<L>(scratch, m, tile.rows, static_cast<uint8_t*>(y) + begin * Element::kWidth, w.rows * Element::kWidth);
  return end;
}

// ---- Gradient of x: g W, where the lanes are columns of W and what is summed over are its rows

// Where column `col` of each row of W begins in its values; returns the first row whose offsets cannot be, or w.rows.
template <class L>
int64_t find_column(const BitmaskMatrix& w, int64_t col, RowReader<L, true>* readers) {
  for (int64_t row = 0; row < w.rows; ++row) {
    int64_t start, count;
    if (!find_row(w, row, &start, &count)) return row;
    const int64_t before = count_bits(w.bitmasks + row * bitmask_bytes(w.cols), col / 8);
    readers[row] = reader_at<L, true>(w, start + (before < count ? before : count));
  }
  return w.rows;
}

// Expands the columns [begin, end), whole groups but for the end of W, of the rows [row, row + rows) into the tile, whose strips are then
// [rows][kLanes columns].
template <class L>
void expand_columns(const BitmaskMatrix& w, int64_t row, int64_t rows, int64_t begin, int64_t end, RowReader<L, true>* readers,
                    Scratch<L>& scratch) {
  constexpr int64_t kVector = L::kLanes * kLaneBytes<L>;
  for (int64_t i = 0; i < rows; ++i) {
    RowReader<L, true> reader = readers[row + i];
    const uint8_t* const bits = w.bitmasks + (row + i) * bitmask_bytes(w.cols);
    int64_t strip = 0;
    for (int64_t col = begin; col < end; col += kGroup) {
      typename L::Lanes lanes[kVectors<L>];
      reader.next(load_mask(bits + col / 8, end - col < kGroup ? end - col : kGroup), lanes);
      for (int vector = 0; vector < kVectors<L>; ++vector, ++strip) L::store(lanes[vector], scratch.tile[strip] + i * kVector);
    }
    readers[row + i] = reader;
  }
}

template <class L>
int64_t multiply_transposed(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* panels, int64_t m, void* y, void* readers,
                            void* scratch_memory) {
  constexpr int64_t kTileColumns = kTileRows;
  constexpr int64_t kWidth = L::Element::kWidth;
  Scratch<L>& scratch = *static_cast<Scratch<L>*>(scratch_memory);
  RowReader<L, true>* const rows = static_cast<RowReader<L, true>*>(readers);
  const int64_t panel_bytes = groups_of(w.rows) * L::kPanelRows * kGroupBytes<L>;
  const int64_t faulty = find_column<L>(w, begin, rows);
  if (faulty < w.rows) return faulty;
  for (int64_t col = begin; col < end; col += kTileColumns) {
    const int64_t columns = end - col < kTileColumns ? end - col : kTileColumns;
    const int64_t strips = groups_of(columns) * kVectors<L>;
    __builtin_memset(scratch.sums, 0, sizeof(scratch.sums));
    for (int64_t row = 0; row < w.rows; row += kBlockLanes) {
      const int64_t depth = w.rows - row < kBlockLanes ? w.rows - row : kBlockLanes;
      expand_columns<L>(w, row, depth, col, col + columns, rows, scratch);
      for (int64_t i = 0; i < m; i += L::kPanelRows) {
        const uint8_t* const panel = static_cast<const uint8_t*>(panels) + i / L::kPanelRows * panel_bytes;
        multiply_panel<L>(panel + row * L::kPanelRows * kLaneBytes<L>, m - i, scratch, strips, depth,
                          reinterpret_cast<uint8_t*>(scratch.sums + i * kTileRows));
      }
    }
    round_sums<L>(scratch, m, columns, static_cast<uint8_t*>(y) + col * kWidth, w.cols * kWidth);
  }
  return w.rows;
}

// L multiplies, G takes gradients: one column in each lane, because there rows of W would have to be paired.
template <class L, class G = L>
constexpr LinearKernels linear_kernels() {
  static_assert(G::kDepth == 1 && kVectors<G> % kStrips == 0, "strips of a gradient are pieces of rows");
  static_assert(G::kPanelRows == L::kPanelRows, "x and g are packed into panels of the same size");
  static_assert(kBlockRows % L::kPanelRows == 0 && L::kPanelRows % 3 == 0 && kTileRows % (kStrips * L::kLanes) == 0, "");
  static_assert(L::kStreamSums >= L::kStreamedRows, "stream keeps the sums of at least one row of W");
  LinearKernels kernels{};
  kernels.group_bytes = kGroupBytes<L>;
  kernels.streaming_rows = L::kStreamedRows;
  kernels.panel_rows = L::kPanelRows;
  kernels.block_rows = kBlockRows;
  kernels.tile_rows = kTileRows;
  kernels.scratch_bytes = sizeof(Scratch<L>);
  kernels.pack_rows = pack_rows<L>;
  kernels.pack_panel = pack_panel<L>;
  kernels.stream = stream<L>;
  kernels.multiply = multiply<L>;
  kernels.gradient_group_bytes = kGroupBytes<G>;
  kernels.gradient_scratch_bytes = sizeof(Scratch<G>);
  kernels.reader_bytes = sizeof(RowReader<G, true>);
  kernels.pack_gradient = pack_panel<G>;
  kernels.multiply_transposed = multiply_transposed<G>;
  return kernels;
}
