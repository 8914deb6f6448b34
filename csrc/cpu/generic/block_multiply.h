// y = x W^T + bias, and y = g W, for more rows of x or g and a block-sparse W: bound by arithmetic.
//
// Vectors are rows of x, so that any shape of block fills them; elements of W are broadcast from where they lie, if a lane may be read
// there. A chunk of a line's blocks stays in the second cache for all rows of x, and of each tile of x what the chunk meets.
//
//   tile    [lanes of a row of x][kBlockTileRows rows of x]; the last tile of a call is as narrow as whole vectors permit
//   piece   what a block has of some rows of y and some lanes: all of it, unless it is large
//   sums    [tiles][kBandRows rows of y][kBlockTileRows rows of x], kept while a band of rows of y goes through its chunks

template <class L>
constexpr int64_t kBlockTileRows = L::kMicroVectors * L::kLanes;
constexpr int64_t kBlockMostRows = 240;  // of x in a call
constexpr int64_t kBandRows = 128;       // rows of y whose sums are kept, and rounded together
constexpr int64_t kChunkLanes = 512;     // of W that are multiplied with a tile at a time
constexpr int64_t kChunkPieces = 128;    // the same, for small blocks
constexpr int64_t kPrefetchLanes = 4;    // of x that are asked for at a time

struct Piece {
  const uint8_t* at;  // its first lane of the first row
  int64_t x_lane;     // which it meets
  int64_t lanes;
  const uint8_t* upcoming;  // about where a piece of the next chunk lies: it is only prefetched
};

// Where a piece lies in a row of x whose pairs its ends may cut in two: the bits of its first and last lane that it meets.
struct CutPairs {
  int64_t x_lane;
  uint32_t first, last;
};

template <class L>
struct MultiplyScratch {
  static_assert(kBlockMostRows % kBlockTileRows<L> == 0 && kBandRows % L::kLanes == 0, "whole tiles, and vectors of sums");
  alignas(64) uint8_t sums[kBlockMostRows / kBlockTileRows<L>][kBandRows][L::kMicroVectors * kVectorBytes<L>];
  alignas(64) uint8_t bias[kBandRows][kVectorBytes<L>];                                          // one row of y in all lanes
  alignas(64) uint8_t packed[(kBandRows * kChunkLanes + kGroup) * kLaneBytes<L>];                // pieces, where W itself cannot be read
  alignas(64) uint8_t transposed[kBandRows / L::kLanes][L::kLanes * kVectorBytes<L>];            // sums as [rows of x][rows of y]
  alignas(64) uint8_t x[L::kDepth == 1 ? 1 : kChunkLanes * L::kMicroVectors * kVectorBytes<L>];  // what pieces meet of x, if pairs are cut
  Piece pieces[kChunkPieces];
  CutPairs cuts[kChunkPieces];
};

template <class L>
constexpr int64_t kBlockScratchBytes = sizeof(MultiplyScratch<L>);

// ---- Rows of x

// Vectors that hold `rows` rows of x.
template <class L>
constexpr int64_t vectors_of(int64_t rows) {
  return blocks_across(rows, L::kLanes);
}

// Vectors of the tile that begins with row `row` of m.
template <class L>
constexpr int64_t tile_vectors(int64_t row, int64_t m) {
  return m - row < kBlockTileRows<L> ? vectors_of<L>(m - row) : L::kMicroVectors;
}

template <class L>
int64_t block_tiles_bytes(int64_t m, int64_t cols) {
  const int64_t whole = m / kBlockTileRows<L>;
  return whole * whole_cache_lines(lanes_of<L>(cols) * L::kMicroVectors * kVectorBytes<L>) +
         whole_cache_lines(lanes_of<L>(cols) * vectors_of<L>(m % kBlockTileRows<L>) * kVectorBytes<L>);
}

// Whether lanes are the elements of a row as they lie in memory.
template <class L>
constexpr bool kLanesInPlace = L::Element::kWidth * L::kDepth == kLaneBytes<L>;

