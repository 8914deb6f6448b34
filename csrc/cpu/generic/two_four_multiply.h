// y = x W^T + bias for more rows of x and a 2:4 W: half of the arithmetic of linear_multiply.h, whose tiles, panels and loops these are.
//
// Dropped columns are not multiplied. A vector holds one stored lane of kLanes rows of W, and each of these rows has its own two columns of
// four: so each lane is given some whole fours of x, and selects what it meets of them by one shuffle.
//
//   strip   [steps][kLanes rows of W] stored lanes, then as many vectors of what these select: together as large as an expanded strip
//   panel   [units][kPanelRows rows of x][lanes of a unit], a unit being the columns that a lane can be selected from
//   step    one stored lane: one of the two columns of a four or, where a lane is a pair, both

template <class L>
constexpr int kUnitLanes = L::kSelectedFrom / L::kDepth;

template <class L>
constexpr int kUnitSteps = kUnitLanes<L> / 2;

template <class L>
constexpr int kFourSteps = 2 / L::kDepth;

constexpr int64_t kTwoFourMostRows = kBlockRows / 2;  // of x in a call: with more, x leaves the last cache while W goes by
constexpr int64_t kSmallM = 32;                       // rows of x that reuse a tile too little to pay for one that outgrows the first cache
constexpr int64_t kSmallTileRows = 32;                // of W

template <class L>
struct TwoFourStrip {
  using Row = typename L::Columns;
  struct Stored {
    typename L::Lanes values;
    typename L::Selectors selectors;
  };
  static constexpr int64_t kSelectors = kBlockLanes / 2 * kVectorBytes<L>;  // where they begin

  static Stored load(const uint8_t* strip, int64_t step) {
    return {L::load(strip + step * kVectorBytes<L>), L::load_selectors(strip + kSelectors + step * kVectorBytes<L>)};
  }
  static Row row_of(const uint8_t* panel, int64_t step, int row) {
    return L::load_columns(panel + (step / kUnitSteps<L> * L::kPanelRows + row) * kUnitLanes<L> * kLaneBytes<L>);
  }
  static typename L::Sums multiply_add(const Stored& w, Row x, typename L::Sums sums) {
    return L::multiply_add(w.values, L::select(x, w.selectors), sums);
  }
};

// ---- Rows of x

template <class L>
int64_t two_four_tiles_bytes(int64_t m, int64_t cols) {
  return blocks_across(m, L::kPanelRows) * L::kPanelRows * groups_of(cols) * kGroupBytes<L>;
}

// Infinities and NaNs are what zero does not make zero.
template <class L>
bool all_finite(const uint8_t* x, int64_t count) {
  constexpr int64_t kStep = L::kLanes * L::kDepth, kBytes = kStep * L::Element::kWidth;
  uint8_t edge[kBytes] = {};
  const typename L::Lanes zeros = L::widen(edge);
  typename L::Sums sums = L::zero();
  for (; count >= kStep; count -= kStep, x += kBytes) sums = L::multiply_add(L::widen(x), zeros, sums);
  copy_bytes(edge, x, count * L::Element::kWidth);
  return L::reduce(L::multiply_add(L::widen(edge), zeros, sums)) == 0;
}

template <class L>
bool two_four_pack_tiles(const void* x, int64_t m, int64_t cols, void* tiles) {
  const uint8_t* const rows = static_cast<const uint8_t*>(x);
  bool finite = true;
  for (int64_t i = 0; i < m; i += L::kPanelRows) {
    const uint8_t* const src = rows + i * cols * L::Element::kWidth;
    const int64_t count = at_most(m - i, L::kPanelRows);
    finite = all_finite<L>(src, count * cols) && finite;
    pack_panel<L, kUnitLanes<L>>(src, count, cols, static_cast<uint8_t*>(tiles) + two_four_tiles_bytes<L>(i, cols));
  }
  return finite;
}

// ---- Rows of W

// What a lane selects in the steps of a four, by its nibble of metadata: the number of a column or, of a pair, the four bytes. A nibble
// that has not two bits set selects something.
template <class L>
struct SelectorTable {
  alignas(64) uint32_t steps[kFourSteps<L>][16];

  constexpr SelectorTable() : steps() {
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      uint32_t columns[4] = {};
      int count = 0;
      for (uint32_t column = 0; column < 4; ++column) {
        if ((nibble >> column & 1) != 0) columns[count++] = column;
      }
      for (int i = 0; i < 2; ++i) {
        if constexpr (L::kDepth == 1) {
          steps[i][nibble] = columns[i];
        } else {
          steps[0][nibble] |= (2 * columns[i] | (2 * columns[i] + 1) << 8) << (16 * i);
        }
      }
    }
  }
};

