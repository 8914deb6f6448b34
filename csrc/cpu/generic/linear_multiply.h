// y = x W^T + bias for more rows of x: bound by arithmetic.
//
// A tile of W is expanded once into the cache, transposed, and multiplied with all rows of x, kPanelRows at a time, by a product blocked as
// in BLIS (https://github.com/flame/blis): the panel of x stays in the first cache, the tile in the second, kPanelRows x 2 vectors of sums
// in registers.
//
//   tile     [strips][kBlockLanes lanes][kLanes rows of W]    a vector is one lane (one column or two) of kLanes rows
//   panel    [lanes of a row][kPanelRows rows of x]           each lane is broadcast

constexpr int kStrips = 2;            // strips multiplied at a time: vectors of W beside each other
constexpr int64_t kBlockLanes = 512;  // lanes of a row that are expanded at a time
constexpr int64_t kTileRows = 128;    // rows of W in a tile: kTileRows * kBlockLanes * 4 bytes take a quarter of a second-level cache
constexpr int64_t kBlockRows = 1032;  // rows of x for which sums are kept; a multiple of every kPanelRows

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
  const uint8_t* upcoming[L::kLanes];  // where the rows after the tile begin, about: they are only prefetched
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
  const int64_t groups = tile.rows * groups_of(w.cols);
  tile.pace = groups == 0 ? 0 : total * L::Element::kWidth / groups;
  for (int64_t i = tile.rows; i < tile.strips * L::kLanes; ++i) tile.readers[i] = tile.readers[0];  // absent, but prefetched
  for (int64_t i = 0; i < L::kLanes; ++i) {
    const int64_t start = end + i < w.rows ? w.row_offsets[end + i] : 0;
    tile.upcoming[i] = reader_at<L, true>(w, start < 0 || start > w.nnz ? 0 : start).src;
  }
  return end;
}

// Expands one group of each of `rows` <= kLanes rows of W into a transposed block of the tile; absent rows are zero. All rows advance
// together, as that many streams, which are too short for the hardware to foresee: so each asks for a piece of the row that has its place
// in the next strip, `ahead` bytes after where that one was left.
template <class L>
inline void expand_block(const uint8_t* bits, int64_t row_bytes, int64_t columns, int64_t rows, RowReader<L, true>* readers,
                         const uint8_t* const* next, int64_t ahead, uint8_t (&expanded)[L::kLanes][kGroupBytes<L>], uint8_t* block) {
  for (int64_t i = 0; i < rows; ++i, bits += row_bytes) {
    typename L::Lanes lanes[kVectors<L>];
    prefetch_bytes<(L::Element::kWidth + 1) / 2 * 64>(next[i], ahead);
    readers[i].next(load_mask(bits, columns), lanes);
    for (int vector = 0; vector < kVectors<L>; ++vector) L::store(lanes[vector], expanded[i] + vector * kVectorBytes<L>);
  }
  for (int vector = 0; vector < kVectors<L>; ++vector) {
    L::transpose(expanded[0] + vector * kVectorBytes<L>, kGroupBytes<L>, block + vector * L::kLanes * kVectorBytes<L>);
  }
}

