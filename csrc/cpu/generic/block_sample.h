// The kept blocks of g^T x, the gradient of a block-sparse W.

constexpr int64_t kBlockSampledRows = 2048;

template <class L>
int64_t block_columns_bytes(int64_t m, int64_t cols, int64_t) {
  return whole_cache_lines(m * cols * L::Element::kWidth);
}

template <class L>
void block_pack_columns(const void* x, int64_t m, int64_t cols, int64_t block, int64_t first, int64_t last, void* columns) {
  constexpr int64_t kWidth = L::Element::kWidth;
  const int64_t begin = first * block, end = last * block < cols ? last * block : cols;
  for (int64_t i = 0; i < m; ++i) {
    copy_bytes(static_cast<uint8_t*>(columns) + (i * cols + begin) * kWidth, static_cast<const uint8_t*>(x) + (i * cols + begin) * kWidth,
               (end - begin) * kWidth);
  }
}

template <class L>
void block_sample(const BlockMatrix& w, int64_t begin, int64_t end, const void* g_columns, const void* x_columns, int64_t m,
                  const void* earlier, void* sums, void* values, void*) {
  using Element = typename L::Element;
  using Sum = typename L::Sum;
  constexpr int64_t kWidth = Element::kWidth;
  for (int64_t at = begin; at < end; ++at) {
    for (int64_t i = 0; i < w.block_rows * w.block_cols; ++i) {
      const int64_t row = w.lines[at] * w.block_rows + i / w.block_cols, col = w.positions[at] * w.block_cols + i % w.block_cols;
      const int64_t place = at * w.block_rows * w.block_cols + i;
      Sum sum = earlier == nullptr ? 0 : load_as<Sum>(static_cast<const uint8_t*>(earlier) + place * static_cast<int64_t>(sizeof(Sum)));
      for (int64_t k = 0; k < m && row < w.rows && col < w.cols; ++k) {
        sum += Element::widen(static_cast<const uint8_t*>(g_columns) + (k * w.rows + row) * kWidth) *
               Element::widen(static_cast<const uint8_t*>(x_columns) + (k * w.cols + col) * kWidth);
      }
      if (sums != nullptr) {
        store_as(sum, static_cast<uint8_t*>(sums) + place * static_cast<int64_t>(sizeof(Sum)));
      } else {
        Element::narrow(sum, static_cast<uint8_t*>(values) + place * kWidth);
      }
    }
  }
}
