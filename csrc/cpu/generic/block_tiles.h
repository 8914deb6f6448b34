// What the block-sparse kernels share: the register micro-kernel, and how large its tile is.
//
//   task      lines of W (block_multiply.h, block_stream.h) or kept blocks (block_sample.h), and rows of x: what a thread does
//   cache     what of it is done at a time, so that operands stay in the second cache: sized where it is done
//   registers L::kMicroRows x L::kMicroVectors vectors of sums: rows are broadcast, vectors are loaded, as in BLIS
//             (https://github.com/flame/blis)
//
// Template parameters of all block-sparse kernels:
//
//   L  the type of lanes (lanes.h)
//   R  rows of W, or units of them, whose sums are in registers at a time
//   V  vectors of sums that each of these has
//   M  rows of x or g, where they are so few that all are multiplied at a time

constexpr int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

constexpr int64_t whole_cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Lanes that hold a row of `cols` columns.
template <class L>
constexpr int64_t lanes_of(int64_t cols) {
  return blocks_across(cols, L::kDepth);
}

// The block that is the at-th in the order of the lines.
template <class L>
inline const uint8_t* block_at(const BlockMatrix& w, int64_t at) {
  const int64_t place = w.order == nullptr ? at : w.order[at];
  return static_cast<const uint8_t*>(w.values) + place * w.block_rows * w.block_cols * L::Element::kWidth;
}

// kLanes elements of each of kDepth rows, a lane holding one of each.
template <class L>
inline typename L::Lanes load_lanes(const uint8_t* row, int64_t row_bytes) {
  if constexpr (L::kDepth == 1) {
    return L::widen(row);
  } else {
    return L::pair(row, row + row_bytes);
  }
}

// The same where only `rows` rows are there, and `bytes` of each: what is not there is zero.
template <class L>
inline typename L::Lanes load_lanes_within(const uint8_t* row, int64_t row_bytes, int64_t rows, int64_t bytes) {
  constexpr int64_t kBytes = L::kLanes * L::Element::kWidth;
  if (bytes >= kBytes && rows >= L::kDepth) return load_lanes<L>(row, row_bytes);
  uint8_t edge[L::kDepth * kBytes] = {};
  for (int64_t i = 0; i < L::kDepth && i < rows; ++i) copy_bytes(edge + i * kBytes, row + i * row_bytes, bytes < kBytes ? bytes : kBytes);
  return load_lanes<L>(edge, kBytes);
}

// What is asked of memory while lanes are multiplied: nothing, or a line of the next operands for each lane.
struct NothingAhead {
  void next() {}
};
struct Ahead {
  const uint8_t* src;
  int64_t step;  // bytes for each lane

  void next() {
    __builtin_prefetch(src);
    src += step;
  }
};

// sums [R][V] += a [R rows][lanes], broadcast lane by lane, times b [lanes][V vectors]. Bytes between rows of `a`, its lanes, and those of
// `b` are given; the vectors of `b` follow each other.
template <class L, int R, int V, class Prefetch = NothingAhead>
inline void multiply_lanes(const uint8_t* a, int64_t a_row, int64_t a_lane, const uint8_t* b, int64_t b_lane, int64_t lanes,
                           typename L::Sums (&sums)[R][V], Prefetch ahead = {}) {
  constexpr int kThrees = (R + 2) / 3;  // one pointer for three rows: both steps between them are ways to address memory, and few registers
  const uint8_t* rows[kThrees];
#pragma GCC unroll 16
  for (int i = 0; i < kThrees; ++i) rows[i] = a + i * 3 * a_row;
  for (int64_t lane = 0; lane < lanes; ++lane, b += b_lane) {
    ahead.next();
    typename L::Lanes vectors[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) vectors[v] = L::load(b + v * kVectorBytes<L>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename L::Lanes row = L::broadcast(rows[r / 3] + r % 3 * a_row);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sums[r][v] = L::multiply_add(vectors[v], row, sums[r][v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kThrees; ++i) rows[i] += a_lane;
  }
}