template <class L>
constexpr SelectorTable<L> kSelectorTable;

// The selectors of `columns` columns of `rows` <= kLanes rows, whose metadata is row_bytes apart; a last mask word is taken whole.
template <class L>
void fill_selectors(const uint8_t* bits, int64_t row_bytes, int64_t rows, int64_t columns, uint8_t* dst) {
  static_assert(kLaneBytes<L> == 4 && 32 % L::kSelectedFrom == 0, "a lane is a mask word of 32 columns, and these are whole units");
  constexpr int64_t kChunk = L::kLanes * 32;
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes<L>)));
  alignas(64) uint8_t edge[L::kLanes][kVectorBytes<L>], words[L::kLanes][kVectorBytes<L>];
  for (int64_t col = 0; col < columns; col += kChunk, bits += kChunk / 8) {
    const int64_t left = at_most(columns - col, kChunk);
    const bool direct = rows == L::kLanes && left == kChunk;
    if (!direct) __builtin_memset(edge, 0, sizeof(edge));
    for (int64_t i = 0; i < rows && !direct; ++i) copy_bytes(edge[i], bits + i * row_bytes, bitmask_bytes(left));
    L::transpose(direct ? bits : edge[0], direct ? row_bytes : kVectorBytes<L>, words[0]);
    for (int64_t word = 0; word < blocks_across(left, 32); ++word) {
#pragma GCC unroll 8
      for (uint32_t at = 0; at < 32; at += 4, dst += kFourSteps<L> * kVectorBytes<L>) {
        for (int step = 0; step < kFourSteps<L>; ++step) {
          const Words selectors = L::look_up(kSelectorTable<L>.steps[step], load_as<Words>(words[word]) >> at);
          store_as(L::kDepth == 1 ? selectors + at % L::kSelectedFrom : selectors, dst + step * kVectorBytes<L>);
        }
      }
    }
  }
}

// Fills a strip with `columns` columns from `col` on of `rows` <= kLanes rows from `row` on.
template <class L>
void fill_strip(const TwoFourMatrix& w, int64_t row, int64_t rows, int64_t col, int64_t columns, uint8_t* strip) {
  const int64_t values_bytes = w.cols / 2 * L::Element::kWidth, bits_bytes = bitmask_bytes(w.cols);
  const uint8_t* const values = static_cast<const uint8_t*>(w.values) + row * values_bytes + col / 2 * L::Element::kWidth;
  pack_vector_of_rows<L>(values, values_bytes, rows, columns / 2, strip, kVectorBytes<L>);
  fill_selectors<L>(w.metadata + row * bits_bytes + col / 8, bits_bytes, rows, columns, strip + TwoFourStrip<L>::kSelectors);
}

template <class L>
int64_t two_four_multiply(const TwoFourMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y,
                          void* scratch_memory) {
  constexpr int64_t kWidth = L::Element::kWidth;
  Scratch<L>& scratch = *static_cast<Scratch<L>*>(scratch_memory);
  const int64_t most = m <= kSmallM ? kSmallTileRows : kTileRows;
  for (int64_t row = begin, rows; row < end; row += rows) {
    rows = at_most(end - row, most);
    for (int64_t i = row; i < row + rows; ++i) {
      if (!metadata_is_valid(w.metadata + i * bitmask_bytes(w.cols), w.cols)) return i;
    }
    start_sums<L>(bias == nullptr ? nullptr : static_cast<const uint8_t*>(bias) + row * kWidth, rows, m, scratch);
    const int64_t strips = blocks_across(rows, kStrips * L::kLanes) * kStrips;
    add_products<L, TwoFourStrip<L>>(w.cols, strips, tiles, m, scratch, [&](int64_t strip, int64_t group, int64_t groups) {
      const int64_t first = strip * L::kLanes, there = first < rows ? at_most(rows - first, L::kLanes) : 0;
      const int64_t columns = at_most(groups * kGroup, w.cols - group * kGroup);
      fill_strip<L>(w, row + at_most(first, rows), there, group * kGroup, columns, scratch.tile[strip]);
      return columns / 4 * kFourSteps<L>;
    });
    round_sums(scratch, m, rows, static_cast<uint8_t*>(y) + row * kWidth, w.rows * kWidth);
  }
  return end;
}
