// y = x W^T + bias for few rows of x: bound by the bytes of W.
//
// One pass over them, in order: a group of 64 columns is expanded in registers and multiplied with each row of x. One stream of values a
// thread, prefetched by software: hardware prefetchers stop at page ends, and lose streams that are short or many. More rows of x than
// one are multiplied with as many rows of W side by side as registers allow.

constexpr int kChains = 4;  // independent sums that hide the latency of an addition

// The rows of a bitmask matrix, as they are found, read and proven here. two_four_stream.h has those of a 2:4 matrix: what the template
// parameter Rows stands for.
struct BitmaskRows {
  using Matrix = BitmaskMatrix;
  template <class L, bool kBounded>
  using Reader = RowReader<L, kBounded>;

  static const uint8_t* bits_of(const Matrix& w, int64_t row) { return w.bitmasks + row * bitmask_bytes(w.cols); }
  static int64_t value_count(const Matrix& w) { return w.nnz; }

  template <int R>
  static int find(const Matrix& w, int64_t row, int64_t end, int64_t (&borders)[R + 1]) {
    return find_rows<R>(w, row, end, borders);
  }

  template <class L, bool kBounded>
  static Reader<L, kBounded> open(const Matrix& w, int64_t start) {
    return reader_at<L, kBounded>(w, start);
  }

  // Whether `row`, which begins and ends at `borders` and has been read to its end, is what it must be.
  template <class L, bool kBounded>
  static bool proven(const Matrix& w, int64_t row, const int64_t* borders, const Reader<L, kBounded>& reader) {
    const int64_t taken = reader.taken_since(open<L, kBounded>(w, borders[0]).src);
    return taken == borders[1] - borders[0] && padding_is_zero(bits_of(w, row), w.cols);
  }
};

// Products of R rows of W with M rows of x, whose lanes are x_stride bytes apart. What lies `ahead` bytes after the values read is
// prefetched: at least as far as these R rows reach, so that none is asked for twice.
template <class L, class Rows, int R, int M, bool kBounded>
inline void dot_rows(const uint8_t* bits, int64_t cols, typename Rows::template Reader<L, kBounded> (&rows)[R], int64_t ahead,
                     const uint8_t* x, int64_t x_stride, typename L::Sum (&y)[R][M]) {
  constexpr int kOwn = R * M >= kChains ? 1 : kChains / (R * M);  // chains of each product
  constexpr int kUnroll = kOwn > kVectors<L> ? kOwn / kVectors<L> : 1;
  typename L::Sums sums[R][M][kOwn];
  typename Rows::template Reader<L, kBounded> readers[R];  // copies stay in registers
  for (int r = 0; r < R; ++r) {
    readers[r] = rows[r];
    for (auto& chains : sums[r]) {
      for (auto& chain : chains) chain = L::zero();
    }
  }
  const auto step = [&](int64_t columns, int at) __attribute__((always_inline)) {
    typename L::Lanes lanes[R][kVectors<L>];
    for (int r = 0; r < R; ++r) {
      prefetch_bytes<(L::Element::kWidth + 1) / 2 * 64>(readers[r].src, ahead);
      readers[r].next(load_mask(bits + r * bitmask_bytes(cols), columns), lanes[r]);
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
  for (; group + kUnroll <= cols / kGroup; group += kUnroll) {
    for (int at = 0; at < kUnroll; ++at) step(kGroup, at);
  }
  for (; group < cols / kGroup; ++group) step(kGroup, 0);
  if (cols % kGroup != 0) step(cols % kGroup, 0);
  for (int r = 0; r < R; ++r) {
    rows[r] = readers[r];
    for (int i = 0; i < M; ++i) {
      for (int chain = 1; chain < kOwn; ++chain) sums[r][i][0] = L::add(sums[r][i][0], sums[r][i][chain]);
      y[r][i] = L::reduce(sums[r][i][0]);
    }
  }
}

// R rows from `row` on: the first faulty one, or row + R.
template <class L, class Rows, int R, int M, bool kBounded>
inline int64_t stream_rows(const typename Rows::Matrix& w, int64_t row, const int64_t* borders, const uint8_t* x, const uint8_t* bias,
                           uint8_t* y) {
  using Element = typename L::Element;
  typename L::Sum products[R][M];
  typename Rows::template Reader<L, kBounded> readers[R];
  for (int r = 0; r < R; ++r) readers[r] = Rows::template open<L, kBounded>(w, borders[r]);
  const int64_t reach = (borders[R] - borders[0]) * Element::kWidth;
  dot_rows<L, Rows, R, M, kBounded>(Rows::bits_of(w, row), w.cols, readers, reach > kPrefetchBytes ? reach : kPrefetchBytes, x,
                                    groups_of(w.cols) * kGroupBytes<L>, products);
  for (int r = 0; r < R; ++r, ++row) {
    if (!Rows::template proven<L, kBounded>(w, row, borders + r, readers[r])) return row;
    const typename L::Sum offset = bias == nullptr ? 0 : Element::widen(bias + row * Element::kWidth);
    for (int i = 0; i < M; ++i) Element::narrow(products[r][i] + offset, y + (i * w.rows + row) * Element::kWidth);
  }
  return row;
}

template <class L, class Rows, int M>
int64_t stream_all(const typename Rows::Matrix& w, int64_t begin, int64_t end, const uint8_t* lanes, const uint8_t* bias, uint8_t* y) {
  constexpr int kFit = L::kStreamSums / M;
  constexpr int R = M < kFit ? M : kFit;  // one row of x: the one stream of bytes that memory delivers fastest
  for (int64_t row = begin; row < end;) {
    int64_t borders[R + 1];
    const int found = Rows::template find<R>(w, row, end, borders);
    if (found == 0) return row;
    const bool together = found == R && Rows::value_count(w) - borders[R - 1] >= w.cols + kGroup;  // far enough from the end of the values
    const int64_t next = together ? stream_rows<L, Rows, R, M, false>(w, row, borders, lanes, bias, y)
                                  : stream_rows<L, Rows, 1, M, true>(w, row, borders, lanes, bias, y);
    if (next < row + (together ? R : 1)) return next;
    row = next;
  }
  return end;
}

template <class L, class Rows, int M = L::kStreamedRows>
int64_t stream(const typename Rows::Matrix& w, int64_t begin, int64_t end, const void* lanes, int64_t m, const void* bias, void* y) {
  if constexpr (M > 1) {
    if (m < M) return stream<L, Rows, M - 1>(w, begin, end, lanes, m, bias, y);
  }
  return stream_all<L, Rows, M>(w, begin, end, static_cast<const uint8_t*>(lanes), static_cast<const uint8_t*>(bias),
                                static_cast<uint8_t*>(y));
}