// One vector of rows, `rows` <= kLanes of them there and `x_step` bytes apart, as [lanes of a row][kLanes], `step` bytes from lane to lane.
template <class L>
void pack_vector_of_rows(const uint8_t* x, int64_t x_step, int64_t rows, int64_t cols, uint8_t* dst, int64_t step) {
  constexpr int64_t kWidth = L::Element::kWidth;
  alignas(64) uint8_t group[L::kLanes][kGroupBytes<L>];
  alignas(64) uint8_t lanes[L::kLanes * kVectorBytes<L>];
  if (rows < L::kLanes) __builtin_memset(group, 0, sizeof(group));
  for (int64_t col = 0; col < cols; col += kGroup) {
    const int64_t columns = cols - col < kGroup ? cols - col : kGroup;
    const bool direct = kLanesInPlace<L> && rows == L::kLanes && columns == kGroup;
    for (int64_t i = 0; i < rows && !direct; ++i) widen_row<L>(x + i * x_step + col * kWidth, columns, group[i]);
    const uint8_t* const src = direct ? x + col * kWidth : group[0];
    const int64_t stride = direct ? x_step : kGroupBytes<L>;
    for (int64_t lane = 0; lane < lanes_of<L>(columns); lane += L::kLanes) {
      const int64_t count = at_most(lanes_of<L>(columns) - lane, L::kLanes);
      const bool in_place = count == L::kLanes && step == kVectorBytes<L>;
      L::transpose(src + lane * kLaneBytes<L>, stride, in_place ? dst : lanes);
      for (int64_t i = 0; i < count && !in_place; ++i) copy_bytes(dst + i * step, lanes + i * kVectorBytes<L>, kVectorBytes<L>);
      dst += count * step;
    }
  }
}

template <class L>
void block_pack_tiles(const void* x, int64_t m, int64_t cols, void* tiles) {
  if (cols == 0) return;  // tiles may be a null pointer
  const int64_t row_bytes = cols * L::Element::kWidth;
  for (int64_t row = 0; row < m; row += L::kLanes) {
    const int64_t first = row / kBlockTileRows<L> * kBlockTileRows<L>;
    uint8_t* const tile = static_cast<uint8_t*>(tiles) + block_tiles_bytes<L>(first, cols);
    pack_vector_of_rows<L>(static_cast<const uint8_t*>(x) + row * row_bytes, row_bytes, at_most(m - row, L::kLanes), cols,
                           tile + (row - first) * kLaneBytes<L>, tile_vectors<L>(first, m) * kVectorBytes<L>);
  }
}

// ---- Pieces of W

// W as a product sees it: y has `rows` columns, x has `depth`; forward and transposed are one thing with steps exchanged.
struct BlockOperand {
  const BlockMatrix& w;
  int64_t rows, depth;
  int64_t block_rows, block_depth;
  int64_t row_step, depth_step;  // bytes between elements of a block
};

template <class L>
BlockOperand forward_operand(const BlockMatrix& w) {
  constexpr int64_t kWidth = L::Element::kWidth;
  return {w, w.rows, w.cols, w.block_rows, w.block_cols, w.block_cols * kWidth, kWidth};
}

template <class L>
BlockOperand transposed_operand(const BlockMatrix& w) {
  constexpr int64_t kWidth = L::Element::kWidth;
  return {w, w.cols, w.rows, w.block_cols, w.block_rows, kWidth, w.block_cols * kWidth};
}

// Whether lanes of W may be read where they lie: a pair must be one, and nothing in it may lie past the end of W.
template <class L>
bool multiplies_in_place(const BlockOperand& w) {
  return kLanesInPlace<L> && (L::kDepth == 1 || (w.depth_step == L::Element::kWidth && w.block_depth % 2 == 0 && w.depth % 2 == 0));
}

