// What the linear kernels share: the rows of a compressed W, proven while they are read, and the rows of x, repacked.
//
//   linear_stream.h     few rows of x
//   linear_multiply.h   more rows of x
//   linear_gradient.h   the gradient of x
//
// A row of W must hold as many values as its bitmask has bits; the kernels look only at values inside the range given, whatever the parts
// say. Dropped elements are multiplied as zeros, so that infinities and NaNs in x come out as in a dense product.

template <class L>
constexpr int64_t kLaneBytes = sizeof(typename L::Sum);

template <class L>
constexpr int64_t kVectorBytes = L::kLanes * kLaneBytes<L>;

template <class L>
constexpr int kVectors = kGroup / L::kDepth / L::kLanes;  // of a group

template <class L>
constexpr int64_t kGroupBytes = kGroup / L::kDepth * kLaneBytes<L>;

constexpr int64_t groups_of(int64_t cols) { return blocks_across(cols, kGroup); }

// Rounds `count` sums that follow each other. They are read by whole vectors, but no more elements are written.
template <class L>
inline void round_elements(const uint8_t* sums, int64_t count, uint8_t* dst) {
  constexpr int64_t kBytes = L::kLanes * L::Element::kWidth;
  for (; count >= L::kLanes; count -= L::kLanes, sums += kVectorBytes<L>, dst += kBytes) L::round(L::load_sums(sums), dst);
  if (count > 0) {
    uint8_t rounded[kBytes];
    L::round(L::load_sums(sums), rounded);
    copy_bytes(dst, rounded, count * L::Element::kWidth);
  }
}

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

// Of one row of bits.
inline bool padding_is_zero(const uint8_t* bits, int64_t cols) {
  const int used = cols % 8;
  return used == 0 || bits[cols / 8] >> used == 0;
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

// The panel is [units][kPanelRows][kUnit lanes], a unit being lanes of a row that belong together.
template <class L, int kUnit = 1>
void pack_panel(const void* x, int64_t rows, int64_t cols, void* panel) {
  constexpr int64_t kUnitBytes = kUnit * kLaneBytes<L>;
  constexpr int64_t kUnitsOfGroup = kGroupBytes<L> / kUnitBytes;
  if (cols == 0) return;  // the panel may be a null pointer
  for (int64_t row = 0; row < L::kPanelRows; ++row) {
    const uint8_t* const src = static_cast<const uint8_t*>(x) + row * cols * L::Element::kWidth;
    uint8_t* dst = static_cast<uint8_t*>(panel) + row * kUnitBytes;
    for (int64_t col = 0; col < cols; col += kGroup) {
      alignas(64) uint8_t group[kGroupBytes<L>] = {};
      const int64_t columns = cols - col < kGroup ? cols - col : kGroup;
      if (row < rows) widen_row<L>(src + col * L::Element::kWidth, columns, group);
      for (int64_t unit = 0; unit < kUnitsOfGroup; ++unit, dst += L::kPanelRows * kUnitBytes) {
        copy_bytes(dst, group + unit * kUnitBytes, kUnitBytes);
      }
    }
  }
}
