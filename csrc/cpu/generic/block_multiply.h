// y = x W^T + bias, and y = g W, for more rows of x or g and a block-sparse W: bound by arithmetic.

template <class L>
constexpr int64_t kBlockTileRows = 16;
template <class L>
constexpr int64_t kBlockMostRows = 1024;
template <class L>
constexpr int64_t kBlockScratchBytes = 0;

template <class L>
int64_t block_tiles_bytes(int64_t m, int64_t cols) {
  return whole_cache_lines(m * cols * L::Element::kWidth);
}

template <class L>
void block_pack_tiles(const void* x, int64_t m, int64_t cols, void* tiles) {
  copy_bytes(tiles, x, m * cols * L::Element::kWidth);
}

template <class L>
void block_multiply(const BlockMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, const void* bias, void* y,
                    void* scratch) {
  block_stream<L>(w, begin, end, tiles, m, bias, y, scratch);
}

template <class L>
void block_multiply_transposed(const BlockMatrix& w, int64_t begin, int64_t end, const void* tiles, int64_t m, void* y, void*) {
  using Element = typename L::Element;
  constexpr int64_t kWidth = Element::kWidth;
  const uint8_t* const g = static_cast<const uint8_t*>(tiles);
  for (int64_t line = begin; line < end; ++line) {
    for (int64_t col = line * w.block_cols; col < (line + 1) * w.block_cols && col < w.cols; ++col) {
      for (int64_t i = 0; i < m; ++i) {
        typename L::Sum sum = 0;
        for (int64_t at = w.line_starts[line]; at < w.line_starts[line + 1]; ++at) {
          const int64_t row = w.positions[at] * w.block_rows, place = w.order == nullptr ? at : w.order[at];
          const uint8_t* const block = static_cast<const uint8_t*>(w.values) + place * w.block_rows * w.block_cols * kWidth;
          for (int64_t k = 0; k < w.block_rows && row + k < w.rows; ++k) {
            sum += Element::widen(g + (i * w.rows + row + k) * kWidth) *
                   Element::widen(block + (k * w.block_cols + col - line * w.block_cols) * kWidth);
          }
        }
        Element::narrow(sum, static_cast<uint8_t*>(y) + (i * w.cols + col) * kWidth);
      }
    }
  }
}
