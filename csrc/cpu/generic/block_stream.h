// y = x W^T + bias for few rows of x and a block-sparse W: bound by the bytes of W.

constexpr int64_t kBlockStreamedRows = 8;

template <class L>
int64_t block_rows_bytes(int64_t m, int64_t cols, int64_t) {
  return whole_cache_lines(m * cols * L::Element::kWidth);
}

template <class L>
void block_pack_rows(const void* x, int64_t m, int64_t cols, int64_t, void* rows) {
  copy_bytes(rows, x, m * cols * L::Element::kWidth);
}

template <class L>
void block_stream(const BlockMatrix& w, int64_t begin, int64_t end, const void* rows, int64_t m, const void* bias, void* y, void*) {
  using Element = typename L::Element;
  constexpr int64_t kWidth = Element::kWidth;
  const uint8_t* const x = static_cast<const uint8_t*>(rows);
  for (int64_t line = begin; line < end; ++line) {
    for (int64_t row = line * w.block_rows; row < (line + 1) * w.block_rows && row < w.rows; ++row) {
      for (int64_t i = 0; i < m; ++i) {
        typename L::Sum sum = bias == nullptr ? 0 : Element::widen(static_cast<const uint8_t*>(bias) + row * kWidth);
        for (int64_t at = w.line_starts[line]; at < w.line_starts[line + 1]; ++at) {
          const int64_t col = w.positions[at] * w.block_cols;
          const uint8_t* const block = static_cast<const uint8_t*>(w.values) + at * w.block_rows * w.block_cols * kWidth;
          for (int64_t k = 0; k < w.block_cols && col + k < w.cols; ++k) {
            sum += Element::widen(x + (i * w.cols + col + k) * kWidth) *
                   Element::widen(block + ((row - line * w.block_rows) * w.block_cols + k) * kWidth);
          }
        }
        Element::narrow(sum, static_cast<uint8_t*>(y) + (i * w.rows + row) * kWidth);
      }
    }
  }
}
