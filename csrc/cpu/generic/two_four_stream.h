// y = x W^T + bias for few rows of x and a 2:4 W: as in linear_stream.h, but where values lie is known before the metadata is read, and
// what has to be proven is that all fours of columns have two of them.

// Whether one row of metadata is what it must be. A pass of its own over what has just been read: it takes whole vectors of mask words.
inline bool metadata_is_valid(const uint8_t* bits, int64_t cols) {
  uint64_t faults = 0, last = 0;
  for (int64_t group = 0; group < cols / kGroup; ++group) faults |= faulty_groups(load_mask(bits + group * 8, kGroup), kGroup);
  copy_bytes(&last, bits + cols / kGroup * 8, bitmask_bytes(cols % kGroup));
  return (faults | faulty_groups(last, cols % kGroup)) == 0;
}

// Reads the values of a row.
template <class L, bool kBounded>
struct TwoFourReader : RowReader<L, kBounded> {
  void next(uint64_t mask, typename L::Lanes (&lanes)[kVectors<L>]) {
    const uint8_t* const src = this->src;
    RowReader<L, kBounded>::next(mask, lanes);
    if (!kBounded) this->src = src + kGroup / 2 * L::Element::kWidth;  // whatever the mask says
  }
};

struct TwoFourRows {
  using Matrix = TwoFourMatrix;
  template <class L, bool kBounded>
  using Reader = TwoFourReader<L, kBounded>;

  static const uint8_t* bits_of(const Matrix& w, int64_t row) { return w.metadata + row * bitmask_bytes(w.cols); }
  static int64_t value_count(const Matrix& w) { return w.rows * (w.cols / 2); }

  template <int R>
  static int find(const Matrix& w, int64_t row, int64_t end, int64_t (&borders)[R + 1]) {
    for (int r = 0; r <= R; ++r) borders[r] = (row + r) * (w.cols / 2);
    return end - row < R ? static_cast<int>(end - row) : R;
  }

  template <class L, bool kBounded>
  static Reader<L, kBounded> open(const Matrix& w, int64_t start) {
    const uint8_t* const values = static_cast<const uint8_t*>(w.values);
    return {{values + start * L::Element::kWidth, values + value_count(w) * L::Element::kWidth, 0}};
  }

  template <class L, bool kBounded>
  static bool proven(const Matrix& w, int64_t row, const int64_t*, const Reader<L, kBounded>&) {
    return metadata_is_valid(bits_of(w, row), w.cols);
  }
};