// Expands `groups` groups, from the group-th on, of a strip of the tile.
template <class L>
void expand_strip(const BitmaskMatrix& w, Tile<L>& tile, int64_t strip, int64_t group, int64_t groups, Scratch<L>& scratch) {
  const int64_t row_bytes = bitmask_bytes(w.cols), rows = tile.rows_of(strip);
  const uint8_t* bits = w.bitmasks + (tile.begin + strip * L::kLanes) * row_bytes + group * 8;
  const uint8_t* next[L::kLanes];
  const bool last = strip + 1 == tile.strips && group + groups == groups_of(w.cols);
  for (int64_t i = 0; i < L::kLanes; ++i) {
    next[i] = last ? tile.upcoming[i] : tile.readers[(strip + 1) % tile.strips * L::kLanes + i].src;
  }
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

// ---- Products

// How a strip of expanded rows is multiplied: step by step, a step being one lane. two_four_multiply.h has another way to fill and to
// multiply strips: what the template parameter Strip stands for.
template <class L>
struct ExpandedStrip {
  using Row = typename L::Lanes;

  static typename L::Lanes load(const uint8_t* strip, int64_t step) { return L::load(strip + step * kVectorBytes<L>); }
  // What is multiplied of the row-th row of x.
  static Row row_of(const uint8_t* panel, int64_t step, int row) {
    return L::broadcast(panel + (step * L::kPanelRows + row) * kLaneBytes<L>);
  }
  static typename L::Sums multiply_add(typename L::Lanes w, Row x, typename L::Sums sums) { return L::multiply_add(w, x, sums); }
};

// sums [MR, kStrips * kLanes] += panel [steps, MR] x two strips [steps, kLanes].
template <class L, class Strip, int MR>
void product(const uint8_t* panel, const uint8_t* strip0, const uint8_t* strip1, int64_t steps, uint8_t* sums) {
  constexpr int64_t kStride = kTileRows * kLaneBytes<L>;
  typename L::Sums acc[MR][kStrips];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    acc[i][0] = L::load_sums(sums + i * kStride);
    acc[i][1] = L::load_sums(sums + i * kStride + kVectorBytes<L>);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const auto w0 = Strip::load(strip0, step);
    const auto w1 = Strip::load(strip1, step);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const typename Strip::Row x = Strip::row_of(panel, step, i);
      acc[i][0] = Strip::multiply_add(w0, x, acc[i][0]);
      acc[i][1] = Strip::multiply_add(w1, x, acc[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
    L::store_sums(acc[i][0], sums + i * kStride);
    L::store_sums(acc[i][1], sums + i * kStride + kVectorBytes<L>);
  }
}

// The product of one panel, `rows` rows of which are there, with the strips of a tile.
template <class L, class Strip = ExpandedStrip<L>>
void multiply_panel(const uint8_t* panel, int64_t rows, const Scratch<L>& scratch, int64_t strips, int64_t steps, uint8_t* sums) {
  constexpr int kThird = L::kPanelRows / 3;
  const auto run = rows <= kThird       ? product<L, Strip, kThird>
                   : rows <= 2 * kThird ? product<L, Strip, 2 * kThird>
                                        : product<L, Strip, 3 * kThird>;
  for (int64_t strip = 0; strip < strips; strip += kStrips) {
    run(panel, scratch.tile[strip], scratch.tile[strip + 1], steps, sums + strip * L::kLanes * kLaneBytes<L>);
  }
}

// Sums begin with the bias of `rows` rows of W, if there is one.
template <class L>
void start_sums(const uint8_t* bias, int64_t rows, int64_t m, Scratch<L>& scratch) {
  __builtin_memset(scratch.bias, 0, sizeof(scratch.bias));
  for (int64_t i = 0; bias != nullptr && i < rows; ++i) scratch.bias[i] = L::Element::widen(bias + i * L::Element::kWidth);
  const int64_t padded = (m + L::kPanelRows - 1) / L::kPanelRows * L::kPanelRows;
  for (int64_t i = 0; i < padded; ++i) copy_bytes(scratch.sums + i * kTileRows, scratch.bias, static_cast<int64_t>(sizeof(scratch.bias)));
}

// Adds the products of all panels with a tile, block by block of columns: fill(strip, group, groups) fills a strip with some groups of
// them, and returns how many steps these are.
template <class L, class Strip, class Fill>
void add_products(int64_t cols, int64_t strips, const void* panels, int64_t m, Scratch<L>& scratch, const Fill& fill) {
  constexpr int64_t kGroups = kBlockLanes * L::kDepth / kGroup;  // of a block
  for (int64_t group = 0; group < groups_of(cols); group += kGroups) {
    const int64_t groups = groups_of(cols) - group < kGroups ? groups_of(cols) - group : kGroups;
    int64_t steps = 0;
    for (int64_t strip = 0; strip < strips; ++strip) steps = fill(strip, group, groups);
    for (int64_t i = 0; i < m; i += L::kPanelRows) {
      const uint8_t* const panel = static_cast<const uint8_t*>(panels) + (i * groups_of(cols) + group * L::kPanelRows) * kGroupBytes<L>;
      multiply_panel<L, Strip>(panel, m - i, scratch, strips, steps, reinterpret_cast<uint8_t*>(scratch.sums + i * kTileRows));
    }
  }
}

template <class L>
void round_sums(const Scratch<L>& scratch, int64_t m, int64_t rows, uint8_t* y, int64_t y_stride) {
  for (int64_t i = 0; i < m; ++i, y += y_stride) {
    round_elements<L>(reinterpret_cast<const uint8_t*>(scratch.sums + i * kTileRows), rows, y);
  }
}

template <class L>
int64_t multiply(const BitmaskMatrix& w, int64_t begin, int64_t end, const void* panels, int64_t m, const void* bias, void* y,
                 void* scratch_memory) {
  using Element = typename L::Element;
  Scratch<L>& scratch = *static_cast<Scratch<L>*>(scratch_memory);
  Tile<L> tile;
  const int64_t faulty = open_tile(w, begin, end, tile);
  if (faulty < end) return faulty;
  start_sums<L>(bias == nullptr ? nullptr : static_cast<const uint8_t*>(bias) + begin * Element::kWidth, tile.rows, m, scratch);
  add_products<L, ExpandedStrip<L>>(w.cols, tile.strips, panels, m, scratch, [&](int64_t strip, int64_t group, int64_t groups) {
    expand_strip<L>(w, tile, strip, group, groups, scratch);
    return groups * kGroup / L::kDepth;
  });
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (tile.readers[i].taken_since(tile.first[i]) != tile.counts[i] ||
        !padding_is_zero(w.bitmasks + (begin + i) * bitmask_bytes(w.cols), w.cols)) {
      return begin + i;
    }
  }
  round_sums<L>(scratch, m, tile.rows, static_cast<uint8_t*>(y) + begin * Element::kWidth, w.rows * Element::kWidth);
  return end;
}