// A chunk of a line: lane (row, lane) of a piece lies row * row_step + lane * lane_step bytes after its first one.
struct Chunk {
  const Piece* pieces;
  int64_t count;
  int64_t row_step, lane_step;
  int64_t prefetched;  // bytes of an upcoming piece for each row of one
};

// `outer` times `inner` elements, `step` bytes apart, as lanes, `stride` lanes apart. `dst` has room for a group more.
template <class L>
void widen_elements(const uint8_t* src, int64_t step, int64_t outer, int64_t inner, int64_t stride, uint8_t* dst) {
  if (inner == stride && step == inner * L::Element::kWidth) {
    widen_row<L>(src, outer * inner, dst);
    return;
  }
  for (int64_t i = 0; i < outer; ++i) widen_row<L>(src + i * step, inner, dst + i * stride * kLaneBytes<L>);
}

// One lane of each of `rows` rows, of the elements at `even` and `odd` and from there `step` bytes apart; null stands for zeros.
template <class L>
void pair_rows(const uint8_t* even, const uint8_t* odd, int64_t step, int64_t rows, uint8_t* dst) {
  int64_t row = 0;
  if (even != nullptr && odd != nullptr && step == 2) {
    for (; rows - row >= L::kLanes; row += L::kLanes) L::store(L::pair(even + row * 2, odd + row * 2), dst + row * 4);
  }
  for (; row < rows; ++row) {
    const uint32_t low = even == nullptr ? 0 : load_as<uint16_t>(even + row * step);
    const uint32_t high = odd == nullptr ? 0 : load_as<uint16_t>(odd + row * step);
    store_as(low | high << 16, dst + row * 4);
  }
}

// The pieces of some rows of a line, numbered through all blocks: those of large blocks have kChunkLanes lanes each.
template <class L>
struct Pieces {
  const BlockOperand& w;
  int64_t row, rows;  // of a block
  int64_t depth;      // of a block: one that is deeper than W is the only one
  int64_t parts;      // of a block
  int64_t most_lanes;
  bool in_place;
  bool cuts_pairs;

  Pieces(const BlockOperand& operand, int64_t first_row, int64_t count) : w(operand), row(first_row), rows(count) {
    depth = at_most(w.block_depth, w.depth);
    parts = blocks_across(lanes_of<L>(depth), kChunkLanes);
    most_lanes = parts == 1 ? lanes_of<L>(depth) : kChunkLanes;
    in_place = multiplies_in_place<L>(w);
    cuts_pairs = L::kDepth == 2 && w.block_depth % 2 != 0;
  }

  int64_t first(int64_t line) const { return w.w.line_starts[line] * parts; }

  // The pieces from `index` on, as many as make a chunk but none from `end` on, packed where they cannot be read in place.
  Chunk take(int64_t index, int64_t end, MultiplyScratch<L>& scratch) const {
    const int64_t count = at_most(at_most(kChunkLanes / most_lanes, kChunkPieces), end - index);
    for (int64_t i = 0; i < count; ++i) {
      scratch.pieces[i] = piece(index + i, scratch.packed + i * most_lanes * rows * kLaneBytes<L>);
      scratch.pieces[i].upcoming = upcoming(index + i + count);
      if (cuts_pairs) {
        scratch.cuts[i] = cuts(index + i, scratch.pieces[i]);
        scratch.pieces[i].x_lane = i * most_lanes;  // of the copy
      }
    }
    const bool row_after_row = w.row_step > w.depth_step;
    const int64_t packed_step = L::kDepth == 1 && row_after_row ? most_lanes * kLaneBytes<L> : kLaneBytes<L>;
    const int64_t packed_lane_step = L::kDepth == 1 && row_after_row ? kLaneBytes<L> : rows * kLaneBytes<L>;
    return {scratch.pieces, count, in_place ? w.row_step : packed_step, in_place ? w.depth_step * L::kDepth : packed_lane_step,
            row_bytes()};
  }

