// y = x W^T + bias with a 2:4 W.

// W[row, col], widened, zero where it is not stored.
template <class L>
inline typename L::Sum element_24(const TwoFourMatrix& w, int64_t row, int64_t col) {
  const uint8_t* const bits = w.metadata + row * bitmask_bytes(w.cols);
  if ((bits[col / 8] >> (col % 8) & 1) == 0) return 0;
  const int before = __builtin_popcount(bits[col / 8] >> (col % 8 / 4 * 4) & ((1u << (col % 4)) - 1));
  const uint8_t* const values = static_cast<const uint8_t*>(w.values) + (row * (w.cols / 2) + col / 4 * 2) * L::Element::kWidth;
  return L::Element::widen(values + (before < 2 ? before : 1) * L::Element::kWidth);
}

// `x_at(i, col)` is an element of x, widened.
template <class L, class XAt>
inline int64_t multiply_rows_24(const TwoFourMatrix& w, int64_t begin, int64_t end, const XAt& x_at, int64_t m, const void* bias, void* y) {
  constexpr int64_t kWidth = L::Element::kWidth;
  for (int64_t row = begin; row < end; ++row) {
    if (first_faulty_metadata(w.metadata + row * bitmask_bytes(w.cols), 1, w.cols) == 0) return row;
    for (int64_t i = 0; i < m; ++i) {
      typename L::Sum sum = bias == nullptr ? 0 : L::Element::widen(static_cast<const uint8_t*>(bias) + row * kWidth);
      for (int64_t col = 0; col < w.cols; ++col) sum += element_24<L>(w, row, col) * x_at(i, col);
      L::Element::narrow(sum, static_cast<uint8_t*>(y) + (i * w.rows + row) * kWidth);
    }
  }
  return end;
}

// An element of rows packed by pack_rows: lanes of kDepth columns.
template <class L>
inline typename L::Sum lane_element(const uint8_t* rows, int64_t cols, int64_t i, int64_t col) {
  const uint8_t* const row = rows + i * groups_of(cols) * kGroupBytes<L>;
  if constexpr (L::kDepth == 1) {
    return load_as<typename L::Sum>(row + col * kLaneBytes<L>);
  } else {
    return L::Element::widen(row + col * L::Element::kWidth);
  }
}

template <class L>
int64_t stream_24(const TwoFourMatrix& w, int64_t begin, int64_t end, const void* lanes, int64_t m, const void* bias, void* y) {
  const auto x_at = [&](int64_t i, int64_t col) { return lane_element<L>(static_cast<const uint8_t*>(lanes), w.cols, i, col); };
  return multiply_rows_24<L>(w, begin, end, x_at, m, bias, y);
}

template <class L>
int64_t tiles_bytes_24(int64_t m, int64_t cols) {
  return whole_cache_lines(m * cols * L::Element::kWidth);
}

template <class L>
bool pack_tiles_24(const void* x, int64_t m, int64_t cols, void* tiles) {
  bool finite = true;
  for (int64_t at = 0; at < m * cols; ++at) {
    const typename L::Sum element = L::Element::widen(static_cast<const uint8_t*>(x) + at * L::Element::kWidth);
    finite = finite && element - element == 0;
  }
  copy_bytes(tiles, x, m * cols * L::Element::kWidth);
  return finite;
}

template <class L>
int64_t multiply_24(const TwoFourMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y, void*) {
  const uint8_t* const x = static_cast<const uint8_t*>(tiles);
  const auto x_at = [&](int64_t i, int64_t col) { return L::Element::widen(x + (i * w.cols + col) * L::Element::kWidth); };
  return multiply_rows_24<L>(w, begin, end, x_at, m, bias, y);
}
