// What the block-sparse kernels share: the register micro-kernel, and how large its tile is.
//
//   task      lines of W (block_multiply.h, block_stream.h) or kept blocks (block_sample.h), and rows of x: what a thread does
//   cache     what of it is done at a time, so that operands stay in the second cache: sized where it is done
//   registers L::kMicroRows x L::kMicroVectors vectors of sums: rows are broadcast, vectors are loaded

template <class L>
constexpr int64_t kVectorBytes = L::kLanes * kLaneBytes<L>;

constexpr int64_t whole_cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

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
  constexpr int64_t kVector = L::kLanes * kLaneBytes<L>;
  constexpr int kThrees = (R + 2) / 3;  // one pointer for three rows: both steps between them are ways to address memory, and few registers
  const uint8_t* rows[kThrees];
#pragma GCC unroll 16
  for (int i = 0; i < kThrees; ++i) rows[i] = a + i * 3 * a_row;
  for (int64_t lane = 0; lane < lanes; ++lane, b += b_lane) {
    ahead.next();
    typename L::Lanes vectors[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) vectors[v] = L::load(b + v * kVector);
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