 private:
  // Bytes of each row of a piece that is a whole block; others are too long to be lost to the hardware's prefetcher.
  int64_t row_bytes() const { return rows == w.block_rows && parts == 1 ? depth * L::Element::kWidth : 0; }

  // The index-th piece, perhaps of a later line.
  const uint8_t* upcoming(int64_t index) const {
    const int64_t blocks = w.w.line_starts[blocks_across(w.rows, w.block_rows)];
    return block_at<L>(w.w, at_most(index / parts, blocks - 1));
  }

  Piece piece(int64_t index, uint8_t* packed) const {
    const int64_t start = w.w.positions[index / parts] * w.block_depth;
    const int64_t end = at_most(start + w.block_depth, w.depth);
    const int64_t x_lane = start / L::kDepth + index % parts * kChunkLanes;
    const int64_t left = lanes_of<L>(end) - x_lane, lanes = left < 0 ? 0 : at_most(left, most_lanes);
    const uint8_t* const src = block_at<L>(w.w, index / parts) + row * w.row_step;
    if (in_place) return {src + (x_lane * L::kDepth - start) * w.depth_step, x_lane, lanes, nullptr};
    if constexpr (L::kDepth == 1) {
      widen(src + (x_lane - start) * w.depth_step, lanes, packed);
    } else {
      pair(src, start, end, x_lane, lanes, packed);
    }
    return {packed, x_lane, lanes, nullptr};
  }

  CutPairs cuts(int64_t index, const Piece& piece) const {
    const int64_t start = w.w.positions[index / parts] * w.block_depth, end = start + w.block_depth;
    return {piece.x_lane, piece.x_lane * 2 < start ? 0xffff0000 : 0xffffffff,
            (piece.x_lane + piece.lanes) * 2 > end ? 0x0000ffff : 0xffffffff};
  }

  void widen(const uint8_t* src, int64_t lanes, uint8_t* packed) const {
    if (w.row_step > w.depth_step) {
      widen_elements<L>(src, w.row_step, rows, lanes, most_lanes, packed);
    } else {
      widen_elements<L>(src, w.depth_step, lanes, rows, rows, packed);
    }
  }

  // Pairs are those of x, wherever the block begins: what is not the block's is zero.
  void pair(const uint8_t* src, int64_t start, int64_t end, int64_t x_lane, int64_t lanes, uint8_t* packed) const {
    const auto element = [&](int64_t k) { return k < start || k >= end ? nullptr : src + (k - start) * w.depth_step; };
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t k = (x_lane + lane) * 2;
      pair_rows<L>(element(k), element(k + 1), w.row_step, rows, packed + lane * rows * kLaneBytes<L>);
    }
  }
};

// ---- Products

// Where sums begin: those of earlier chunks or, before the first one, the bias.
struct Start {
  const uint8_t* sums;
  int64_t row_step, vector_step;
};

// The index-th piece of a chunk. The first strip asks for what the next piece meets of x, if that lies where the hardware does not expect
// it; a tile of one vector is small enough to stay in the cache.
template <class L, int R, int V>
inline void multiply_piece(const Chunk& chunk, int64_t index, int64_t row, const uint8_t* tile, typename L::Sums (&sums)[R][V]) {
  constexpr int64_t kStep = V * kVectorBytes<L>;
  const Piece& piece = chunk.pieces[index];
  const int64_t next = index + 1 < chunk.count ? chunk.pieces[index + 1].x_lane : piece.x_lane + piece.lanes;
  const bool jumps = V > 1 && row == 0 && next != piece.x_lane + piece.lanes;
  for (int64_t i = 0; i < R * chunk.prefetched; i += 64) __builtin_prefetch(piece.upcoming + row * chunk.prefetched + i);
  const int64_t lanes = jumps ? kPrefetchLanes : piece.lanes;
  for (int64_t lane = 0; lane < piece.lanes; lane += lanes) {
    if (jumps) prefetch_bytes<kPrefetchLanes * kStep>(tile, (next + lane) * kStep);
    multiply_lanes<L, R, V>(piece.at + row * chunk.row_step + lane * chunk.lane_step, chunk.row_step, chunk.lane_step,
                            tile + (piece.x_lane + lane) * kStep, kStep, piece.lanes - lane < lanes ? piece.lanes - lane : lanes, sums);
  }
}

