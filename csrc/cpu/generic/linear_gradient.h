// The gradient of x, y = g W: as in linear_multiply.h, but the lanes are columns of W, and what is summed over are its rows. So rows are
// expanded into the tile as they are, and every task has some columns of all rows.

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
  for (int64_t i = 0; i < rows; ++i) {
    RowReader<L, true> reader = readers[row + i];
    const uint8_t* const bits = w.bitmasks + (row + i) * bitmask_bytes(w.cols);
    int64_t strip = 0;
    for (int64_t col = begin; col < end; col += kGroup) {
      typename L::Lanes lanes[kVectors<L>];
      reader.next(load_mask(bits + col / 8, end - col < kGroup ? end - col : kGroup), lanes);
      for (int vector = 0; vector < kVectors<L>; ++vector, ++strip) L::store(lanes[vector], scratch.tile[strip] + i * kVectorBytes<L>);
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