// sums [R rows of y][V vectors of rows of x] = start + chunk x tile; the chunk and the rest begin at row `row`.
template <class L, int R, int V>
void multiply_strip(const Chunk& chunk, int64_t row, const uint8_t* tile, const Start& start, uint8_t* sums) {
  typename L::Sums acc[R][V];  // in registers: every loop over it is unrolled
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = L::load_sums(start.sums + (row + r) * start.row_step + v * start.vector_step);
  }
  for (int64_t i = 0; i < chunk.count; ++i) multiply_piece<L, R, V>(chunk, i, row, tile, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) L::store_sums(acc[r][v], sums + ((row + r) * L::kMicroVectors + v) * kVectorBytes<L>);
  }
}

// The rows [row, rows) in strips of R, the rest in smaller ones.
template <class L, int R, int V>
void multiply_strips(const Chunk& chunk, int64_t row, int64_t rows, const uint8_t* tile, const Start& start, uint8_t* sums) {
  for (; rows - row >= R; row += R) multiply_strip<L, R, V>(chunk, row, tile, start, sums);
  if constexpr (R > 1) multiply_strips<L, R / 2, V>(chunk, row, rows, tile, start, sums);
}

// A tile of V vectors or fewer; a single vector leaves registers for twice the rows.
template <class L, int V>
void multiply_tile(const Chunk& chunk, int64_t rows, int64_t vectors, const uint8_t* tile, const Start& start, uint8_t* sums) {
  if (vectors == V) {
    multiply_strips<L, V == 1 ? 2 * L::kMicroRows : L::kMicroRows, V>(chunk, 0, rows, tile, start, sums);
  } else if constexpr (V > 1) {
    multiply_tile<L, V - 1>(chunk, rows, vectors, tile, start, sums);
  }
}

// The lanes of a tile of x that each piece meets, with zeros for the columns that are not its own: they may hold infinities.
template <class L>
const uint8_t* copy_cut_pairs(const uint8_t* tile, int64_t vectors, int64_t pieces, MultiplyScratch<L>& scratch) {
  const int64_t step = vectors * kVectorBytes<L>;
  const auto keep = [&](uint8_t* lane, uint32_t bits) {
    for (int64_t i = 0; i < step; i += 4) store_as(load_as<uint32_t>(lane + i) & bits, lane + i);
  };
  for (int64_t i = 0; i < pieces; ++i) {
    const Piece& piece = scratch.pieces[i];
    if (piece.lanes == 0) continue;
    uint8_t* const dst = scratch.x + piece.x_lane * step;
    copy_bytes(dst, tile + scratch.cuts[i].x_lane * step, piece.lanes * step);
    keep(dst, scratch.cuts[i].first);
    keep(dst + (piece.lanes - 1) * step, scratch.cuts[i].last);
  }
  return scratch.x;
}

// The rows [row, row + rows) of a line, as rows from `band_row` on of the band.
template <class L>
void multiply_part(const BlockOperand& w, int64_t line, int64_t row, int64_t rows, const uint8_t* tiles, int64_t m, int64_t band_row,
                   MultiplyScratch<L>& scratch) {
  const Pieces<L> pieces(w, row, rows);
  const int64_t first = pieces.first(line), last = pieces.first(line + 1);
  int64_t index = first;
  do {
    Chunk chunk = pieces.take(index, last, scratch);
    for (int64_t i = 0, tile = 0; i < m; i += kBlockTileRows<L>, ++tile) {
      uint8_t* const sums = scratch.sums[tile][band_row];
      const Start start = index == first ? Start{scratch.bias[band_row], kVectorBytes<L>, 0}
                                         : Start{sums, L::kMicroVectors * kVectorBytes<L>, kVectorBytes<L>};
      const int64_t vectors = tile_vectors<L>(i, m);
      const uint8_t* x = tiles + block_tiles_bytes<L>(i, w.depth);
      if (pieces.cuts_pairs) x = copy_cut_pairs<L>(x, vectors, chunk.count, scratch);
      multiply_tile<L, L::kMicroVectors>(chunk, rows, vectors, x, start, sums);
      chunk.prefetched = 0;
    }
    index += chunk.count;
  } while (index < last);
}

// Rounds the sums of the `rows` rows of y from `row` on, a vector of rows of x at a time.
template <class L>
void round_band(int64_t row, int64_t rows, int64_t m, uint8_t* y, int64_t y_cols, MultiplyScratch<L>& scratch) {
  constexpr int64_t kWidth = L::Element::kWidth;
  for (int64_t i = 0; i < m; i += L::kLanes) {
    const int64_t tile = i / kBlockTileRows<L>, vector = i % kBlockTileRows<L> / L::kLanes;
    for (int64_t r = 0; r < rows; r += L::kLanes) {
      L::transpose(scratch.sums[tile][r] + vector * kVectorBytes<L>, L::kMicroVectors * kVectorBytes<L>, scratch.transposed[r / L::kLanes]);
    }
    for (int64_t lane = 0; lane < L::kLanes && i + lane < m; ++lane) {
      for (int64_t r = 0; r < rows; r += L::kLanes) {
        round_elements<L>(scratch.transposed[r / L::kLanes] + lane * kVectorBytes<L>, at_most(rows - r, L::kLanes),
                          y + ((i + lane) * y_cols + row + r) * kWidth);
      }
    }
  }
}

// The lines [begin, end), in bands of rows of y: of several lines, or parts of a line.
template <class L>
void multiply_lines(const BlockOperand& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y,
                    int64_t y_cols, MultiplyScratch<L>& scratch) {
  using Element = typename L::Element;
  const int64_t last = at_most(end * w.block_rows, w.rows);
  int64_t band = begin * w.block_rows;
  for (int64_t row = band, rows; row < last; row += rows) {
    const int64_t line = row / w.block_rows, after = at_most((line + 1) * w.block_rows, last);
    rows = at_most(after - row, kBandRows);
    if (row + rows - band > kBandRows) {
      round_band<L>(band, row - band, m, static_cast<uint8_t*>(y), y_cols, scratch);
      band = row;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const typename L::Sum start = bias == nullptr ? 0 : Element::widen(static_cast<const uint8_t*>(bias) + (row + i) * Element::kWidth);
      for (int64_t lane = 0; lane < L::kLanes; ++lane) store_as(start, scratch.bias[row - band + i] + lane * kLaneBytes<L>);
    }
    multiply_part<L>(w, line, row - line * w.block_rows, rows, static_cast<const uint8_t*>(tiles), m, row - band, scratch);
  }
  round_band<L>(band, last - band, m, static_cast<uint8_t*>(y), y_cols, scratch);
}

template <class L>
void block_multiply(const BlockMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y,
                    int64_t y_cols, void* scratch) {
  multiply_lines<L>(forward_operand<L>(w), begin, end, tiles, m, bias, y, y_cols, *static_cast<MultiplyScratch<L>*>(scratch));
}

template <class L>
void block_multiply_transposed(const BlockMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, void* y, void* scratch) {
  if (streams_transposed<L>(w, m)) {
    stream_transposed<L>(w, begin, end, static_cast<const uint8_t*>(tiles), tile_vectors<L>(0, m) * kVectorBytes<L>, m,
                         static_cast<uint8_t*>(y));
    return;
  }
  multiply_lines<L>(transposed_operand<L>(w), begin, end, tiles, m, nullptr, y, w.cols, *static_cast<MultiplyScratch<L>*>(scratch));
}
